"""From the rewritten graph to one that a package can hold: no operator of ours, low-bit weights in torch's kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from surgeon.backends import _aot_cuda as on_cuda
from surgeon.backends import _aot_products as products
from surgeon.backends import _aot_tiles as tiles
from surgeon.graph import Graph, assign_tensor
from surgeon.numerics.quantization import FLOAT8, QuantizedTensor, unpack_codes
from surgeon.ops import DECOMPOSITIONS, moe_dense, moe_gathered, moe_grouped
from surgeon.rewrite import Editor

aten = torch.ops.aten
Experts = Literal["auto", "grouped", "gathered", "dense"]
LowBit = Literal["kernels", "dequantize", "refuse"]

KERNEL_GROUPS = (32, 64, 128, 256)
"""Group sizes of torch's 4-bit linear on the CPU."""


class _Codes(NamedTuple):
    """Arguments of ``surgeon::dequantize``."""

    packed: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    bits: int
    group: int
    in_features: int

    @classmethod
    def of(cls, node: fx.Node) -> _Codes:
        return cls(*cast("Any", node.args))


@dataclass
class LowBitLinears:
    """What became of the low-bit weights.

    Attributes:
        graph: the graph with kernels in place of dequantize and linear.
        kernels: number of linears by kernel.
        left: low-bit weights that are dequantized at run time: node, and why no kernel takes it.
    """

    graph: Graph
    kernels: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)


def low_bit_kernels(graph: Graph, device: str, convert: bool) -> LowBitLinears:
    """Replace linears over low-bit weights by torch's kernels for them, and gather rows of tables before dequantizing.

    torch has ``_weight_int4pack_mm_for_cpu`` (4 bits, groups of 32 to 256, x [T, K]) and ``_weight_int8pack_mm`` (8 bits,
    symmetric, one scale per row).

    On CUDA linears and experts over codes stay as they are: :class:`Decomposed` hands the codes to kernels of this backend,
    which take 2, 4 and 8 bits and zero points, for few rows, and unpacks them for many.

    Args:
        graph: stays as it is.
        device: ``cpu`` or ``cuda``.
        convert: False only says what would be done to the linears.
    """
    editor = Editor(graph.clone())
    result = LowBitLinears(editor.graph)
    for node in list(editor.graph.module.graph.nodes):
        if node.target is not torch.ops.surgeon.dequantize.default:
            continue
        for user in list(node.users):
            if user.target is aten.embedding.default and user.args[0] is node:
                _gather_before(editor, node, user)
                continue
            if device == "cuda":
                reason = tiles.why_unpacked(node) if on_cuda.has_kernels() else "Triton is not installed"
                if reason is None:
                    result.kernels["few_rows"] += 1
                else:
                    result.left[node.name] = reason
                continue
            reason = _no_kernel(editor, node, user)
            if reason is not None:
                result.left[node.name] = reason
            else:
                kernel = "_weight_int4pack_mm_for_cpu" if node.args[3] == 4 else "_weight_int8pack_mm"
                result.kernels[kernel] += 1
                if convert:
                    _use_kernel(editor, node, user)
    result.graph = editor.finish()
    return result


def _no_kernel(editor: Editor, node: fx.Node, user: fx.Node) -> str | None:
    """Why no kernel computes ``user`` from these codes, or None."""
    packed, _, zero_point, bits, group, in_features = _Codes.of(node)
    if user.target is not aten.linear.default or user.args[1] is not node:
        return f"it is read by {user.target}, and torch has low-bit kernels for linears only"
    if user.meta["val"].dtype != torch.float32:
        return f"its product is {user.meta['val'].dtype}, and the kernels are used in float32"
    if packed.op != "get_attr":
        return "its codes are not constants"
    if packed.meta["val"].dtype == FLOAT8:
        return "torch has no linear of 8-bit float weights and wider inputs"
    rows, groups = editor.tensor(str(packed.target)).shape[:2]
    if bits == 4:
        if group not in KERNEL_GROUPS or in_features != groups * group:
            return f"groups of {group} over {in_features} columns; the 4-bit kernel takes whole groups of {KERNEL_GROUPS}"
        return None if rows % 16 == 0 else f"{rows} rows; the 4-bit kernel takes multiples of 16"
    if bits == 8 and zero_point is None and groups == 1 and group == in_features:
        return None
    if bits == 8:
        return "the 8-bit kernel takes symmetric codes with one scale per row, as int8_dynamic stores them"
    return f"torch has no kernel for {bits} bits"


def _use_kernel(editor: Editor, node: fx.Node, user: fx.Node) -> None:
    packed, scale, zero_point, bits, group, in_features = _Codes.of(node)
    codes = unpack_codes(editor.tensor(str(packed.target)).flatten(-2), bits)
    steps = editor.tensor(str(scale.target)).detach()
    x = user.args[0]
    assert isinstance(x, fx.Node)
    bias = user.args[2] if len(user.args) > 2 else None
    name = str(packed.target)
    with editor.before(user):
        rows = editor.call(aten.reshape.default, editor.current(x), [-1, in_features])
        if bits == 4:
            # the kernel computes (code - 8) * scale + offset
            zero = 8.0 if zero_point is None else editor.tensor(str(zero_point.target)).to(steps.dtype)
            offset = (8.0 - zero) * steps
            weight = aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
            scales = torch.stack([steps, offset], dim=-1).transpose(0, 1).contiguous()  # [groups, rows, 2]
            out = editor.call(
                aten._weight_int4pack_mm_for_cpu.default,
                rows, editor.add_tensor(f"{name}_packed", weight), group, editor.add_tensor(f"{name}_scales", scales),
            )  # fmt: skip
        else:
            weight = (codes.to(torch.int16) - 128).to(torch.int8)
            out = editor.call(
                aten._weight_int8pack_mm.default,
                rows, editor.add_tensor(f"{name}_int8", weight), editor.add_tensor(f"{name}_scales", steps.flatten()),
            )  # fmt: skip
        out = editor.call(aten.reshape.default, out, editor.sizes(user))
        if bias is not None:
            out = editor.call(aten.add.Tensor, out, bias)
    editor.replace(user, out)


def _gather_before(editor: Editor, node: fx.Node, user: fx.Node) -> None:
    """Rows of a low-bit table: gather their codes and dequantize those, not the whole table."""
    packed, scale, zero_point, *rest = node.args
    ids = user.args[1]
    with editor.before(user):
        picked = [
            None if table is None else editor.call(aten.index.Tensor, table, [ids]) for table in (packed, scale, zero_point)
        ]
        rows = editor.call(torch.ops.surgeon.dequantize.default, *picked, *rest)
    editor.replace(user, rows)


class Decomposed(nn.Module):
    """The graph with every operator of ours spelt in ATen: what ``torch.export`` traces for a package.

    On the CPU a few tokens gather the weights of their experts (T k <= E: at most as many bytes as all experts have), and
    more compute every expert; the package holds both and decides at run time.  On CUDA see ``_aot_cuda``.
    """

    def __init__(
        self, graph: Graph, experts: Experts, spelt: Mapping[Any, Callable[..., Any]] | None = None, device: str = "cpu",
        packed: bool = True,
    ) -> None:  # fmt: skip
        """Say what to spell, and how.

        Args:
            graph: its module is run, not copied.
            experts: how experts are computed.
            spelt: spellings of operators that replace ``surgeon.ops.DECOMPOSITIONS``.
            device: kind of device that it is spelt for.
            packed: whether low-bit weights reach kernels where there are some (CUDA).
        """
        super().__init__()
        self.module = graph.module
        self.experts = experts
        self.kernels = device == "cuda" and on_cuda.has_kernels()
        self.packed = packed and self.kernels
        ours = {torch.ops.surgeon.attention.default: on_cuda.attention} if self.kernels else {}
        self.spelt = {**DECOMPOSITIONS, **ours, **(spelt or {})}
        self.used: Counter[str] = Counter()

    def forward(self, *inputs: Tensor) -> Any:
        """Run the graph."""
        return _Interpreter(self).run(*inputs)


class _Interpreter(fx.Interpreter):
    def __init__(self, owner: Decomposed) -> None:
        super().__init__(owner.module)
        self.owner = owner
        self._turned: dict[Any, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As it is, but low-bit weights that only kernels read stay packed, and caches grow where attention reads them."""
        if self.owner.packed and n.target is torch.ops.surgeon.dequantize.default and tiles.why_unpacked(n) is None:
            return tiles.of_node(n, self.fetch_args_kwargs_from_env(n)[0])
        if self.owner.kernels and n.target is torch.ops.surgeon.attention.default:
            return self._attention(n)
        if self.owner.kernels and n.target in (aten.cos.default, aten.sin.default):
            return self._cos_sin(n)
        if self.owner.kernels and (parts := on_cuda.Appended.of(n)) is not None:
            return on_cuda.Appended(*(self.env[part] for part in parts))
        if self.owner.kernels and on_cuda.Buffered.of(n) is not None:
            return on_cuda.Buffered(*self.fetch_args_kwargs_from_env(n)[0][:4])
        return super().run_node(n)

    def _cos_sin(self, n: fx.Node) -> Tensor:
        """Cosines or sines, both computed once: inlined in the kernels of every layer that reads them they take longer."""
        (angles,), _ = self.fetch_args_kwargs_from_env(n)
        if n.args[0] not in self._turned:
            self._turned[n.args[0]] = on_cuda.cos_sin(angles)
        return self._turned[n.args[0]][n.target is aten.sin.default]

    def _attention(self, n: fx.Node) -> Any:
        arguments: Any
        caches: list[Any]
        arguments, named = self.fetch_args_kwargs_from_env(n)
        q, k, v, *rest = arguments
        grown = isinstance(k, on_cuda.Appended) and isinstance(v, on_cuda.Appended)
        if grown and on_cuda.has_kernel(q, k.past, v.past):
            out, *caches = on_cuda.attention_appending(q, k, v, *rest, **named)
        else:
            if isinstance(k, on_cuda.Buffered) and isinstance(v, on_cuda.Buffered):
                named = {**named, "start": k.past}
                k, v = on_cuda.append_in_place(k, v)
            caches = [part.whole() if isinstance(part, on_cuda.Appended | on_cuda.Buffered) else part for part in (k, v)]
            out = self.owner.spelt[n.target](q, *caches, *rest, **named)
        for node, cache in zip(n.args[1:3], caches, strict=True):
            self.env[cast("fx.Node", node)] = cache  # where it is an output, it is that
        return out

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ours in ATen, ATen as it is."""
        if target is torch.ops.surgeon.moe.default:
            if self.owner.kernels and self.owner.experts == "auto":
                return products.experts(self.owner.used, *args, **kwargs)
            unpacked: Any = tuple(arg.dequantize() if isinstance(arg, QuantizedTensor) else arg for arg in args)
            return _experts(self.owner, *unpacked, **kwargs)
        if target is aten.linear.default and isinstance(args[1], QuantizedTensor):
            return products.linear(*args, **kwargs)
        if target is aten.topk.default and self.owner.kernels and on_cuda.few_of_row(*args[:4], **kwargs):
            return on_cuda.top_k(args[0], args[1])
        if target in (aten.matmul.default, aten.bmm.default) and self.owner.kernels and on_cuda.is_outer(*args):
            return args[0] * args[1]
        if target in self.owner.spelt:
            return self.owner.spelt[target](*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _experts(
    owner: Decomposed,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    form = owner.experts
    owner.used[f"experts {form}"] += 1
    operands = [x, index, weight, w_in, w_out, b_in, b_out]

    def spelt(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: function(*given, activation)

    if form != "auto":
        return spelt({"grouped": moe_grouped, "gathered": moe_gathered, "dense": moe_dense}[form])(*operands)
    few: Any = index.shape[0] * index.shape[1] <= w_in.shape[0]  # a torch.SymBool where the number of tokens is dynamic
    result: Tensor = on_cuda.either(few, spelt(moe_gathered), spelt(moe_dense), operands)
    return result


def placed(graph: Graph, device: str) -> Graph:
    """A copy of the graph that computes on another device: its tensors are copied there, and new ones are made there.

    They are contiguous there, as kernels read them: a model may hold stacks of experts transposed.
    """
    copy = graph.clone()
    for node in copy.module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device(device)}
    copy.module.recompile()
    moved: dict[Tensor, Tensor] = {}  # tensors under several names stay one
    named = (copy.module.named_parameters, copy.module.named_buffers)
    for name, tensor in [entry for each in named for entry in each(remove_duplicate=False)]:
        assign_tensor(copy.module, name, moved.setdefault(tensor, tensor.detach().to(device).contiguous()))
    return copy
