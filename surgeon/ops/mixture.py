"""``surgeon::moe``: the experts of a mixture, after routing, as one operator.

Letters in shapes: T tokens, k experts per token, E experts, H input width, G output width, I inner width, O rows of
``w_in`` (I for a plain expert, 2 I for a gated one), S = T k token-expert pairs.

A pair of weight exactly 0 adds nothing, so any implementation may leave it out, and an operation that runs a changing
number of experts per token says so with zeros.  The eager forward does leave them out (unless the device's grouped kernel
runs); the backward does not, since the derivative by a weight needs the expert's output whatever the weight is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.errors import RewriteError
from surgeon.gates import gate as lookup
from surgeon.ops.grouped import (
    Groups,
    grouped_linear,
    grouped_outer,
    grouped_sum,
    has_grouped_kernel,
    sort_by_expert,
    unsort,
)


def inner_activation(pre: Tensor, inner: int, activation: str) -> Tensor:
    """Pre-activations [..., O] -> hidden [..., I]: act(pre), or h(gate, up) when O = 2 I with rows [gate | up]."""
    entry = lookup(activation)
    if pre.shape[-1] == inner:
        return entry.alone(pre)
    return entry.joined(*pre.chunk(2, dim=-1))


def _check_moe(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> None:
    """Refuse arguments that do not fit together; works on symbolic shapes."""
    lookup(activation)

    def need(condition: bool | torch.SymBool, what: str) -> None:
        def message() -> str:
            names = ("x", "index", "weight", "w_in", "w_out", "b_in", "b_out")
            tensors = zip(names, (x, index, weight, w_in, w_out, b_in, b_out), strict=True)
            found = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors if t is not None)
            return f"surgeon::moe needs {what}; found {found}"

        torch._check_with(RewriteError, condition, message)

    need(x.dim() == 2 and index.dim() == 2 and weight.dim() == 2, "x [T, H], index [T, k] and weight [T, k]")
    need(w_in.dim() == 3 and w_out.dim() == 3, "w_in [E, O, H] and w_out [E, G, I]")
    need(not index.is_floating_point() and weight.is_floating_point(), "an integer index and a floating-point weight")
    need(index.shape[0] == x.shape[0] and weight.shape[0] == x.shape[0], "one row of index and weight per token of x")
    need(index.shape[1] == weight.shape[1], "index and weight of the same shape [T, k]")
    need(w_in.shape[2] == x.shape[1], "w_in [E, O, H] with the H of x [T, H]")
    need(w_in.shape[0] == w_out.shape[0], "w_in and w_out with the same number of experts")
    inner = w_out.shape[2]
    need(w_in.shape[1] in (inner, 2 * inner), "w_in [E, O, H] with O = I (plain) or O = 2 I (gated) of w_out [E, G, I]")
    for bias, matrix, name in ((b_in, w_in, "b_in [E, O]"), (b_out, w_out, "b_out [E, G]")):
        need(bias is None or tuple(bias.shape) == tuple(matrix.shape[:2]), f"{name} with the rows of its matrix")
    for tensor in (w_in, w_out, b_in, b_out):
        need(tensor is None or tensor.dtype == x.dtype, f"weights and biases of the dtype of x, {x.dtype}")


@torch.library.custom_op("surgeon::moe", mutates_args=())
def moe(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> Tensor:
    """Mixture of experts behind a router: y_t = sum_j weight[t, j] f_e(x_t), e = index[t, j].

    f_e(x) = w_out[e] h + b_out[e];  plain (O = I): h = act(w_in[e] x + b_in[e]);  gated (O = 2 I):
    [gate | up] = w_in[e] x + b_in[e], h = act(gate) * up, or with the constants of :class:`surgeon.gates.Gate`.

    Args:
        x: [T, H].
        index: [T, k] integers in 0 .. E-1; an expert named twice in a row counts twice; k may equal E, T may be 0.
        weight: [T, k], any sign; may be wider than x (a float32 router before bfloat16 experts).  Where it is exactly 0
            the expert is not run.
        w_in: [E, O, H].
        w_out: [E, G, I].
        b_in: [E, O] or None.
        b_out: [E, G] or None.
        activation: a name in :data:`surgeon.activations.ACTIVATIONS`, or of a gate with constants.

    Returns:
        [T, G] in the dtype of x.

    Raises:
        RewriteError: shapes or types do not fit, or an index is outside 0 .. E-1 (not checked on CUDA's grouped kernel,
            which would have to wait for the device).
        RegistryError: unknown activation.
    """
    _check_moe(x, index, weight, w_in, w_out, b_in, b_out, activation)
    groups = sort_by_expert(index, w_in.shape[0], has_grouped_kernel(x, *w_in.shape[1:], *w_out.shape[1:]), weight)
    hidden = inner_activation(grouped_linear(x[groups.token], w_in, b_in, groups), w_out.shape[2], activation)
    each = unsort(grouped_linear(hidden, w_out, b_out, groups), groups, x.shape[0], index.shape[1])
    # multiply and sum, rather than index_add_: deterministic on CUDA, and the sum of halves is accumulated in float32
    return (each * weight.unsqueeze(-1)).sum(dim=1).to(x.dtype)


@moe.register_fake
def _moe_fake(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> Tensor:
    _check_moe(x, index, weight, w_in, w_out, b_in, b_out, activation)
    return x.new_empty(x.shape[0], w_out.shape[1])


@torch.library.custom_op("surgeon::moe_backward", mutates_args=())
def moe_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of ``surgeon::moe``; only those asked for are computed.

    For a pair s = (t, j) of expert e, with a = w_in[e] x_t + b_in[e] recomputed (kept memory is O(inputs)),
    c = weight[t, j] and g = grad[t]:  q = w_out[e]^T g;  dc = q . h + g . b_out[e];  dw_out[e] += c g h^T;
    db_out[e] += c g;  dh = c q;  da = act'(a) dh, or [act'(gate) f(up) dh | act(gate) f'(up) dh],
    f the factor of up;  dw_in[e] += da x_t^T;  db_in[e] += da;  dx_t += w_in[e]^T da.

    Args:
        grad: [T, G] gradient of the output.
        x: as in :func:`moe`, and so are the next seven.
        index: [T, k].
        weight: [T, k].
        w_in: [E, O, H].
        w_out: [E, G, I].
        b_in: [E, O] or None.
        b_out: [E, G] or None.
        activation: as there.
        needed: six flags, for x, weight, w_in, w_out, b_in, b_out.

    Returns:
        The gradients asked for, in that order, each in the shape and dtype of its input.
    """
    experts, (tokens, k), inner = w_in.shape[0], index.shape, w_out.shape[2]
    need_x, need_weight, need_w_in, need_w_out, need_b_in, need_b_out = needed
    groups = sort_by_expert(index, experts, has_grouped_kernel(x, *w_in.shape[1:], *w_out.shape[1:]))
    rows, rows_grad = x[groups.token], grad[groups.token]
    scale = weight.reshape(-1, 1)[groups.order]
    gated = w_in.shape[1] != inner
    entry = lookup(activation)
    scaled = (rows_grad * scale).to(x.dtype) if need_w_out or need_b_out else rows_grad

    grads: dict[str, Tensor] = {}
    if need_b_out:
        grads["b_out"] = grouped_sum(scaled, experts, groups)
    if need_x or need_weight or need_w_in or need_b_in or need_w_out:
        pre = grouped_linear(rows, w_in, b_in, groups)
        gate, up = pre.chunk(2, dim=-1) if gated else (pre, None)
        active = entry.alone(gate)
        hidden = active if up is None else active * entry.factor(up)
        if need_w_out:
            grads["w_out"] = grouped_outer(scaled, hidden, experts, groups)
    if need_x or need_weight or need_w_in or need_b_in:
        pulled = grouped_linear(rows_grad, w_out.transpose(1, 2), None, groups)
        if need_weight:
            dot = (pulled * hidden).sum(-1, keepdim=True)
            if b_out is not None:
                dot = dot + (rows_grad * b_out[groups.expert]).sum(-1, keepdim=True)
            grads["weight"] = unsort(dot, groups, tokens, k).squeeze(-1).to(weight.dtype)
    if need_x or need_w_in or need_b_in:
        inner_grad = (pulled * scale).to(x.dtype)
        slope = entry.slope(gate)
        if up is None:
            pre_grad = slope * inner_grad
        else:
            flat = entry.factor_slope(up)
            up_grad = active * inner_grad if flat is None else active * flat * inner_grad
            pre_grad = torch.cat([slope * entry.factor(up) * inner_grad, up_grad], dim=-1)
        if need_b_in:
            grads["b_in"] = grouped_sum(pre_grad, experts, groups)
        if need_w_in:
            grads["w_in"] = grouped_outer(pre_grad, rows, experts, groups)
        if need_x:
            each = grouped_linear(pre_grad, w_in.transpose(1, 2), None, groups)
            grads["x"] = unsort(each, groups, tokens, k).sum(dim=1)
    return [grads[name] for name, wanted in zip(_DIFFERENTIABLE, needed, strict=True) if wanted]


_DIFFERENTIABLE = ("x", "weight", "w_in", "w_out", "b_in", "b_out")


@moe_backward.register_fake
def _moe_backward_fake(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    inputs = (x, weight, w_in, w_out, b_in, b_out)
    return [t.new_empty(t.shape) for t, wanted in zip(inputs, needed, strict=True) if wanted and t is not None]


def _moe_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _moe_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad
    needed = [need[i] for i in (0, 2, 3, 4, 5, 6)]
    found = iter(moe_backward(grad, *ctx.saved_tensors, ctx.activation, needed))
    x, weight, w_in, w_out, b_in, b_out = (next(found) if wanted else None for wanted in needed)
    return x, None, weight, w_in, w_out, b_in, b_out, None


moe.register_autograd(_moe_autograd, setup_context=_moe_setup_context)


def moe_dense(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> Tensor:
    """``surgeon::moe`` in ATen with every expert computed for every token: two linears, no data-dependent shape.

    With C[t, e] = sum of weight[t, j] over index[t, j] = e:  y_t = sum_e C[t, e] f_e(x_t).  The sum over experts is the
    inner dimension of one matmul, [T, E I] x [E I, G].  Cost E / k times that of the sparse form; memory O(T E O).  An
    expert that overflows to infinity spoils also the tokens that did not select it (infinity times zero).

    Args and Returns: as :func:`moe`.
    """
    experts, rows, width = w_in.shape
    out_width, inner = w_out.shape[1:]
    tokens = x.shape[0]
    chosen = index.unsqueeze(-1) == torch.arange(experts, device=index.device)
    share = (chosen.to(weight.dtype) * weight.unsqueeze(-1)).sum(dim=1).to(x.dtype)  # C [T, E]
    pre = F.linear(x, w_in.reshape(experts * rows, width), None if b_in is None else b_in.reshape(-1))
    hidden = inner_activation(pre.reshape(tokens, experts, rows), inner, activation) * share.unsqueeze(-1)
    # [E, G, I] -> [G, E I]: experts side by side
    out = F.linear(hidden.reshape(tokens, experts * inner), w_out.permute(1, 0, 2).reshape(out_width, experts * inner))
    return out if b_out is None else out + share @ b_out


def moe_gathered(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> Tensor:
    """``surgeon::moe`` in ATen by gathering each token's expert weights: an alternative decomposition for decoding.

    Touches only the selected experts but copies their weights, O(T k O H) bytes: for one or a few tokens on runtimes
    without a sparse kernel.  Args and Returns as :func:`moe`.
    """
    pre = torch.matmul(w_in[index], x[:, None, :, None]).squeeze(-1)  # [T, k, O]
    if b_in is not None:
        pre = pre + b_in[index]
    each = torch.matmul(w_out[index], inner_activation(pre, w_out.shape[2], activation).unsqueeze(-1)).squeeze(-1)  # [T, k, G]
    if b_out is not None:
        each = each + b_out[index]
    return (each * weight.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def moe_grouped(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: str,
) -> Tensor:
    """``surgeon::moe`` in ATen on the device's grouped matmul; only where :func:`has_grouped_kernel`.

    Args and Returns: as :func:`moe`.
    """

    def hidden(rows: Tensor, groups: Groups) -> Tensor:
        return inner_activation(grouped_linear(rows, w_in, b_in, groups), w_out.shape[2], activation)

    def each(rows: Tensor, groups: Groups) -> Tensor:
        return grouped_linear(rows, w_out, b_out, groups)

    return moe_sorted(x, index, weight, w_in.shape[0], hidden, each)


def moe_sorted(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    experts: int,
    hidden: Callable[[Tensor, Groups], Tensor],
    each: Callable[[Tensor, Groups], Tensor],
) -> Tensor:
    """``surgeon::moe`` in ATen on networks of rows that are sorted by expert; nothing waits for the device.

    Args:
        x: as :func:`moe`.
        index: likewise.
        weight: likewise.
        experts: how many there are.
        hidden: from rows [S, H], their hidden states [S, I] in their experts.
        each: from these to what the experts give, [S, G].

    Returns:
        As :func:`moe`.
    """
    groups = sort_by_expert(index, experts, True)
    place = torch.arange(groups.order.shape[0], device=x.device)
    sorted_place = torch.empty_like(place).scatter(0, groups.order, place)  # of each pair; sorting again would take longer
    rows = each(hidden(x[groups.token], groups), groups)[sorted_place]
    return (rows.view(*index.shape, -1) * weight.unsqueeze(-1)).sum(dim=1).to(x.dtype)
