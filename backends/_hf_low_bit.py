"""Low-bit weights as compressed-tensors: the ``pack-quantized`` format, which transformers loads.

``surgeon::dequantize`` is ``w = (q - 2^(bits-1)) s`` with q from 0 to 2^bits - 1; the format's packing shifts its signed
numbers by the same 2^(bits-1) and puts 32 / bits of them into an int32, the first in the lowest bits.  A byte row of ours is
therefore a row of the format's bytes, padded to whole int32.

Facts of transformers 5.24 with compressed-tensors 0.20: packed zero points do not load (the empty model expects them
unpacked); stacked experts load from files that hold each expert's codes, as floating-point weights; experts that are *not*
quantized load beside quantized linears only in the stacked form.  Linears have no ``weight`` before the first forward; some
classes initialise what was not in the files by way of it and end there, whatever was missing.  ``dequantize: true`` gives
linears their weights as they are loaded, all of them by the first group of linears.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import torch
from torch import Tensor

from surgeon.backends._hf_contents import ENGINES, Contents, LowBit
from surgeon.backends._hf_fit import Fitted
from surgeon.backends._hf_skeleton import Skeleton
from surgeon.contract import Refusal
from surgeon.graph import Graph

INSTALL = "pip install 'surgeon[huggingface]'"


def low_bit_refusals(skeleton: Skeleton, contents: Contents) -> list[Refusal]:
    """Low-bit weights that the format does not hold, or that the libraries here do not load."""
    refusals = []
    library = unavailable() if contents.low_bit else None
    experts = {(codes.bits, codes.group) for name, codes in contents.low_bit.items() if _stacked(contents, name)}
    for name, codes in contents.low_bit.items():
        if library is not None:
            reason = f"low-bit weights are written as compressed-tensors, and {library}: {INSTALL}"
            return [Refusal(name, reason, lasting=True)]
        lasting = False
        if name not in skeleton.linears and not _stacked(contents, name):
            reason = f"it is quantized, and compressed-tensors quantizes torch.nn.Linear only; {ENGINES} run it"
        elif codes.bits not in (4, 8):
            reason, lasting = f"it has {codes.bits} bits; the format is written with 4 and 8; {ENGINES} run it", True
        elif codes.zero_point is not None:
            reason = "it has zero points, which transformers does not load in this format; quantize with symmetric: true"
            lasting = True
        elif codes.in_features % codes.group:
            reason = f"its {codes.in_features} inputs are no multiple of the group {codes.group}; quantize with another group"
        elif _stacked(contents, name) and len(experts) > 1:
            reason = f"experts differ in bits and group ({sorted(experts)}), transformers loads one for all; {ENGINES} run it"
        else:
            continue
        refusals.append(Refusal(name, reason, lasting))
    return refusals


def _stacked(contents: Contents, name: str) -> bool:
    """Whether a weight is that of several experts."""
    return len(contents.held[name].shape) == 3


def unavailable() -> str | None:
    """Why compressed-tensors cannot be used here, None where it can."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return "compressed-tensors is not installed"
    try:
        importlib.import_module("compressed_tensors")
    except ImportError as error:
        return f"compressed-tensors cannot be imported ({error})"
    return None


class _NoWeightError(AttributeError):
    """The weight of a packed linear was read."""


class _Packed(torch.nn.Linear):
    """A linear as it is while a low-bit checkpoint is loaded: without its weight."""

    place: str

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise _NoWeightError(f"{self.place}.weight")
        return super().__getattr__(name)


def read_at_loading(fitted: Fitted, contents: Contents) -> str | None:
    """A quantized linear's weight that the class reads itself as it is loaded, where it is not there yet; None without one.

    The initialisation that the library runs at every load is run on linears that have no weight.
    """
    names = [name for name in fitted.skeleton.linears if fitted.origin[name] in contents.low_bit]
    model = fitted.skeleton.instance()
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)  # of its making; what is loaded is not marked
    for name in names:
        linear = model.get_submodule(name.rpartition(".")[0])
        del linear.weight
        linear.__class__, linear.place = _Packed, name.rpartition(".")[0]
    try:
        model.initialize_weights()
    except _NoWeightError as error:
        return str(error)
    except Exception:  # what a class cannot initialise without memory says nothing of weights
        return None
    return None


def whole_refusals(skeleton: Skeleton, contents: Contents, read: str) -> list[Refusal]:
    """Linears that cannot all be given their weights as they are loaded, which is by one scheme.

    Args:
        skeleton: the class.
        contents: the tensors.
        read: the weight that is needed, from :func:`read_at_loading`.
    """
    if _one_scheme(contents) is not None:
        return []
    linears = {name: codes for name, codes in contents.low_bit.items() if not _stacked(contents, name)}
    (first, one), *others = ((name, f"{codes.bits} bits in groups of {codes.group}") for name, codes in linears.items())
    odd, other = next((name, kind) for name, kind in others if kind != one)
    reason = (
        f"it has {other}, {first} has {one}; {skeleton.model_class} reads {read} itself as it is loaded, and transformers then "
        f"takes all linears for one kind: give them the same scheme and group; {ENGINES} run it as it is"
    )
    return [Refusal(odd, reason)]


def _one_scheme(contents: Contents) -> tuple[int, int] | None:
    """Bits and group (0 for one scale per row) of all linears; None where they differ."""
    linears = [codes for name, codes in contents.low_bit.items() if not _stacked(contents, name)]
    grouped = {(codes.bits, codes.group) for codes in linears}
    by_row = {(codes.bits, codes.group % codes.in_features) for codes in linears}
    return next((next(iter(found)) for found in (grouped, by_row) if len(found) == 1), None)


def quantization_config(fitted: Fitted, contents: Contents, whole: bool) -> dict[str, Any]:
    """The configuration's entry: one group per scheme, naming its modules.

    Args:
        fitted: class and configuration.
        contents: the tensors.
        whole: linears are given their weights as they are loaded.
    """
    schemes: dict[tuple[int, int], list[str]] = {}
    one = _one_scheme(contents) if whole else None
    for name in fitted.skeleton.shapes:
        codes = contents.low_bit.get(fitted.origin[name])
        if codes is not None:
            group = codes.group if codes.group < codes.in_features else 0
            if one is not None and not _stacked(contents, fitted.origin[name]):
                group = one[1]
            module = re.escape(name.rpartition(".")[0])
            # experts are single modules in the files only: transformers takes the group whose pattern names them
            target = rf"re:^{module}\..*$" if _stacked(contents, fitted.origin[name]) else f"re:^{module}$"
            schemes.setdefault((codes.bits, group), []).append(target)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": list(dict.fromkeys(targets)),
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group" if group else "channel",
                    "group_size": group or None,
                    "dynamic": False,
                },
            }
            for number, ((bits, group), targets) in enumerate(schemes.items())
        },
        "ignore": [],
    } | ({"dequantize": True} if whole else {})


def stored(graph: Graph, model: Any, name: str, codes: LowBit) -> dict[str, Tensor]:
    """The entries of a state dict for one weight.

    Args:
        graph: holds the codes: packed [..., out, groups, group * bits / 8], scale [..., out, groups].
        model: the model, for the names of single experts in the files.
        name: the weight's name in the model.
        codes: its codes.
    """
    packed, scale = graph.tensor(codes.packed).detach(), graph.tensor(codes.scale).detach()
    words = _words(packed.flatten(-2))
    if packed.dim() == 3:
        entries = {name: (words, scale)}
    else:  # [E, out, ...]: the library's own conversion takes stacked experts apart, whatever their last dimension
        from transformers.core_model_loading import revert_weight_conversion

        parts = [revert_weight_conversion(model, {name: tensor}) for tensor in (words, scale)]
        entries = {key: (parts[0][key], parts[1][key]) for key in parts[0]}
    found = {}
    for key, (word, factor) in entries.items():
        found[f"{key}_packed"], found[f"{key}_scale"] = word.contiguous(), factor.contiguous()
        found[f"{key}_shape"] = torch.tensor([factor.shape[0], codes.in_features], dtype=torch.int64)
    return found


def _words(rows: Tensor) -> Tensor:
    """Bytes [..., m] as int32 [..., ceil(m / 4)], the first byte lowest."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 4)).contiguous()
    return padded.view(torch.int32)
