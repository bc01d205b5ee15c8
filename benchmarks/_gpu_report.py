"""The table of the GPU benchmark, and whether its targets were met."""

from __future__ import annotations

from typing import Any

from _gpu_floor import Cell, Shape, cells, floor_bytes
from torch import Tensor

PEERS = ("eager", "torch.compile")
TARGETS = {"floor": 1.3, "compound_speed": 6.05, "compound_memory": 0.23}
WRONG = 0.1
"""Relative error from which on the logits of a token are not those of the graph rounded otherwise."""
FLIPPED = 0.25
"""Share of such tokens from which on a phase is wrong, and its cells have no time.

Fewer are rounding too: experts of random weights have nearly equal scores for some tokens, and which of them is chosen
depends on the last place.  Between this graph in bfloat16 and in float32 (four layers of a quarter of the width, 96 tokens) up
to 6 % of the tokens differ by more than ``WRONG``, the others by 0.015.
"""


def stored_as(variant: str) -> str:
    """The variant whose model the peers run."""
    return variant.replace("int4", "").strip() or "whole"


def line(variant: str, runtime: str, found: dict[str, Any]) -> str:
    if "problem" in found:
        return f"{variant:14}{runtime:16}{found['problem']}"
    figures = [f"{cell['tokens_per_second']:.4g}" if "problem" not in cell else "failed" for cell in found["cells"]]
    when = f"  {found['measured']}" if "measured" in found else ""
    cells_of = "".join(f"{figure:>14}" for figure in figures)
    return f"{variant:14}{runtime:16}{cells_of}{found['bytes'] / 1e9:>10.2f} GB{when}"


def wrong_tokens(found: Tensor, wanted: Tensor) -> float:
    """Share of the tokens whose logits [..., vocabulary] differ by more than ``WRONG`` of their norm, or are no numbers."""
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return 1.0 - float((errors < WRONG).float().mean())


def wrong_cells(shape: Shape, shares: list[float]) -> dict[Cell, str]:
    """The cells whose phase gave wrong logits, and how wrong; ``shares`` of wrong tokens: of decoding and prefill."""
    found = dict(zip(("decode", "prefill"), shares, strict=False))
    return {
        cell: f"its logits are wrong: those of {found[cell.phase]:.0%} of the tokens differ from the graph's"
        for cell in cells(shape) if not found.get(cell.phase, 0.0) < FLIPPED
    }  # fmt: skip


def add_floors(shape: Shape, results: dict[str, Any]) -> None:
    """Beside each decoding time the least that the bytes of its own variant allow (of the whole numbers for peers of int4)."""
    rate = results["bandwidth"]
    for variant, runtimes in results["cells"].items():
        for runtime, found in runtimes.items():
            stored = stored_as(variant) if runtime in PEERS else variant
            for cell in found["cells"]:
                if "problem" not in cell and cell["phase"] == "decode" and rate:
                    floor = 1e3 * floor_bytes(shape, stored, Cell("decode", cell["batch"], cell["length"])) / rate
                    cell["floor_ms"], cell["over_floor"] = floor, cell["median_ms"] / floor


def print_table(shape: Shape, results: dict[str, Any]) -> None:
    """Tokens per second by cell; of decode also the times over the floor."""
    rate = results["bandwidth"]
    print(f"\n{results['device']}, torch {results['torch']}; {rate / 1e12:.2f} TB/s ({results['bandwidth_known_from']})")
    heads = [f"{cell.phase} b{cell.batch}" for cell in cells(shape)]
    print(f"{'tokens/s':14}{'':16}" + "".join(f"{head:>14}" for head in heads) + f"{'bytes':>13}")
    for variant, runtimes in results["cells"].items():
        for runtime, found in runtimes.items():
            print(line(variant, runtime, found))
            if errors := found.get("relative_errors"):
                listed = ", ".join(f"{error:.1e}" for error in errors)
                shares = ", ".join(f"{share:.0%}" for share in found.get("wrong_tokens", []))
                beyond = f"; tokens beyond {WRONG}: {shares}" if shares else ""
                print(f"{'':30}logits against the graph (decode, prefill): relative errors {listed}{beyond}")
            for cell in found["cells"]:
                if "problem" in cell:
                    print(f"{'':30}{cell['phase']} b{cell['batch']}: {cell['problem']}")
                elif "over_floor" in cell:
                    over = f"{cell['over_floor']:.2f}x of its floor of {cell['floor_ms']:.3f} ms"
                    print(f"{'':30}decode b{cell['batch']}: {cell['median_ms']:.3f} ms, {over}")
                for launch in cell.get("launches", [])[:30]:
                    print(f"{'':32}{launch['microseconds']:10.1f} us{launch['times']:7.1f} x {launch['kernel'][:90]}")
    for text in judged(results):
        print(text)


def judged(results: dict[str, Any]) -> list[str]:
    """The targets, and whether they were met; a figure that is missing meets none."""
    ours = ("aotinductor", "onnxruntime")
    found = results["cells"]

    def speed(variant: str, runtime: str, index: int) -> float | None:
        listed = found.get(variant, {}).get(runtime, {}).get("cells", [])
        value: float | None = listed[index].get("tokens_per_second") if index < len(listed) else None
        return value

    verdicts = []
    for variant in found:
        for index, name in enumerate(("prefill b1", "decode b1", "decode b16")):
            best = max((s for runtime in ours if (s := speed(variant, runtime, index)) is not None), default=None)
            peer = speed(variant, "torch.compile", index)
            if best is None or peer is None:
                verdicts.append(f"{variant}, {name}: not measured against torch.compile")
            else:
                verdicts.append(f"{variant}, {name}: {best / peer:.2f}x torch.compile, needed more than 1: {_met(best > peer)}")
    over = [
        cell["over_floor"]
        for runtime in ours
        for cell in found.get("whole", {}).get(runtime, {}).get("cells", [])
        if "over_floor" in cell
    ]
    if over:
        met = _met(min(over) <= TARGETS["floor"])
        verdicts.append(f"whole, decode: {min(over):.2f}x of the floor at best, needed {TARGETS['floor']}x: {met}")
    base, base_bytes = speed("whole", "eager", 1), found.get("whole", {}).get("eager", {}).get("bytes")
    for runtime in ours:
        compound, size = speed("dropped int4", runtime, 1), found.get("dropped int4", {}).get(runtime, {}).get("bytes")
        if base and base_bytes and compound and size:
            met = _met(compound / base > TARGETS["compound_speed"] and size / base_bytes < TARGETS["compound_memory"])
            verdicts.append(
                f"dropped int4 on {runtime}: {compound / base:.2f}x eager, {size / base_bytes:.1%} of its bytes, needed "
                f"{TARGETS['compound_speed']}x and {TARGETS['compound_memory']:.0%}: {met}"
            )
    return verdicts


def _met(condition: bool) -> str:
    return "met" if condition else "missed"
