"""Running a graph on an accelerator: its weights rest on the host and visit the device while they are needed.

What is heavy in a build is running the model on calibration data and the least squares behind it.  A graph that has a
:class:`Placement` does both on its device; whatever else looks at the graph (plans, edits, backends) finds weights, statistics
and outputs on the host, as without one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from surgeon.errors import RecipeError

V = TypeVar("V")

_SHARE_OF_FREE = 0.5
"""How much of the device's free memory weights may keep; the rest is for activations, statistics and factorisations."""


class Placement:
    """A device and the copies of weights that are kept there.

    A copy is found again by the very tensor that it was made of, so that graphs which share weights share copies, and what a
    pass has replaced goes with the original.  Where room ends, the copy that was used least recently makes way.

    Attributes:
        device: where graphs run.
        room: bytes that copies of weights may take while nobody is using them.
    """

    def __init__(self, device: torch.device, room: int | None = None) -> None:
        """Args:
        device: not the CPU.
        room: see the class; None for half of what is free on the device now, nothing where it does not say.
        """
        self.device = device
        self.room = _free(device) if room is None else room
        self._copies: Any = WeakIdKeyDictionary()  # in the order of their use

    @classmethod
    def of(cls, name: str) -> Placement | None:
        """The placement that a recipe's ``device`` names; None for the CPU.

        Args:
            name: ``cpu``, or an accelerator as torch names it: ``cuda``, ``cuda:1``, ``xpu``.

        Raises:
            RecipeError: torch knows no such device, it is not here, or it has no float64.
        """
        try:
            device = torch.device(name)
        except RuntimeError:
            raise RecipeError(f"device: torch knows no device {name!r}; {_there_is()}") from None
        if device.type == "cpu":
            return None
        if device.type == "meta":
            raise RecipeError(f"device: tensors on {name!r} have no values to observe; {_there_is()}")
        try:
            probe = torch.ones(2, 2, device=device)
        except Exception as error:  # each device has errors of its own for not being there
            raise RecipeError(
                f"device: {name!r} cannot be used here ({_sentence(error)}); {_there_is()}"
            ) from None
        try:
            (probe.double() @ probe.double()).cpu()
        except Exception as error:
            raise RecipeError(
                f"device: {name!r} has no float64 ({_sentence(error)}), in which statistics are summed; {_there_is()}"
            ) from None
        return cls(probe.device)

    def weight(self, tensor: Tensor) -> Tensor:
        """The copy of a weight on the device; changing it changes nothing but the copy."""
        copy: Tensor | None = self._copies.pop(tensor, None)
        if copy is None:
            copy = tensor.detach().to(self.device)
            if copy.nbytes > self.room:
                return copy
            self._make_way(copy.nbytes)
        self._copies[tensor] = copy
        return copy

    def _make_way(self, size: int) -> None:
        held = sum(copy.nbytes for copy in self._copies.values())
        for key in list(self._copies):
            if held + size <= self.room:
                return
            held -= self._copies.pop(key).nbytes

    def place(self, values: V) -> V:
        """The values, tensors within them (and within dataclasses) on the device."""
        moved: V = _moved(values, self.device)
        return moved


def to_host(values: V) -> V:
    """The values, tensors within them (and within dataclasses) on the CPU."""
    moved: V = _moved(values, torch.device("cpu"))
    return moved


def _moved(values: Any, device: torch.device) -> Any:
    def moved(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            held = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
            return dataclasses.replace(leaf, **_moved(held, device))
        return leaf

    return tree_map(moved, values)


def relocated(node: fx.Node, device: torch.device) -> Mapping[str, Any]:
    """Keyword arguments of a node that was traced for the CPU, for another device: ``arange`` and its like name theirs."""
    if isinstance(node.kwargs.get("device"), torch.device):
        return {**node.kwargs, "device": device}
    return node.kwargs


def _sentence(error: Exception) -> str:
    """What an error of torch begins with; some go on with a list of everything that the dispatcher knows."""
    return str(error).splitlines()[0].partition(". ")[0]


def _free(device: torch.device) -> int:
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return int(ask(device)[0] * _SHARE_OF_FREE) if ask is not None else 0


def accelerator() -> str | None:
    """Name of the accelerator that is here, if any: ``cuda``, ``xpu`` ..."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None  # type: ignore[union-attr]


def _there_is() -> str:
    found = accelerator()
    return "this machine has cpu" + (f" and {found}" if found is not None else " alone, as far as this torch can tell")
