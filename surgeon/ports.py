"""Inputs and outputs of artefacts: as plain data in the manifest, and checked before a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.arguments import flat
from surgeon.caches import SUM, complete, misfit
from surgeon.errors import LowerError
from surgeon.graph import Port


def port_data(port: Port) -> dict[str, Any]:
    """A port as the manifest holds it."""
    entry = {"name": port.name, "dtype": str(port.dtype).removeprefix("torch."), "shape": list(port.shape)}
    return entry | ({"role": port.role} if port.role else {}) | ({"most": list(port.most)} if port.most else {})


def port_of(entry: Mapping[str, Any]) -> Port:
    """Undo :func:`port_data`.

    Raises:
        LowerError: the manifest names a type that torch does not have.
    """
    dtype = getattr(torch, str(entry["dtype"]).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise LowerError(f"the manifest's port {entry['name']!r} has dtype {entry['dtype']!r}, unknown to torch")
    return Port(str(entry["name"]), dtype, tuple(entry["shape"]), str(entry.get("role", "")), tuple(entry.get("most", ())))


def check_inputs(where: object, ports: Sequence[Port], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Refuse inputs that do not fit the ports, and fill in what may be left out (caches, positions).

    Args:
        where: what refuses, for the message: the artefact's file.
        ports: the artefact's inputs.
        inputs: what it is to be run on, by name; nested ones as the source model takes them, or flat.

    Returns:
        One tensor per port, by name.

    Raises:
        LowerError: an input is missing, unknown, or of another type or shape, or longer than the model's tables of positions;
            dynamic dimensions of one name must agree.
    """
    inputs = flat(inputs, (port.name for port in ports), {})
    problem = misfit(ports, inputs)
    if problem:
        raise LowerError(problem)
    inputs = complete(ports, inputs)
    names = [port.name for port in ports]
    missing, unknown = [n for n in names if n not in inputs], sorted(set(inputs) - set(names))
    if missing or unknown:
        found = [f"missing: {', '.join(missing)}"] if missing else []
        found += [f"unknown: {', '.join(unknown)}"] if unknown else []
        raise LowerError(f"{where}: the model's inputs are {', '.join(names)}; {'; '.join(found)}")
    sizes: dict[str, tuple[int, str]] = {}
    for port in ports:
        value = inputs[port.name]
        if value.dtype != port.dtype:
            raise LowerError(f"input {port.name!r} must be {port.dtype}, found {value.dtype}")
        if not all(isinstance(want, str) or want == have for want, have in zip(port.shape, value.shape, strict=True)):
            raise LowerError(f"input {port.name!r} must have shape {list(port.shape)}, found {list(value.shape)}")
        if problem := port.beyond(value.shape):
            raise LowerError(f"{problem}: give a shorter sequence")
        for want, have in zip(port.shape, value.shape, strict=True):
            if isinstance(want, str) and want != "?" and sizes.setdefault(want, (have, port.name))[0] != have:
                first, other = sizes[want]
                raise LowerError(f"inputs {other!r} and {port.name!r} must have the same {want}, found {first} and {have}")
    for total, (have, name) in sizes.items():
        parts = [sizes[part][0] for part in total.split(SUM) if part in sizes]
        if SUM in total and len(parts) == len(total.split(SUM)) and sum(parts) != have:
            raise LowerError(f"input {name!r} must have {total} = {sum(parts)} positions, found {have}")
    return {name: inputs[name] for name in names}


class InputCheck:
    """:func:`check_inputs` for one list of ports, with what can be known before a run worked out once.

    A decode step of a small model takes as long on the device as checking its dozens of caches one by one does in Python.
    """

    def __init__(self, where: object, ports: Sequence[Port]) -> None:
        """Work out what to look at.

        Args:
            where: what refuses, for the message: the artefact's file.
            ports: the artefact's inputs.
        """
        self.where, self.ports = where, tuple(ports)
        self._facts = [
            (
                port.name,
                port.dtype,
                len(port.shape),
                [(axis, size) for axis, size in enumerate(port.shape) if isinstance(size, int)],
                [(axis, size) for axis, size in enumerate(port.shape) if isinstance(size, str) and size != "?"],
                [(axis, most) for axis, most in enumerate(port.most) if most is not None],
            )
            for port in self.ports
        ]
        named = {size for *_, dynamic, _ in self._facts for _, size in dynamic}
        parts = {total: total.split(SUM) for total in named if SUM in total}
        self._sums = [(total, terms) for total, terms in parts.items() if named.issuperset(terms)]

    def __call__(self, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """One tensor per port, by name: the inputs themselves where they are complete and fit.

        Raises:
            LowerError: as :func:`check_inputs` does.
        """
        return inputs if self.fit(inputs) else check_inputs(self.where, self.ports, inputs)

    def fit(self, inputs: Mapping[str, Any]) -> bool:
        """Whether there is nothing to fill in and nothing to refuse."""
        if len(inputs) != len(self._facts):
            return False
        sizes: dict[str, int] = {}
        for name, dtype, rank, fixed, dynamic, bounds in self._facts:
            value = inputs.get(name)
            if not isinstance(value, Tensor) or value.dtype != dtype:
                return False
            shape = value.shape
            if len(shape) != rank:
                return False
            for axis, size in fixed:
                if shape[axis] != size:
                    return False
            for axis, most in bounds:
                if shape[axis] > most:
                    return False
            for axis, dimension in dynamic:
                if sizes.setdefault(dimension, shape[axis]) != shape[axis]:
                    return False
        return all(sum(sizes[term] for term in terms) == sizes[total] for total, terms in self._sums)
