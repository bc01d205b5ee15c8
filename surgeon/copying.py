"""Copies of modules, also of those that torch does not copy by itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def copied(module: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of a module.

    A weight that a hook computes before each forward (``torch.nn.utils.prune``, ``torch.nn.utils.weight_norm``) is a result
    that gradients flow through, held as an attribute; ``copy.deepcopy`` refuses it.  The copy holds its value, until its own
    hook computes it again.

    Args:
        module: any module; it is not changed.
        instead: what the copy has in place of objects, by their ``id``, as the memo of ``copy.deepcopy``.
    """
    made = dict(instead or {})
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf and id(value) not in made:
                made[id(value)] = value.detach()
    return copy.deepcopy(module, made)


def writable(module: nn.Module) -> nn.Module:
    """The module itself, or a copy where its tensors were made under ``torch.inference_mode``.

    Such tensors take part in nothing that a gradient could be asked of, and an export asks it of parameters.
    """
    tensors = (*module.parameters(), *module.buffers())
    if torch.is_inference_mode_enabled() or not any(tensor.is_inference() for tensor in tensors):
        return module
    return copied(module)
