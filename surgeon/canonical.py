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
11. glu(x): a sigmoid(b) of its halves [a | b].
12. chunk, narrow, expand_as, mT ...: the operator that they are defined by.
13. op_(x), a write into a tensor of which no view is read afterwards: op(x), which x is from there on.  A write into rows of x:
    x with the new rows scattered into it.
14. a convolution with a kernel of one position: a linear over the channels, between permutations.  Its weight, where nothing
    else reads it, becomes the matrix [out, in] over the same memory.
15. a split of a concatenation where its pieces meet: the pieces.
16. a linear's weight or a table that is computed from stored tensors: a stored tensor (:mod:`surgeon.canonical_weights`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import sympy  # type: ignore[import-untyped]  # ships no stubs
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from surgeon.canonical_facts import (
    as_matrix,
    as_written,
    bound,
    fake_mode,
    identity_of,
    is_complex,
    is_foldable,
    is_port,
    is_random,
    is_unbacked,
    matrices,
    merge_key,
    tensor_of,
    unbound,
)
from surgeon.canonical_rules import RULES
from surgeon.canonical_weights import computed_weights, evaluate, name_of, reader_of
from surgeon.errors import TraceError
from surgeon.functional import SCATTERS, Aliases, in_place_form
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


def canonicalise(
    exported: fx.GraphModule, inputs: Sequence[str], tensors: Mapping[str, Tensor] | None = None
) -> fx.GraphModule:
    """Rebuild an exported, functionalised module as a canonical one.

    Args:
        exported: ``ExportedProgram.module(check_guards=False)``, after ``run_decompositions({})`` unless
            :func:`surgeon.functional.is_functional`.
        inputs: names of the inputs, in order; every one becomes a placeholder, read or not.
        tensors: the source model's tensors; one that has several names (tied) is read under the first one here.

    Returns:
        A flat module over the same tensors, ``meta["val"]`` on every node, all in one fake mode.

    Raises:
        TraceError: the graph writes into a tensor, holds nested graphs, or needs a size no input gives.
    """
    return _Builder(exported, tensors or {}).build(inputs)


class _Arithmetic(PythonReferenceAnalysis):
    """Arithmetic of sizes as nodes of a graph; Python's own rounding would ask a node for its value."""

    @staticmethod
    def floor_to_int(x: Any, dtype: Any) -> Any:
        """Largest integer below."""
        return _call(math.floor, x)

    @staticmethod
    def ceil_to_int(x: Any, dtype: Any) -> Any:
        """Smallest integer above."""
        return _call(math.ceil, x)


def _call(function: Any, x: Any) -> Any:
    return x.tracer.create_proxy("call_function", function, (x,), {}) if isinstance(x, fx.Proxy) else function(x)


class _Builder:
    """State of one rebuild: the new graph, what each old node became, and what exists already."""

    def __init__(self, exported: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
        self.exported = exported
        self.graph = fx.Graph()
        self.tracer = fx.proxy.GraphAppendingTracer(self.graph)  # one for all: torch.sym_max refuses proxies of several
        self.root = torch.nn.Module()
        self.mode = fake_mode(exported)
        self.known: dict[Any, fx.Node] = {}  # rule 9
        self.became: dict[fx.Node, Any] = {}
        self.written: dict[fx.Node, list[fx.Node]] = {}  # rule 13: all names of a tensor that was written into
        self.aliases = Aliases(exported.graph)
        self.roots: dict[sympy.Symbol, tuple[fx.Node, int]] = {}  # rule 8
        self.sizes: dict[sympy.Expr, Any] = {}
        self.tensors: dict[Any, str] = {}
        self.matrices = matrices(exported)  # rule 14
        for name, tensor in tensors.items():
            self.tensors.setdefault(identity_of(tensor), name)

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
        self.graph.eliminate_dead_code(is_impure_node=is_port)
        self._fold()
        self._store_weights()
        self._sink()
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
        if target is operator.getitem and isinstance(args[0], tuple):
            self.became[node] = cast("tuple[fx.Node, ...]", args[0])[cast("int", args[1])]  # Rule 15
            return
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable:
                if self._write(node, target, args, kwargs):
                    return
                raise TraceError(
                    f"node {node.name} = {target} writes into a tensor {as_written(node)}; the canonical graph is "
                    "functional: put the model in a state in which its forward changes no buffer (evaluation "
                    "mode, no caches)"
                )
            self.became[node] = self._apply(target, args, kwargs, node)
        else:
            self.became[node] = self.emit(target, tuple(args), dict(kwargs), value if is_unbacked(value) else None)

    def _write(self, node: fx.Node, target: torch._ops.OpOverload, args: Any, kwargs: Any) -> bool:
        """Rule 13; False where it does not apply."""
        pure = in_place_form(target)
        if pure is None or not self.aliases.alone(node):
            return False
        result = self._apply(pure, args, kwargs, node)
        if result.meta["val"].dtype != node.meta["val"].dtype:
            result = self.emit(aten._to_copy.default, (result,), {"dtype": node.meta["val"].dtype})
        x, *rows = self.aliases.rows(node)
        names = self.written.setdefault(x, [x])
        if rows:
            self.became[node] = result
        else:
            names.append(node)
            self.written[node] = names
        for taken in reversed(rows):
            tensor, *where = fx.node.map_arg(taken.args, self._read)
            result = self.emit(SCATTERS[cast("torch._ops.OpOverload", taken.target)], (tensor, result, *where), {})
        self.became.update(dict.fromkeys(names, result))
        return True

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

    def _apply(self, target: torch._ops.OpOverload, args: Any, kwargs: Any, old: fx.Node) -> Any:
        """Append ``target`` after the rules; returns the node that stands for its result."""
        given = bound(target, args, kwargs)
        rule = RULES.get(target._schema.name)
        if rule is not None:
            found = rule(self, given, old)
            if found is not None:
                return found
        args, kwargs = unbound(target, given)
        value = old.meta.get("val")
        return self.emit(target, args, kwargs, value if is_unbacked(value) or is_complex(value) else None)

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any = None) -> fx.Node:
        """Append a call unless an equal one exists (rule 9).

        Args:
            target: an operator or an arithmetic function.
            args: nodes and constants.
            kwargs: likewise.
            value: its fake value; None to evaluate it (what only running decides, such as ``nonzero``, is not evaluated
                again: it would get a new symbol for its size).
        """
        key = (target, merge_key(args), merge_key(kwargs))
        if key in self.known:
            return self.known[key]
        node = self.graph.call_function(target, args, kwargs)
        if value is None:
            args, kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.mode, enable_python_dispatcher(), torch.no_grad():  # rules of shapes in Python take symbols
                value = target(*args, **kwargs)
        node.meta["val"] = value
        self._root(node)
        if not is_random(target):
            self.known[key] = node
        return node

    def _root(self, node: fx.Node) -> None:
        """Where sizes that only data gives can be read: from the first tensor that has them (rule 8 knows no input)."""
        value = node.meta["val"]
        if isinstance(value, Tensor):
            sizes: list[Any] = list(value.shape)  # numbers and symbolic ones
            for dim, size in enumerate(sizes):
                if is_unbacked(size) and isinstance(size.node.expr, sympy.Symbol):
                    self.roots.setdefault(size.node.expr, (node, dim))

    # -- tensors and sizes --------------------------------------------------------------------------------------

    def _tensor(self, name: str) -> fx.Node:
        """Read a tensor of the exported module next to its first user; tied tensors under one name."""
        owner: Any = self.exported
        for part in name.split("."):
            owner = getattr(owner, part)
        if not isinstance(owner, Tensor):
            raise TraceError(f"the exported graph reads {name!r}, a {type(owner).__name__}; only tensors can be read")
        name = self.tensors.setdefault(identity_of(owner), name)
        if identity_of(owner) in self.matrices:
            owner = as_matrix(owner)
        if ("get_attr", name) not in self.known:
            self.known["get_attr", name] = self._read_tensor(name, owner)
        return self.known["get_attr", name]

    def _read_tensor(self, name: str, tensor: Tensor) -> fx.Node:
        assign_tensor(self.root, name, tensor)
        node = self.graph.get_attr(name)
        with self.mode:
            node.meta["val"] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
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
            return self.emit(aten.sym_size.int, (node, dim), {})
        parts = {symbol: self._proxy(self._size_of(symbol)) for symbol in sorted(free, key=str)}
        result = sympy_interp(_Arithmetic, parts, expression)
        return self._adopt(result.node)

    def _size_of(self, symbol: sympy.Symbol) -> fx.Node:
        if symbol not in self.sizes:
            self.sizes[symbol] = self._expression(symbol)
        node: fx.Node = self.sizes[symbol]
        return node

    def _proxy(self, node: fx.Node) -> fx.Proxy:
        return fx.Proxy(node, self.tracer)

    def _adopt(self, node: fx.Node) -> fx.Node:
        """Give values to the nodes that sympy's interpreter appended."""
        for source in node.all_input_nodes:
            if "val" not in source.meta:
                self._adopt(source)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]  # an arithmetic function
        return node

    def _fold(self) -> None:
        """Rule 10.  What a parameter enters stays, because it can be trained or replaced."""
        values: dict[fx.Node, Tensor] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                tensor = tensor_of(self.root, str(node.target))
                if not isinstance(tensor, torch.nn.Parameter):
                    values[node] = tensor
            elif node.op == "call_function" and is_foldable(node) and all(n in values for n in node.all_input_nodes):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                with torch.no_grad():
                    values[node] = node.target(*args, **kwargs)
        for node in list(values):
            read = any(user not in values for user in node.users)
            if node.op == "call_function" and node.all_input_nodes and read:
                with self.graph.inserting_before(node):
                    buffer = self._read_tensor(self._unused("constant"), values[node].contiguous())
                node.replace_all_uses_with(buffer, delete_user_cb=lambda user: user not in values)
        self.graph.eliminate_dead_code(is_impure_node=is_port)

    def _store_weights(self) -> None:
        """Rule 16.  One that can be trained stays so."""
        for node, above in computed_weights(self.graph).items():
            tensors = {n: tensor_of(self.root, str(n.target)) for n in above if n.op == "get_attr"}
            value = evaluate(node, above, tensors)
            if any(isinstance(tensor, torch.nn.Parameter) for tensor in tensors.values()):
                trained = any(tensor.requires_grad for tensor in tensors.values())
                value = torch.nn.Parameter(value, requires_grad=trained)
            name = name_of(above, reader_of(node))
            with self.graph.inserting_before(node):
                node.replace_all_uses_with(self._read_tensor(name if self._free(name) else self._unused("weight"), value))
        self.graph.eliminate_dead_code(is_impure_node=is_port)

    def _free(self, name: str) -> bool:
        """Whether nothing in the graph or in the model is called so."""
        try:
            tensor_of(self.root, name)
        except AttributeError:
            return name not in self.tensors.values()
        return False

    def _sink(self) -> None:
        """Move every read of a tensor to its first reader, so that a block-by-block run loads what it needs."""
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        for node in [node for node in order if node.op == "get_attr"]:
            min(node.users, key=order.__getitem__).prepend(node)

    def _unused(self, stem: str) -> str:
        number = 0
        while hasattr(self.root, f"{stem}_{number}"):
            number += 1
        return f"{stem}_{number}"

    def is_matrix(self, node: fx.Node) -> bool:
        """Whether the tensor that a node of the exported graph reads is kept as a matrix (rule 14)."""
        return identity_of(tensor_of(self.exported, str(node.target))) in self.matrices

    def sizes_of(self, value: Tensor) -> list[Any]:
        """The shape of a fake tensor as numbers and nodes."""
        return [self._size(size) for size in value.shape]
