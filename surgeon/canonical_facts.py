"""What :mod:`surgeon.canonical` reads off calls, nodes and tensors of an exported program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from surgeon.canonical_rules import kernel_of_one
from surgeon.errors import TraceError

FOLD_LIMIT = 4096
"""Largest number of elements of a folded constant; larger ones are cheaper to compute than to keep."""


def bound(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by their schema name, defaults filled in."""
    given: dict[str, Any] = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(args):
            given[argument.name] = args[index]
        elif argument.name in kwargs:
            given[argument.name] = kwargs[argument.name]
        else:
            given[argument.name] = argument.default_value
    return given


def unbound(target: torch._ops.OpOverload, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The shortest spelling of these arguments: defaults left out where nothing follows them."""
    positional, keywords = [], {}
    for argument in target._schema.arguments:
        value = given[argument.name]
        default = _is_default(argument, value)
        if argument.kwarg_only:
            if not default:
                keywords[argument.name] = value
        else:
            positional.append((value, default))
    while positional and positional[-1][1]:
        positional.pop()
    return tuple(value for value, _ in positional), keywords


def _is_default(argument: Any, value: Any) -> bool:
    if argument.name in ("layout", "pin_memory", "memory_format", "non_blocking"):
        return value in (None, False, torch.strided, torch.contiguous_format, torch.preserve_format)
    if isinstance(value, fx.Node) or not argument.has_default_value():
        return False
    default = argument.default_value
    return type(value) is type(default) and bool(value == default)


def merge_key(value: Any) -> Any:
    """A hashable form in which 1, 1.0 and True differ."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, tuple | list):
        return tuple(merge_key(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((name, merge_key(item)) for name, item in value.items()))
    return type(value).__name__, repr(value)


def is_random(target: Any) -> bool:
    """Whether two calls with equal arguments may differ (attention carries the tag for its dropout, which is off)."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
        and target._schema.name != "aten::scaled_dot_product_attention"
    )


def is_port(node: fx.Node) -> bool:
    """All that dead-code elimination must keep; by default it would keep unread attention, as a random operator."""
    return node.op in ("placeholder", "output")


def is_foldable(node: fx.Node) -> bool:
    """Whether a node computed from constants becomes one (rule 10)."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and is_static(value) and value.numel() <= FOLD_LIMIT and not is_random(node.target)


def is_static(value: Tensor) -> bool:
    """Whether no dimension is dynamic."""
    return all(isinstance(size, int) for size in value.shape)


def tensor_of(root: torch.nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a dotted name."""
    owner: Any = root
    for part in name.split("."):
        owner = getattr(owner, part)
    tensor: Tensor = owner
    return tensor


def identity_of(tensor: Tensor) -> Any:
    """Equal for two views of the same elements in the same order."""
    place = (tensor.untyped_storage()._cdata, tensor.storage_offset())
    return (*place, tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else id(tensor)


def matrices(exported: fx.GraphModule) -> set[Any]:
    """Rule 14: the tensors that only convolutions with a kernel of one position read."""
    found: set[Any] = set()
    others: set[Any] = set()
    for node in exported.graph.nodes:
        tensor = tensor_of(exported, str(node.target)) if node.op == "get_attr" else None
        if isinstance(tensor, Tensor) and tensor.dim() > 2:
            only = all(kernel_of_one(user) is node for user in node.users)
            (found if only else others).add(identity_of(tensor))
    return found - others


def as_matrix(tensor: Tensor) -> Tensor:
    """[out, in, 1 ...] as [out, in], over the same memory; a parameter stays one."""
    matrix = tensor.detach().flatten(1)
    return torch.nn.Parameter(matrix, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else matrix


def is_unbacked(value: Any) -> bool:
    """Whether a value's size is known only when the graph runs."""
    if isinstance(value, tuple | list):
        return any(is_unbacked(item) for item in value)
    return isinstance(value, Tensor | torch.SymInt) and bool(free_unbacked_symbols(value))


def is_complex(value: Any) -> bool:
    """Whether a value is complex: torch's shape rules for complex operators would fix dynamic sizes."""
    return isinstance(value, Tensor) and value.is_complex()


def as_written(node: fx.Node) -> str:
    """The parameters and buffers among the inputs of a node, for a message."""
    names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    return f"({', '.join(names)})" if names else ""


def fake_mode(exported: fx.GraphModule) -> FakeTensorMode:
    """The mode that made the values of an exported graph.

    Raises:
        TraceError: none of them is a tensor.
    """
    for node in exported.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise TraceError("the exported graph has no tensor inputs")
