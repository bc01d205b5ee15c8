"""The editor: the one way in which passes change a graph.

An :class:`Editor` owns a clone.  Every new node gets its fake value at once; ``finish`` cleans up once: dead code
(including dead random-seeded operators such as attention, which ``eliminate_dead_code`` keeps by default), tensors that
nobody reads, shapes downstream of changed weights, lint, recompile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from surgeon import caches, routes
from surgeon.errors import RewriteError
from surgeon.graph import Graph, Port, assign_tensor


class Editor:
    """Edits one graph in place.

    Attributes:
        graph: the graph being edited (the caller hands in a clone).
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._nodes = graph.module.graph
        self._mode = fake_mode(graph)
        self._dirty: set[fx.Node] = set()
        self._successor: dict[fx.Node, fx.Node] = {}
        self._numbers: dict[int, int] = {}

    # -- tensors ------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """The tensor read under ``name``."""
        return self.graph.tensor(name)

    def set_tensor(self, name: str, tensor: Tensor) -> None:
        """Replace the tensor read under ``name`` everywhere it is read (a Parameter stays one); shapes may change."""
        tensor, old = tensor.cpu(), self.graph.tensor(name)
        keep_parameter = isinstance(old, torch.nn.Parameter) and tensor.is_floating_point()
        assign_tensor(self.graph.module, name, _as_parameter(tensor) if keep_parameter else tensor.detach())
        for node in self._nodes.nodes:
            if node.op == "get_attr" and node.target == name:
                node.meta["val"] = self._fake(tensor)
                self._dirty.add(node)

    def add_tensor(self, name: str, tensor: Tensor) -> fx.Node:
        """Add a tensor under a name that is not taken yet (a number is appended where it is) and read it here.

        Floating-point tensors become parameters, others buffers.

        Args:
            name: dotted name.
            tensor: the value; on the meta device it stands for any numbers, as rehearsals leave them.

        Returns:
            The ``get_attr`` node at the current insertion point.
        """
        tensor = _of_any_numbers(tensor) if tensor.is_meta else tensor.cpu()
        unique, number = name, 1
        while self._taken(unique):
            unique, number = f"{name}_{number}", number + 1
        assign_tensor(self.graph.module, unique, _as_parameter(tensor) if tensor.is_floating_point() else tensor)
        node = self._nodes.get_attr(unique)
        node.meta["val"] = self._fake(tensor)
        return node

    def read(self, name: str) -> fx.Node:
        """Read an existing tensor at the current insertion point."""
        node = self._nodes.get_attr(name)
        node.meta["val"] = self._fake(self.graph.tensor(name))
        return node

    # -- nodes --------------------------------------------------------------------------------------------------

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert new nodes before ``node``."""
        with self._nodes.inserting_before(node):
            yield

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """Insert new nodes after ``node``, in the order in which they are made."""
        following = node.next
        with self._nodes.inserting_before(following):
            yield

    def call(self, operator: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call at the insertion point, with its fake value.

        Args:
            operator: an operator overload such as ``torch.ops.aten.linear.default``.
            *args: nodes and constants.
            **kwargs: likewise.

        Raises:
            RewriteError: the operator refuses these shapes.
        """
        node = self._nodes.call_function(operator, args, kwargs)
        self._evaluate(node)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of ``old`` read ``new`` instead (except ``new`` itself, where it reads ``old``)."""
        self._successor[old] = new
        for user in list(old.users):
            if user is not new:
                user.replace_input_with(old, new)
                self._dirty.add(user)

    def redirect(self, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let one reader of ``old`` read ``new`` in its place."""
        reader.replace_input_with(old, new)
        self._dirty.add(reader)

    def touch(self, node: fx.Node) -> None:
        """Say that a node's constants were changed, so that shapes behind it are computed again."""
        self._dirty.add(node)

    def hand_in(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors under their names as they are, whatever was there; shapes behind them are computed again."""
        for name, tensor in tensors.items():
            assign_tensor(self.graph.module, name, tensor)
        for node in self._nodes.find_nodes(op="get_attr"):
            if node.target in tensors or "val" not in node.meta:
                node.meta["val"] = self._fake(self.graph.tensor(str(node.target)))
                self._dirty.add(node)

    def stands_for(self, new: fx.Node, old: fx.Node) -> None:
        """Say that ``new`` is what stands for ``old``, where the edit that made it so was done elsewhere."""
        if new is not old:
            self._successor[old] = new

    def replaced(self) -> dict[str, str]:
        """Names of the nodes that have been replaced, with those of what stands for them now."""
        return {old.name: self.current(old).name for old in self._successor}

    def current(self, node: fx.Node) -> fx.Node:
        """The node that stands for ``node`` after the replacements so far (structures name nodes of before the edit)."""
        while node in self._successor:
            node = self._successor[node]
        return node

    def sizes(self, node: fx.Node) -> list[int | fx.Node]:
        """The shape of a node's value as arguments for a reshape at the insertion point.

        Dynamic sizes are read off the graph's inputs (never off an activation, which would keep it alive); at most one
        size that no input has directly becomes -1.

        Raises:
            RewriteError: two sizes or more are expressions that no input has.
        """
        found: list[int | fx.Node] = []
        for size in node.meta["val"].shape:
            found.append(int(size) if isinstance(size, int) else self._input_size(size))
        if sum(size == -1 for size in found) > 1:
            raise RewriteError(f"the shape {list(node.meta['val'].shape)} of {node.name} does not follow from the inputs")
        return found

    def _input_size(self, size: torch.SymInt) -> int | fx.Node:
        for node in self._nodes.nodes:
            if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
                for axis, have in enumerate(node.meta["val"].shape):
                    if isinstance(have, torch.SymInt) and have.node.expr == size.node.expr:
                        return self.call(torch.ops.aten.sym_size.int, node, axis)
        return -1

    # -- ports --------------------------------------------------------------------------------------------------

    def add_input(self, name: str, dtype: torch.dtype, shape: Sequence[int | str], role: str, fill: float) -> fx.Node:
        """Add an input behind the others.

        Args:
            name: of the port, not taken yet.
            dtype: of the port.
            shape: sizes, and names of dimensions that other inputs have.
            role: of the port.
            fill: value of its example.

        Returns:
            The placeholder.

        Raises:
            RewriteError: a dimension that no other input has.
        """
        placeholders = self._nodes.find_nodes(op="placeholder")
        symbols: dict[str, Any] = {}
        known: dict[str, int] = {}
        for node, port in zip(placeholders, self.graph.inputs, strict=True):
            example = self.graph.example[port.name]
            for axis, label in enumerate(port.shape):
                if isinstance(label, str):
                    symbols.setdefault(label, node.meta["val"].shape[axis])
                    known.setdefault(label, example.shape[axis])
        unknown = [size for size in shape if isinstance(size, str) and size not in symbols]
        if unknown:
            raise RewriteError(f"input {name!r}: no other input has the dimension {', '.join(unknown)}")
        with self.after(placeholders[-1]):
            placeholder = self._nodes.placeholder(name.replace(".", "_"))
        sizes = [size if isinstance(size, int) else symbols[size] for size in shape]
        with self._mode:
            placeholder.meta["val"] = torch.empty(sizes, dtype=dtype)
        self.graph.inputs = (*self.graph.inputs, Port(name, dtype, tuple(shape), role))
        example_sizes = [size if isinstance(size, int) else known[size] for size in shape]
        self.graph.example[name] = torch.full(example_sizes, fill, dtype=dtype)
        return placeholder

    def resize_input(self, placeholder: fx.Node, axis: int, places: Tensor) -> None:
        """Let an input have only some places of a fixed dimension; its example keeps them.

        Args:
            placeholder: the input's node.
            axis: the dimension.
            places: the places that stay, ascending.
        """
        number = self._nodes.find_nodes(op="placeholder").index(placeholder)
        port = self.graph.inputs[number]
        shape = (*port.shape[:axis], len(places), *port.shape[axis + 1 :])
        self.graph.inputs = (*self.graph.inputs[:number], replace(port, shape=shape), *self.graph.inputs[number + 1 :])
        self.graph.example = {**self.graph.example, port.name: self.graph.example[port.name].index_select(axis, places)}
        value = placeholder.meta["val"]
        with self._mode:
            placeholder.meta["val"] = value.new_empty((*value.shape[:axis], len(places), *value.shape[axis + 1 :]))
        self._dirty.add(placeholder)

    def resize_outputs(self, roles: Collection[str]) -> None:
        """Let the ports of outputs with these roles have the fixed sizes that their values have now."""
        results: Any = self._nodes.output_node().args[0]
        self.graph.outputs = tuple(
            replace(port, shape=tuple(
                int(have) if isinstance(size, int) and isinstance(have, int) else size
                for size, have in zip(port.shape, result.meta["val"].shape, strict=True)
            )) if port.role in roles else port
            for port, result in zip(self.graph.outputs, results, strict=True)
        )  # fmt: skip

    def add_output(self, name: str, node: fx.Node, role: str) -> Port:
        """Return the value of a node too, under a name that is not taken yet; behind the other outputs."""
        output = self._nodes.output_node()
        results: Any = output.args[0]
        output.args = ((*results, node),)
        value = node.meta["val"]
        port = Port(name, value.dtype, self.dimensions(value), role)
        self.graph.outputs = (*self.graph.outputs, port)
        return port

    def dimensions(self, value: Tensor) -> tuple[int | str, ...]:
        """The shape of a value as a port has it: sizes, names of the inputs' dimensions, ``"?"`` for anything else."""
        names = {
            size.node.expr: label
            for node, port in zip(self._nodes.find_nodes(op="placeholder"), self.graph.inputs, strict=True)
            for size, label in zip(node.meta["val"].shape, port.shape, strict=True)
            if isinstance(size, torch.SymInt) and isinstance(label, str)
        }
        return tuple(int(size) if isinstance(size, int) else names.get(size.node.expr, "?") for size in value.shape)

    def renumber(self, blocks: dict[int, int]) -> None:
        """Say which number each block that stays has at the end, for ports that are named after blocks."""
        self._numbers = blocks

    # -- end ----------------------------------------------------------------------------------------------------

    def finish(self) -> Graph:
        """Clean up and return the graph; caches and decisions that nothing reads any more go with their inputs and outputs.

        Raises:
            RewriteError: the graph is not valid any more, or a shape does not fit downstream of an edit.
        """
        self.settle()
        if caches.prune(self.graph):
            self.settle()
        if self._numbers:
            routes.renumber(self.graph, self._numbers)
        routes.resize(self.graph, self._nodes.output_node())
        try:
            self._nodes.lint()
        except Exception as error:  # fx raises bare RuntimeErrors
            raise RewriteError(f"the edited graph is not valid: {error}") from error
        self.graph.module.recompile()
        return self.graph

    def settle(self) -> None:
        """Remove dead code and unread tensors and recompute shapes, without compiling: enough to go on node by node."""
        self._nodes.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self._propagate()
        self._drop_unread_tensors()

    # -- internals ----------------------------------------------------------------------------------------------

    def _taken(self, name: str) -> bool:
        owner: Any = self.graph.module
        for part in name.split("."):
            if not hasattr(owner, part):
                return False
            owner = getattr(owner, part)
        return True

    def _fake(self, tensor: Tensor) -> Tensor:
        with self._mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def _evaluate(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            # without the Python dispatcher a composite operator runs in C++, which may ask for sizes as integers
            with self._mode, enable_python_dispatcher(), torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]  # call_function target
        except Exception as error:
            shapes = [_shape(n.meta.get("val")) for n in node.all_input_nodes]
            raise RewriteError(
                f"{node.name} = {node.target} does not accept its inputs of shapes {shapes}: {error}"
            ) from error

    def _propagate(self) -> None:
        """Recompute fake values downstream of changed nodes, stopping where the shape comes out as before."""
        stale: set[fx.Node] = set()
        for node in self._nodes.nodes:
            if node.op != "call_function":
                if node in self._dirty and node.op in ("get_attr", "placeholder"):
                    stale.add(node)
                continue
            if node in self._dirty or any(source in stale for source in node.all_input_nodes):
                before = _shape(node.meta.get("val"))
                self._evaluate(node)
                if _shape(node.meta["val"]) != before:
                    stale.add(node)
        self._dirty.clear()

    def _drop_unread_tensors(self) -> None:
        read = {str(node.target) for node in self._nodes.nodes if node.op == "get_attr"}
        module = self.graph.module
        held = [n for n, _ in module.named_parameters(remove_duplicate=False)]
        held += [n for n, _ in module.named_buffers(remove_duplicate=False)]
        for name in held:
            if name not in read:
                owner_name, _, leaf = name.rpartition(".")
                owner = module.get_submodule(owner_name)
                owner._parameters.pop(leaf, None)
                owner._buffers.pop(leaf, None)
        _prune_empty(module)


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake mode that the graph's values were made in (dynamic dimensions only combine within one)."""
    for node in graph.module.graph.nodes:
        value = node.meta.get("val")
        mode = getattr(value, "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def _of_any_numbers(tensor: Tensor) -> Tensor:
    """A tensor of a shape and type in little memory; vectors of several numbers, since equal biases may be left out."""
    if tensor.dim() == 1:
        return torch.linspace(1, 2, len(tensor)).to(tensor.dtype)
    return torch.ones((), dtype=tensor.dtype).expand(tensor.shape)


def _as_parameter(tensor: Tensor) -> torch.nn.Parameter:
    if isinstance(tensor, torch.nn.Parameter):
        return tensor
    return torch.nn.Parameter(tensor.detach(), requires_grad=True)


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(size) for size in value.shape], value.dtype
    if isinstance(value, tuple | list):
        return [_shape(item) for item in value]
    return str(value)


def _prune_empty(module: torch.nn.Module) -> None:
    """Remove submodules that hold nothing any more."""
    for name, child in list(module.named_children()):
        _prune_empty(child)
        if not child._parameters and not child._buffers and not child._modules:
            del module._modules[name]
