"""From an exported program to the canonical graph: functional, guard-free, flat, with sizes read from the inputs only.

The exported graph is rebuilt node by node, in order.  Every node passes the rules below and is either dropped (the
identity), replaced, merged with an equal node that is already there, or appended with its fake value.

Rules, with x the input and y the output of a node:

1. assertions and constraints: dropped; the ports carry the ranges instead.
2. y = x (clone, contiguous, detach, alias, dropout outside training, cast to the same type): y is x.
3. view, _unsafe_view: reshape, because rule 2 changes strides; a reshape of a reshape is one.
4. slice, expand, reshape, permute ... whose y has the shape and element order of x: y is x.
5. copy(d, s): s cast and expanded to d; ``aten.copy`` has no derivative.
6. x + 0, x * 1, x / 1, ``true & x`` where type and shape stay: y is x.
7. new_ones(x, ...), zeros_like(x) ...: full(...), which reads no activation.
8. every SymInt: an expression of ``sym_size(input, dim)``.  A size that is read from an activation would keep the block
   that made the activation alive after the block is dropped.
9. equal operator, arguments and inputs: one node (common subexpressions); random operators excepted.
10. small tensors computed from no input and no parameter (slopes, relative positions): a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]  # ships no stubs
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from surgeon.errors import TraceError
from surgeon.graph import assign_tensor

aten = torch.ops.aten

_ASSERTIONS = {
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::_functional_assert_async",
    "aten::_functional_assert_scalar",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
    "aten::_functional_sym_constrain_range",
    "aten::_functional_sym_constrain_range_for_size",
}
_IDENTITIES = {
    "aten::clone",
    "aten::contiguous",
    "aten::detach",
    "aten::detach_",
    "aten::alias",
    "aten::lift",
    "aten::lift_fresh",
    "aten::lift_fresh_copy",
    "aten::positive",
}
_CASTS = {"aten::_to_copy", "aten::to", "aten::type_as"}
_DROPOUTS = {"aten::dropout", "aten::feature_dropout"}
_VIEWS = {"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::view_as", "aten::reshape_as"}
_SAME_ORDER = {"aten::slice", "aten::expand", "aten::expand_as", "aten::squeeze", "aten::narrow"}
_FILLS: dict[str, float | None] = {
    "aten::new_ones": 1,
    "aten::new_zeros": 0,
    "aten::new_full": None,
    "aten::ones_like": 1,
    "aten::zeros_like": 0,
    "aten::full_like": None,
    "aten::ones": 1,
    "aten::zeros": 0,
}
_NEUTRAL = {"aten::add": 0, "aten::sub": 0, "aten::mul": 1, "aten::div": 1}
_CONJUNCTIONS = {"aten::__and__", "aten::bitwise_and", "aten::logical_and"}


def canonicalise(
    exported: fx.GraphModule, inputs: Sequence[str], tensors: Mapping[str, Tensor] | None = None
) -> fx.GraphModule:
    """Rebuild an exported, functionalised module as a canonical one.

    Args:
        exported: ``ExportedProgram.module(check_guards=False)`` after ``run_decompositions({})``.
        inputs: names of the inputs, in order; every one becomes a placeholder, read or not.
        tensors: the source model's tensors; one that has several names (tied) is read under the first one here.

    Returns:
        A flat module over the same tensors, ``meta["val"]`` on every node, all in one fake mode.

    Raises:
        TraceError: the graph writes into a tensor, holds nested graphs, or needs a size no input gives.
    """
    return _Builder(exported, tensors or {}).build(inputs)


class _Builder:
    """State of one rebuild: the new graph, what each old node became, and what exists already."""

    def __init__(self, exported: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
        self.exported = exported
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.mode = _fake_mode(exported)
        self.known: dict[Any, fx.Node] = {}  # rule 9
        self.became: dict[fx.Node, Any] = {}
        self.roots: dict[sympy.Symbol, tuple[fx.Node, int]] = {}  # rule 8
        self.sizes: dict[sympy.Expr, Any] = {}
        self.tensors: dict[Any, str] = {}
        for name, tensor in tensors.items():
            self.tensors.setdefault(_identity_of(tensor), name)

    def build(self, inputs: Sequence[str]) -> fx.GraphModule:
        old = list(self.exported.graph.nodes)
        placeholders = {str(node.target): node for node in old if node.op == "placeholder"}
        for name in inputs:
            node = self.graph.placeholder(name)
            node.meta["val"] = placeholders[name].meta["val"]
            self.became[placeholders[name]] = node
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    self.roots.setdefault(size.node.expr, (node, dim))
        for node in old:
            if node.op == "call_function":
                self._visit(node)
            elif node.op == "output":
                self._output(node)
        self._sweep()
        self._fold()
        module = fx.GraphModule(self.root, self.graph)
        module.graph.lint()
        return module

    # -- nodes --------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        value, target = node.meta.get("val"), node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.name in _ASSERTIONS:
            return  # Rule 1
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) and not free_unbacked_symbols(value):
            return  # Rule 8: made again where it is read
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise TraceError(
                f"node {node.name} calls {target}: the model's control flow depends on data (a loop, a branch or a "
                "nested graph), and the canonical graph is flat; make that part of the model free of control flow"
            )
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._read)
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable:
                raise TraceError(
                    f"node {node.name} = {target} writes into a tensor {_written(node)}; the canonical graph is "
                    "functional: put the model in a state in which its forward changes no buffer (evaluation mode, no caches)"
                )
            self.became[node] = self._apply(target, args, kwargs, node)
        else:
            self.became[node] = self._emit(target, tuple(args), dict(kwargs), keep=_unbacked(value))

    def _read(self, node: fx.Node) -> Any:
        """The new form of an old node where it is an argument."""
        if node in self.became:
            return self.became[node]
        if node.op == "get_attr":
            return self._tensor(str(node.target))
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self._size(value)
        if isinstance(value, int | float | bool):
            return value
        raise TraceError(f"node {node.name} = {node.target} has no tensor value and is read by another node")

    def _output(self, node: fx.Node) -> None:
        results = node.args[0]
        if isinstance(results, fx.Node):
            results = (results,)
        if not isinstance(results, tuple | list):
            raise TraceError(f"the exported graph returns {results!r} instead of a tuple of tensors")
        self.graph.output(tuple(fx.node.map_arg(tuple(results), self._read)))

    def _apply(self, target: torch._ops.OpOverload, args: Any, kwargs: Any, old: fx.Node | None = None) -> Any:
        """Append ``target`` after the rules; returns the node that stands for its result."""
        given = _bind(target, args, kwargs)
        name = target._schema.name
        rule = _RULES.get(name)
        if rule is not None:
            found = rule(self, given, old)
            if found is not None:
                return found
        args, kwargs = _unbind(target, given)
        return self._emit(target, args, kwargs, keep=old is not None and _unbacked(old.meta.get("val")), old=old)

    def _emit(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], keep: bool = False, old: fx.Node | None = None
    ) -> fx.Node:
        """Append a call unless an equal one exists (rule 9), and evaluate it in the fake mode."""
        key = (target, _key(args), _key(kwargs))
        if key in self.known:
            return self.known[key]
        node = self.graph.call_function(target, args, kwargs)
        if keep and old is not None:
            node.meta["val"] = old.meta["val"]
        else:
            values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.mode, torch.no_grad():
                node.meta["val"] = target(*values[0], **values[1])
        if not _random(target):
            self.known[key] = node
        return node

    # -- tensors and sizes --------------------------------------------------------------------------------------

    def _tensor(self, name: str) -> fx.Node:
        """Read a tensor of the exported module next to its first user; tied tensors under one name."""
        owner: Any = self.exported
        for part in name.split("."):
            owner = getattr(owner, part)
        if not isinstance(owner, Tensor):
            raise TraceError(f"the exported graph reads {name!r}, a {type(owner).__name__}; only tensors can be read")
        name = self.tensors.setdefault(_identity_of(owner), name)
        if ("get_attr", name) not in self.known:
            self.known["get_attr", name] = self._read_tensor(name, owner)
        return self.known["get_attr", name]

    def _read_tensor(self, name: str, tensor: Tensor) -> fx.Node:
        assign_tensor(self.root, name, tensor)
        node = self.graph.get_attr(name)
        with self.mode:
            node.meta["val"] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
        return node

    def _size(self, value: Any) -> Any:
        """A size as a number, or as nodes over ``sym_size`` of the inputs (rule 8)."""
        if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return value
        expression = value.node.expr
        if expression not in self.sizes:
            self.sizes[expression] = self._expression(expression)
        return self.sizes[expression]

    def _expression(self, expression: Any) -> Any:
        if expression.is_Integer:
            return int(expression)
        if expression.is_Float or expression.is_Rational:
            return float(expression)
        if expression in (sympy.true, sympy.false):
            return bool(expression)
        free = expression.free_symbols
        unknown = sorted(str(symbol) for symbol in free if symbol not in self.roots)
        if unknown:
            raise TraceError(
                f"a size of the graph is {expression}, and no input has {', '.join(unknown)} as a dimension of its "
                "own; fix the dimensions it comes from (dynamic={input: None})"
            )
        if isinstance(expression, sympy.Symbol):
            node, dim = self.roots[expression]
            return self._emit(aten.sym_size.int, (node, dim), {})
        parts = {symbol: self._proxy(self._size_of(symbol)) for symbol in sorted(free, key=str)}
        result = sympy_interp(PythonReferenceAnalysis, parts, expression)
        return self._adopt(result.node)

    def _size_of(self, symbol: sympy.Symbol) -> fx.Node:
        if symbol not in self.sizes:
            self.sizes[symbol] = self._expression(symbol)
        node: fx.Node = self.sizes[symbol]
        return node

    def _proxy(self, node: fx.Node) -> fx.Proxy:
        return fx.Proxy(node, fx.proxy.GraphAppendingTracer(self.graph))

    def _adopt(self, node: fx.Node) -> fx.Node:
        """Give values to the nodes that sympy's interpreter appended."""
        for source in node.all_input_nodes:
            if "val" not in source.meta:
                self._adopt(source)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]  # an arithmetic function
        return node

    def _sweep(self) -> None:
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))

    def _fold(self) -> None:
        """Rule 10.  What a parameter enters stays, because it can be trained or replaced."""
        values: dict[fx.Node, Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                tensor = _get(self.root, str(node.target))
                if not isinstance(tensor, torch.nn.Parameter):
                    values[node] = tensor
            elif node.op == "call_function" and _foldable(node) and all(n in values for n in node.all_input_nodes):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                with torch.no_grad():
                    values[node] = node.target(*args, **kwargs)
        count = 0
        for node in list(values):
            computed = node.op == "call_function" and node.all_input_nodes
            if computed and any(user not in values for user in node.users):
                with self.graph.inserting_before(node):
                    buffer = self._read_tensor(f"constant_{count}", values[node].contiguous())
                node.replace_all_uses_with(buffer)
                count += 1
        if count:
            self._sweep()

    def sizes_of(self, value: Tensor) -> list[Any]:
        """The shape of a fake tensor as numbers and nodes."""
        return [self._size(size) for size in value.shape]


# -- rules ------------------------------------------------------------------------------------------------------------

_Rule = Callable[[_Builder, dict[str, Any], fx.Node | None], Any]


def _identity(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
    return next(iter(given.values()))  # Rule 2


def _cast(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
    x, result = given["self"], _result(old)
    source = x.meta["val"]
    if source.device != result.device:
        return build._emit(aten._to_copy.default, (x,), {"dtype": result.dtype, "device": result.device})
    if source.dtype == result.dtype:
        return x  # Rule 2
    return build._emit(aten._to_copy.default, (x,), {"dtype": result.dtype})


def _dropout(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
    inactive = given["train"] is False or given["p"] == 0
    return given["input"] if inactive else None  # Rule 2


def _reshape(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
    if "dtype" in given:
        return None  # a reinterpretation of bits
    x = given["self"]
    if x.target == aten.reshape.default:
        x = x.args[0]  # Rule 3
    if _same_shape(x.meta["val"], _result(old)):
        return x  # Rule 4
    sizes = given.get("size", given.get("shape"))
    return build._emit(
        aten.reshape.default, (x, build.sizes_of(_result(old)) if sizes is None else sizes), {}
    )  # Rule 3


def _same_order(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
    x = given["self"]
    if _same_shape(x.meta["val"], _result(old)) and given.get("step", 1) == 1:
        return x  # Rule 4
    if given.get("end") == _INFINITY:
        given["end"] = None
    return None


def _permute(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
    rank = given["self"].meta["val"].dim()
    return given["self"] if [d % rank for d in given["dims"]] == list(range(rank)) else None  # Rule 4


def _copy(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
    target, source = given["self"].meta["val"], given["src"]
    if source.meta["val"].dtype != target.dtype:
        source = build._emit(aten._to_copy.default, (source,), {"dtype": target.dtype})
    if _same_shape(source.meta["val"], target):
        return source
    return build._emit(aten.expand.default, (source, build.sizes_of(target)), {})  # Rule 5


def _neutral(number: int) -> _Rule:
    def rule(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
        if "self" not in given or "other" not in given or not isinstance(given["self"], fx.Node):
            return None
        other, rounding = given["other"], given.get("rounding_mode")
        if isinstance(other, int | float) and other == number and rounding is None:
            x, result = given["self"].meta["val"], _result(old)
            if isinstance(x, Tensor) and x.dtype == result.dtype and _same_shape(x, result):
                return given["self"]  # Rule 6
        return None

    return rule


def _conjunction(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
    result = _result(old)
    pair = (given["self"], given["other"])
    for true, x in (pair, pair[::-1]):
        if not isinstance(true, fx.Node) or not isinstance(x, fx.Node) or true.target != aten.full.default:
            continue
        value = x.meta["val"]
        if true.args[1] is True and value.dtype == torch.bool == result.dtype and _same_shape(value, result):
            return x  # Rule 6
    return None


def _fill(number: float | None) -> _Rule:
    def rule(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
        result = _result(old)
        value = given["fill_value"] if number is None else number
        if result.dtype == torch.bool and not isinstance(value, fx.Node):
            value = bool(value)
        elif result.dtype.is_floating_point and not isinstance(value, fx.Node):
            value = float(value)
        settings = {"dtype": result.dtype, "device": result.device}
        return build._emit(aten.full.default, (build.sizes_of(result), value), settings)  # Rule 7

    return rule


def _strided(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
    """``as_strided`` counts elements in memory: make the memory what it was (an exception from rule 2)."""
    before = old.all_input_nodes[0].meta["val"] if old is not None else None
    if before is None or not before.is_contiguous():
        raise TraceError(
            "the model reads a tensor that is not contiguous by as_strided; call contiguous() on it before"
        )
    given["self"] = build._emit(aten.clone.default, (given["self"],), {"memory_format": torch.contiguous_format})
    return None


def _concatenate(build: _Builder, given: dict[str, Any], old: fx.Node | None) -> Any:
    return given["tensors"][0] if len(given["tensors"]) == 1 else None


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_IDENTITIES, _identity),
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_DROPOUTS, _dropout),
    **dict.fromkeys(_VIEWS, _reshape),
    **dict.fromkeys(_SAME_ORDER, _same_order),
    **{name: _neutral(number) for name, number in _NEUTRAL.items()},
    **{name: _fill(number) for name, number in _FILLS.items()},
    **dict.fromkeys(_CONJUNCTIONS, _conjunction),
    "aten::permute": _permute,
    "aten::copy": _copy,
    "aten::cat": _concatenate,
    "aten::as_strided": _strided,
}
_INFINITY = 9223372036854775807
_FOLD_LIMIT = 4096


# -- small facts ------------------------------------------------------------------------------------------------------


def _bind(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
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


def _unbind(target: torch._ops.OpOverload, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def _key(value: Any) -> Any:
    """A hashable form in which 1, 1.0 and True differ."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, tuple | list):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((name, _key(item)) for name, item in value.items()))
    return type(value).__name__, repr(value)


def _random(target: Any) -> bool:
    """Whether two calls with equal arguments may differ (attention carries the tag for its dropout, which is off)."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
        and target._schema.name != "aten::scaled_dot_product_attention"
    )


def _foldable(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and _static(value) and value.numel() <= _FOLD_LIMIT and not _random(node.target)


def _static(value: Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape)


def _get(root: torch.nn.Module, name: str) -> Tensor:
    owner: Any = root
    for part in name.split("."):
        owner = getattr(owner, part)
    tensor: Tensor = owner
    return tensor


def _identity_of(tensor: Tensor) -> Any:
    """Equal for two views of the same elements in the same order."""
    place = (tensor.untyped_storage()._cdata, tensor.storage_offset())
    return (*place, tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else id(tensor)


def _result(old: fx.Node | None) -> Tensor:
    if old is None:
        raise AssertionError("a rule that reads the result's shape was applied to a node without one")
    value: Tensor = old.meta["val"]
    return value


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() and all(_expr(m) == _expr(n) for m, n in zip(a.shape, b.shape, strict=True))


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _unbacked(value: Any) -> bool:
    """Whether a value's size is known only when the graph runs."""
    if isinstance(value, tuple | list):
        return any(_unbacked(item) for item in value)
    return isinstance(value, Tensor | torch.SymInt) and bool(free_unbacked_symbols(value))


def _written(node: fx.Node) -> str:
    names = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    return f"({', '.join(names)})" if names else ""


def _fake_mode(exported: fx.GraphModule) -> FakeTensorMode:
    for node in exported.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise TraceError("the exported graph has no tensor inputs")
