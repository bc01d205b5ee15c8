"""Trace the experts of ``transformers`` models as one ``surgeon::moe`` node per layer.

``transformers`` routes the experts of its models through an interface of exchangeable implementations (``grouped_mm``,
``batched_mm``, ...).  :func:`use_semantic_experts` adds an implementation that calls our operator, for the modules
whose arithmetic our operator reproduces.  That is decided by evaluation, not by class or parameter names: tiny random
weights are put in place of the module's own, the library's implementation is run on them, and the operator is run on
the same weights under every assignment of roles and layouts that the shapes allow and every known activation.  Where
none fits, the constants of a clamped or shifted gate are read off its values (:mod:`surgeon.gates`).  Gates with learned
parts, norms after an expert and the like match nothing and are left alone, with the reason.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgeon.activations import ACTIVATIONS
from surgeon.gates import recognise_alone, recognise_gate
from surgeon.ops import moe

_NAME = "surgeon"
_REFERENCE = "batched_mm"  # the library's own implementation without data-dependent control flow: what we compare with
_EXPORTABLE = ("grouped_mm", "batched_mm")


@dataclass(frozen=True)
class _Roles:
    """Which parameter of an experts module plays which part, and how it is laid out.

    Attributes:
        w_in: name of the first matrix: [E, O, H], or [E, H, O] where ``transposed``.
        w_out: name of the second matrix: [E, G, I], or [E, I, G] where ``transposed``.
        b_in: name of the first bias [E, O], or None.
        b_out: name of the second bias [E, G], or None.
        gated: O = 2 I rather than I.
        transposed: whether the matrices are stored input-major.
        interleaved: whether gate and up rows alternate rather than follow each other; only where ``gated``.
        activation: name of a gate.
    """

    w_in: str
    w_out: str
    b_in: str | None
    b_out: str | None
    gated: bool
    transposed: bool
    interleaved: bool = False
    activation: str = "identity"

    def names(self) -> list[str]:
        """The parameters that play a part."""
        return [name for name in (self.w_in, self.w_out, self.b_in, self.b_out) if name is not None]

    def run(self, parameters: Mapping[str, Tensor], x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Call ``surgeon::moe`` with the parameters in its own layout: x [T, H], index and weight [T, k] -> [T, G]."""
        w_in, w_out = parameters[self.w_in], parameters[self.w_out]
        b_in = None if self.b_in is None else parameters[self.b_in]
        b_out = None if self.b_out is None else parameters[self.b_out]
        if self.transposed:
            w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
        if self.interleaved:
            w_in = torch.cat([w_in[:, 0::2], w_in[:, 1::2]], dim=1)
            b_in = None if b_in is None else torch.cat([b_in[:, 0::2], b_in[:, 1::2]], dim=1)
        y: Tensor = moe(x.to(w_in.dtype), index, weight, w_in, w_out, b_in, b_out, self.activation)
        return y.to(x.dtype)


_ROLES: WeakKeyDictionary[nn.Module, _Roles] = WeakKeyDictionary()
_FALLBACK: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@contextmanager
def use_semantic_experts(model: nn.Module) -> Iterator[list[str]]:
    """Inside the block, every experts module whose arithmetic ``surgeon::moe`` reproduces calls it.

    The other experts modules run on the library's ``grouped_mm`` (or ``batched_mm`` where the model was set to it),
    which can be exported.  On leaving, the model is as it was.  Weights are not read: they may be fake tensors.

    Args:
        model: any module; nothing happens to one without such experts.

    Yields:
        One sentence for each experts module that was left alone, naming it and saying why; empty if all were switched.

    Example:
        >>> with use_semantic_experts(model) as left_alone, torch.no_grad():
        ...     exported = torch.export.export(model, (), {"input_ids": ids}, strict=False)
    """
    experts = _experts_modules(model)
    if not experts:
        yield []
        return
    interface = _interface()
    interface.register(_NAME, _forward)
    reasons: list[str] = []
    configs: dict[int, tuple[Any, str | None]] = {}
    try:
        for name, module in experts.items():
            config: Any = module.config
            previous: str | None = config._experts_implementation
            configs.setdefault(id(config), (config, previous))
            roles = _recognise(module)
            if isinstance(roles, str):
                reasons.append(f"{name or type(model).__name__}: {roles}")
                _FALLBACK[module] = previous if previous in _EXPORTABLE else _EXPORTABLE[0]
            else:
                _ROLES[module] = roles
        for config, _ in configs.values():
            config._experts_implementation = {"": _NAME}  # the form of the setter that leaves nested configs alone
        yield reasons
    finally:
        for config, previous in configs.values():
            config._experts_implementation = {"": previous}
        for module in experts.values():
            _ROLES.pop(module, None)
            _FALLBACK.pop(module, None)


def _interface() -> Any:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


def _experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that dispatch through the experts interface; they carry its layout flags and the config it reads."""
    if "transformers" not in sys.modules:  # then no module of that library exists either
        return {}
    flags = ("has_gate", "is_transposed", "config")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, flag) for flag in flags)}


def _forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The implementation that is registered with the interface: x [T, H], index and weight [T, k] -> [T, H]."""
    if module in _FALLBACK:
        out: Tensor = _interface()[_FALLBACK[module]](module, hidden_states, top_k_index, top_k_weights)
        return out
    parameters = dict(module.named_parameters(recurse=False))
    return _ROLES[module].run(parameters, hidden_states, top_k_index, top_k_weights)


def _recognise(module: nn.Module) -> _Roles | str:
    """The roles under which our operator equals the module, or the reason why there are none."""
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over devices (expert parallelism), which the operator does not describe"
    candidates = _candidates(module)
    if isinstance(candidates, str):
        return candidates
    broken = []
    reference = _Reference(module)
    for roles in candidates:
        parameters, x, index, weight = _probe(roles)
        try:
            expected = torch.func.functional_call(reference, parameters, (x, index, weight))
        except (RuntimeError, IndexError) as error:  # a wrong assignment of roles: its shapes do not multiply
            broken.append(str(error).splitlines()[0])
            continue
        own = {name.removeprefix("experts."): tensor for name, tensor in parameters.items()}
        for interleaved in (False, True) if roles.gated else (False,):
            layout = replace(roles, interleaved=interleaved)
            for name in itertools.chain(ACTIVATIONS, _constants(reference, layout)):
                found = replace(layout, activation=name)
                difference = (found.run(own, x, index, weight) - expected).abs() / (1 + expected.abs())
                if bool((difference <= 1e-6).all()):
                    return found
    if len(broken) == len(candidates):
        return (
            f"it holds more than matrices and an activation, {_REFERENCE} fails on weights of another size: {broken[0]}"
        )
    return (
        "on random weights it equals act(gate) * up, or act, between two matrices for no known activation "
        f"({', '.join(ACTIVATIONS)}), clamped and shifted gates included: its gate is its own, or a norm follows"
    )


def _candidates(module: nn.Module) -> list[_Roles] | str:
    """Every assignment of the module's parameters to roles that their shapes allow, or why there is none."""
    parameters = dict(module.named_parameters())
    own = dict(module.named_parameters(recurse=False))
    matrices = [name for name, p in own.items() if p.dim() == 3]
    biases = [name for name, p in own.items() if p.dim() == 2]
    if len(matrices) != 2 or len(parameters) != len(matrices) + len(biases) or len(biases) > 2:
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in parameters.items())
        return f"needs two matrices [E, ., .] and at most two biases [E, .], and nothing else; it holds {shapes}"
    found = []
    padded: list[str | None] = [*biases, None, None]
    pairs = dict.fromkeys(pair for pair in itertools.permutations(padded, 2) if set(biases) <= set(pair))
    for (a, b), transposed, gated, (b_in, b_out) in itertools.product(
        itertools.permutations(matrices), (False, True), (True, False), pairs
    ):
        first, second = ((p.transpose(1, 2) if transposed else p) for p in (own[a], own[b]))
        inner = second.shape[2] * (2 if gated else 1)
        if first.shape[0] != second.shape[0] or first.shape[1] != inner or first.shape[2] != second.shape[1]:
            continue
        if b_in is not None and own[b_in].shape != first.shape[:2]:
            continue
        if b_out is not None and own[b_out].shape != second.shape[:2]:
            continue
        found.append(_Roles(a, b, b_in, b_out, gated, transposed))
    shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in own.items())
    return found or f"no two of its parameters fit as [E, O, H] and [E, H, I] with O = I or 2 I: {shapes}"


class _Reference(nn.Module):
    """The library's own arithmetic of an experts module as a module, so that weights can be substituted."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = _interface()[_REFERENCE](self.experts, x, index, weight)
        return y


def _constants(reference: _Reference, roles: _Roles) -> Iterator[str]:
    """The gate with constants that the module computes, as a name, if there is one."""

    def function(g: Tensor, u: Tensor) -> Tensor:
        # Token n is the n-th unit vector and column n of the first matrix holds (g_n, u_n), so that neuron 0 of token n
        # sees exactly these; the second matrix writes that neuron to feature 0.
        count = g.numel()
        own = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in _shapes(roles, 2, count, 2).items()}
        first, second = (own[name].mT if roles.transposed else own[name] for name in (roles.w_in, roles.w_out))
        first[:, 0] = g
        if roles.gated:
            first[:, 1 if roles.interleaved else 2] = u
        second[:, 0, 0] = 1.0
        index, weight = torch.zeros(count, 1, dtype=torch.int64), torch.ones(count, 1, dtype=torch.float64)
        arguments = (torch.eye(count, dtype=torch.float64), index, weight)
        parameters = {f"experts.{name}": tensor for name, tensor in own.items()}
        y: Tensor = torch.func.functional_call(reference, parameters, arguments)
        return y[:, 0]

    with torch.no_grad():
        found = recognise_gate(function) if roles.gated else recognise_alone(lambda g: function(g, g))
    if found is not None:
        yield found.name


def _shapes(roles: _Roles, experts: int, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the module's parameters at other sizes."""
    rows = 2 * inner if roles.gated else inner
    shapes: dict[str, tuple[int, ...]] = {roles.w_in: (experts, rows, width), roles.w_out: (experts, width, inner)}
    if roles.transposed:
        shapes = {name: (shape[0], shape[2], shape[1]) for name, shape in shapes.items()}
    if roles.b_in is not None:
        shapes[roles.b_in] = (experts, rows)
    if roles.b_out is not None:
        shapes[roles.b_out] = (experts, width)
    return shapes


def _probe(roles: _Roles) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Random weights of a tiny size that no two dimensions share, and tokens that reach far beyond any usual clamp.

    Returns:
        the parameters by their name in :class:`_Reference`, x [T, 5], index and weight [T, 2]; all float64.
    """
    experts, width, inner, tokens = 4, 5, 3, 48
    shapes = _shapes(roles, experts, width, inner)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reach = torch.tensor([0.5, 2.0, 10.0, 60.0], dtype=torch.float64).repeat(tokens // 4)
    index = torch.randint(0, experts, (tokens, 2), generator=generator)
    parameters = {f"experts.{name}": normal(*shapes[name]) for name in roles.names()}
    return parameters, normal(tokens, width) * reach[:, None], index, normal(tokens, 2)
