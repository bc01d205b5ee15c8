"""Graph: the canonical form of a model that everything else works on.

A :class:`Graph` wraps one flat, functional ATen ``torch.fx.GraphModule`` together with what the bare graph cannot say:
the names of the model's inputs and outputs, which of their dimensions are dynamic, one example of every input, and where
the model came from.  Parameters keep the model's own names and are *shared* between a graph and its clones: a pass
replaces a parameter, it never writes into one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from surgeon import caches
from surgeon.arguments import flat
from surgeon.errors import RewriteError, TraceError
from surgeon.placement import Placement

V = TypeVar("V")


@dataclass(frozen=True)
class Dim:
    """A dynamic dimension of the inputs.

    Attributes:
        name: the name that inputs share when they must agree, e.g. ``"batch"``.
        min: smallest size the graph accepts.
        max: largest size the graph accepts, None where nothing bounds it.
    """

    name: str
    min: int = 1
    max: int | None = None


@dataclass(frozen=True)
class Port:
    """One input or output of the graph.

    Attributes:
        name: the model's own name (``input_ids``, ``logits``, ...).
        dtype: element type.
        shape: one entry per dimension: an int where it is fixed, the name of a :class:`Dim` where it is dynamic
            (a sum of two as ``"past + sequence"``; for outputs ``"?"`` stands for any other expression).
        role: what the port is besides an ordinary one, see :mod:`surgeon.caches`: ``past`` or ``present`` of a cache,
            or positions that may be left out; ``recorded`` or ``replayed`` routing, see :mod:`surgeon.routes`.
        most: for each dimension the most positions for which the model's tables have rows, None where none bounds it; empty
            for none at all.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    role: str = ""
    most: tuple[int | None, ...] = ()

    def beyond(self, shape: Sequence[int]) -> str:
        """What is wrong with an input of these sizes that has more positions than the tables have rows; empty for nothing."""
        for found, most in zip(shape, self.most, strict=False):
            if most is not None and found > most:
                return f"input {self.name!r} has {found} positions, and the model's table of positions holds {most}"
        return ""


@dataclass(frozen=True)
class Source:
    """Where the model came from, for reports and for backends that need the original's configuration.

    Attributes:
        description: what the user named, e.g. a directory or ``"package.module:callable"``.
        path: the checkpoint directory, when there is one (also the tokenizer's).
        config: the model's configuration as plain data, when it has one.
        task: ``forward`` (the model as it is called) or ``text-generation``.
        output_class: name of the class the source model returns, informational.
        weights: ``real``, or ``fake`` where the graph was traced without their values (see ``surgeon.fake_weights``).
        model_class: name of the source model's class, for backends that write it again.
        generation: what the source says about generating with it: ``eos_token_id``, ``pad_token_id`` ...
        left: weights that looked like those of experts and were left as they were, by name, with the reason.
        fixed: arguments of the model that are no tensors, by name: the same in every call, and so a part of the graph.
    """

    description: str = "nn.Module"
    path: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    task: str = "forward"
    output_class: str | None = None
    weights: str = "real"
    model_class: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


class Graph:
    """A canonical graph: callable with the model's own keyword inputs, differentiable, cheap to clone.

    Attributes:
        module: flat ``fx.GraphModule``; its placeholders are named and ordered as ``inputs``; its output node returns a
            tuple ordered as ``outputs``.  Every node carries ``meta["val"]`` (a fake tensor or SymInt).
        inputs: the input ports.
        outputs: the output ports.
        dims: the dynamic dimensions by name.
        example: one real tensor per input, of the sizes the graph was traced with.
        source: where the model came from.
        placement: the device on which it is run, with weights, inputs and outputs on the host; None for the host itself.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        dims: Mapping[str, Dim],
        example: Mapping[str, Tensor],
        source: Source | None = None,
    ) -> None:
        self.module = module
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.dims = dict(dims)
        self.example = dict(example)
        self.source = source or Source()
        self.placement: Placement | None = None

    # -- running ------------------------------------------------------------------------------------------------

    def bind(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Order keyword inputs as the graph takes them.

        Args:
            inputs: the model's keyword inputs.

        Returns:
            One tensor per input port.

        Raises:
            TraceError: an input is missing, unknown, or of another rank or fixed size than the graph's.

        Caches and positions may be left out, see :func:`surgeon.caches.complete`.
        """
        inputs = self.flat(inputs)
        problem = caches.misfit(self.inputs, inputs)
        if problem:
            raise TraceError(problem)
        inputs = caches.complete(self.inputs, inputs)
        names = [port.name for port in self.inputs]
        unknown = sorted(set(inputs) - set(names))
        missing = [name for name in names if name not in inputs]
        if unknown or missing:
            raise TraceError(
                f"the graph's inputs are {', '.join(names)}; "
                + "; ".join(
                    ([f"missing: {', '.join(missing)}"] if missing else [])
                    + ([f"unknown: {', '.join(unknown)}"] if unknown else [])
                )
            )
        ordered = []
        for port in self.inputs:
            value = inputs[port.name]
            if any(isinstance(size, int) and size != found for size, found in zip(port.shape, value.shape, strict=True)):
                raise TraceError(
                    f"input {port.name!r} must have the shape {list(port.shape)} that the model was traced for, found "
                    f"{list(value.shape)}"
                )
            if problem := port.beyond(value.shape):
                raise TraceError(f"{problem}: give a shorter sequence")
            ordered.append(value)
        return ordered

    def flat(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keyword arguments of the model by the names of the inputs: nested ones flattened, fixed values left out.

        Raises:
            TraceError: a value is another than the model was traced with.
        """
        return flat(inputs, (port.name for port in self.inputs), self.source.fixed)

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """Run the graph in torch.

        Args:
            **inputs: the model's keyword inputs; nested ones as the model takes them, or by the names of the ports.

        Returns:
            Output tensors by the model's own output names; caches only where caches were handed in.

        Raises:
            TraceError: the inputs do not fit, or the graph was traced without the values of its weights.
        """
        self.require_weights("running it")
        if self.placement is None:
            results = self.module(*self.bind(inputs))
        else:
            from surgeon.observe import outputs

            results = outputs(self, inputs)
        wanted = caches.asked(self.inputs, self.outputs, inputs)
        return {port.name: value for port, value in zip(self.outputs, results, strict=True) if port in wanted}

    def placed(self, values: V) -> V:
        """The values, tensors within them where the graph is run: for work on weights and statistics that is heavy.

        What an editor is given goes back to the host by itself.
        """
        return values if self.placement is None else self.placement.place(values)

    # -- weights ------------------------------------------------------------------------------------------------

    def require_weights(self, purpose: str) -> None:
        """Refuse what cannot be done without the values of the weights.

        Args:
            purpose: what needs them, as the subject of "needs the values of its weights".

        Raises:
            TraceError: the graph was traced over fake weights.
        """
        if self.source.weights == "fake":
            raise TraceError(
                f"the graph of {self.source.description} was traced over fake weights, which have shapes and types but no "
                f"values, and {purpose} needs the values; what works without them is discover and inspect. Trace the "
                "model with its weights (weights='real')"
            )

    def parameters(self) -> dict[str, Tensor]:
        """Every tensor that the graph reads, parameters and buffers alike, by the name it is read under."""
        found: dict[str, Tensor] = {}
        for node in self.module.graph.nodes:
            if node.op == "get_attr" and node.target not in found:
                found[node.target] = self.tensor(node.target)
        return found

    def tensor(self, name: str) -> Tensor:
        """The tensor read under ``name``.

        Raises:
            RewriteError: the graph holds no tensor of that name.
        """
        owner: Any = self.module
        for part in name.split("."):
            if not hasattr(owner, part):
                raise RewriteError(f"the graph holds no tensor {name!r}")
            owner = getattr(owner, part)
        if not isinstance(owner, Tensor):
            raise RewriteError(f"{name!r} is not a tensor of the graph but a {type(owner).__name__}")
        return owner

    def parameter_count(self) -> int:
        """Number of scalar weights the graph reads; a tensor read under two names (tied) counts once.

        Packed low-bit weights count as the number of weights they stand for (see ``surgeon.accounting``).
        """
        from surgeon.accounting import parameter_count

        return parameter_count(self)

    def nbytes(self) -> int:
        """Bytes of all tensors that the graph reads; tied tensors count once."""
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self.parameters().values()}
        return sum(storages.values())

    # -- identity -----------------------------------------------------------------------------------------------

    def clone(self) -> Graph:
        """An independent graph that shares every weight tensor with this one."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.module.graph, {}))  # node.meta is copied shallowly: fake tensors are shared
        module = fx.GraphModule(_share_tensors(self.module), graph)
        return self._sibling(module, self.source)

    def with_source(self, **changes: Any) -> Graph:
        """The same graph with fields of its source replaced."""
        return self._sibling(self.module, replace(self.source, **changes))

    def _sibling(self, module: fx.GraphModule, source: Source) -> Graph:
        graph = Graph(module, self.inputs, self.outputs, self.dims, self.example, source)
        graph.placement = self.placement
        return graph

    def fingerprint(self, *, weights: bool = False) -> str:
        """A digest of what the graph computes: operators, constants, edges, and shapes and dtypes of the weights.

        Names of nodes do not enter, the names of weights do.

        Args:
            weights: include the weights' bytes too (slow on large models).

        Returns:
            64 hexadecimal digits.
        """
        if weights:
            self.require_weights("a fingerprint of its weights")
        order: dict[fx.Node, int] = {}
        digest = hashlib.sha256()
        for index, node in enumerate(self.module.graph.nodes):
            order[node] = index
            target = node.target if isinstance(node.target, str) else str(node.target)
            if node.op == "placeholder":
                target = f"input{index}"
            args = fx.node.map_arg((node.args, dict(sorted(node.kwargs.items()))), lambda n: f"%{order[n]}")
            digest.update(f"{node.op} {target} {args!r}\n".encode())
            if node.op == "get_attr":
                digest_tensor(digest, self.tensor(str(node.target)), values=weights)
        return digest.hexdigest()


def digest_tensor(digest: hashlib._Hash, tensor: Tensor, *, values: bool = True) -> None:
    """Add a tensor's shape and type to a digest, and its bytes."""
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
    if values:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _share_tensors(module: fx.GraphModule) -> torch.nn.Module:
    """A module tree with the same tensors under the same names, so that a clone can replace its own entries."""
    root = torch.nn.Module()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        assign_tensor(root, name, parameter)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        assign_tensor(root, name, buffer)
    for node in module.graph.nodes:  # constants lifted by export are plain attributes
        if node.op == "get_attr":
            owner: Any = module
            for part in str(node.target).split("."):
                owner = getattr(owner, part)
            assign_tensor(root, str(node.target), owner)
    return root


def assign_tensor(root: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` under the dotted ``name``, making the modules on the way.

    A ``Parameter`` stays a parameter, anything else becomes a buffer.
    """
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        child = owner._modules.get(part)
        if child is None:
            child = torch.nn.Module()
            owner.add_module(part, child)
        owner = child
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    owner.__dict__.pop(leaf, None)
    if isinstance(tensor, torch.nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def users_outside(nodes: Iterable[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    """Those of ``nodes`` that are read by a node which is not in ``inside``, in order."""
    return [node for node in nodes if any(user not in inside for user in node.users)]
