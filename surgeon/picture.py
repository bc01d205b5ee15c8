"""Pictures as inline SVG: bars, the blocks before and after, and the model along its residual stream.

Colours are CSS variables of the page (``templates/base.html``), so the pictures follow its light or dark scheme.  Every
text goes through ``markupsafe``, which escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from surgeon.formatting import number, size

if TYPE_CHECKING:
    from surgeon.report import Report
    from surgeon.views import Inspection, RegionView

KINDS = ("attention", "ffn", "moe", "parallel", "mixer", "norm", "other", "embedding", "head")
"""Kinds of parts that have a colour, ``--<kind>``."""

_WIDTH = 940


class Bar(NamedTuple):
    """One bar of a chart.

    Attributes:
        label: what it is, left of it.
        value: its length.
        text: its value as text, right of it.
        tone: ``before``, ``after``, or a kind from :data:`KINDS`.
        title: shown when hovered.
    """

    label: str
    value: float
    text: str
    tone: str = "after"
    title: str = ""


def bars(groups: Sequence[Sequence[Bar]], description: str, width: int = 460) -> Markup:
    """Horizontal bars, in groups that share one scale.

    Args:
        groups: bars that belong together; a gap is left between groups.
        description: what the chart shows, for screen readers.
        width: of the drawing in pixels.
    """
    start, room, pitch, gap = 118, width - 118 - 78, 24, 12
    longest = max((bar.value for group in groups for bar in group), default=0) or 1
    y, parts = 2, []
    for group in groups:
        for bar in group:
            length = max(1.5, room * max(bar.value, 0) / longest)
            parts.append(
                Markup(
                    '<g><title>{}</title><text x="{}" y="{}" class="label" text-anchor="end">{}</text>'
                    '<rect x="{}" y="{}" width="{}" height="16" rx="3" class="t-{}"/>'
                    '<text x="{}" y="{}" class="value">{}</text></g>'
                ).format(
                    bar.title or f"{bar.label}: {bar.text}", start - 10, y + 12.5, bar.label, start, y, _f(length),
                    bar.tone, _f(start + length + 8), y + 12.5, bar.text,
                )
            )  # fmt: skip
            y += pitch
        y += gap
    return _svg(parts, width, y - gap, description)


def blocks_picture(report: Report) -> Markup | None:
    """Every block of the source as a row, and beside it what became of it; widths are bytes as stored.

    Returns:
        The picture; None where the report holds no structure before and after.
    """
    before, after = report.structure.get("before"), report.structure.get("after")
    if not before or not after or not before["blocks"]:
        return None
    fates, touched = _fates(report, len(before["blocks"]))
    survivors = [index for index, gone in enumerate(fates) if gone is None]
    aligned = len(survivors) == len(after["blocks"])
    position = {index: place for place, index in enumerate(survivors)} if aligned else {}
    rows = max(len(before["blocks"]), len(after["blocks"]))
    pitch = max(9.0, min(26.0, 1400 / rows))
    column, left, right, head = 360, 52, 472, 26
    longest = max((b["bytes"] for side in (before, after) for b in side["blocks"]), default=0) or 1
    scale = column / longest
    parts = [
        Markup('<text x="{}" y="14" class="caption">{}</text>').format(x, text)
        for x, text in ((left, "before"), (right, "after"))
    ]
    for row in range(rows):
        y = head + row * pitch
        bar = pitch - max(2.0, pitch * 0.22)
        parts.append(
            Markup('<text x="{}" y="{}" class="label" text-anchor="end">{}</text>').format(
                left - 12, _f(y + bar / 2 + 4), row
            )
            if pitch >= 12 or row % 5 == 0
            else Markup("")
        )
        if row < len(before["blocks"]):
            parts.append(_strip(before["blocks"][row], left, y, bar, scale))
        if not aligned:
            if row < len(after["blocks"]):
                parts.append(_strip(after["blocks"][row], right, y, bar, scale))
            continue
        fate = fates[row]
        if fate is not None:
            name = report.passes[fate].name
            parts.append(
                Markup(
                    '<g><title>block {} was removed by {}</title><rect x="{}" y="{}" width="{}" height="{}" rx="3" '
                    'class="ghost"/></g>'
                ).format(row, name, right, _f(y), _f(scale * before["blocks"][row]["bytes"]), _f(bar))
            )
        else:
            parts.append(_strip(after["blocks"][position[row]], right, y, bar, scale))
        for place, number_of_pass in enumerate(sorted(touched[row])):
            sites = ", ".join(touched[row][number_of_pass])
            parts.append(
                _badge(right + column + 18 + 20 * place, y + bar / 2, min(8.0, bar / 2), number_of_pass, sites)
            )
    return _svg(parts, _WIDTH, head + rows * pitch + 2, "blocks of the model before and after")


def _fates(report: Report, blocks: int) -> tuple[list[int | None], list[dict[int, list[str]]]]:
    """Of every source block: the pass that removed it, and the sites that each pass touched in it.

    Passes count blocks as they find them, so that indices are followed back through the removals before.
    """
    fates: list[int | None] = [None] * blocks
    touched: list[dict[int, list[str]]] = [{} for _ in range(blocks)]
    origin = list(range(blocks))
    for index, step in enumerate(report.passes):
        for site in step.sites:
            match = re.match(r"blocks\.(\d+)\b", site)
            if match and int(match[1]) < len(origin):
                touched[origin[int(match[1])]].setdefault(index, []).append(site)
        for gone in step.removed_blocks:
            if gone < len(origin):
                fates[origin[gone]] = index
                touched[origin[gone]].setdefault(index, [])
        origin = [block for place, block in enumerate(origin) if place not in step.removed_blocks]
    return fates, touched


def _strip(block: Mapping[str, Any], x: float, y: float, height: float, scale: float) -> Markup:
    """One block: its sublayers side by side."""
    parts = []
    for region in block["regions"]:
        width = max(2.0, scale * region["bytes"])
        title = f"block {block['index']} {region['kind']}: {region['text']}\n{number(region['parameters'])} parameters"
        if region["active_parameters"] != region["parameters"]:
            title += f", {number(region['active_parameters'])} active"
        title += f", {size(region['bytes'])}"
        rect = '<g><title>{}</title><rect x="{}" y="{}" width="{}" height="{}" rx="3" class="t-{}"/></g>'
        parts.append(
            Markup(rect).format(title, _f(x), _f(y), _f(max(1.0, width - 1.5)), _f(height), _tone(region["kind"]))
        )
        x += width
    return Markup("").join(parts)


def _badge(x: float, y: float, radius: float, index: int, sites: str) -> Markup:
    return Markup(
        '<g><title>pass {}{}</title><circle cx="{}" cy="{}" r="{}" class="badge"/>'
        '<text x="{}" y="{}" class="badge-text" text-anchor="middle" font-size="{}">{}</text></g>'
    ).format(
        index + 1, f": {sites}" if sites else "", _f(x), _f(y), _f(radius), _f(x), _f(y + radius * 0.45),
        _f(radius * 1.3), index + 1,
    )  # fmt: skip


# -- the model along its residual stream --------------------------------------------------------------------------


def model_picture(view: Inspection) -> Markup:
    """The residual stream as a vertical line, sublayers hanging off it; widths are parameters.

    Runs of equal blocks are drawn once.  Of a mixture of experts the part that one token uses is in full colour.
    """
    stream, boxes, room = 150.0, 216.0, 300.0
    folded = view.folded()
    regions = [region for block, _ in folded for region in block.regions]
    longest = max([region.parameters for region in (*regions, view.prefix, view.suffix)], default=0) or 1
    parts: list[Markup] = []
    y = 8.0
    names = ", ".join(port.name for port in view.inputs)
    y = _terminal(parts, stream, y, f"in: {names}")
    top = y
    tables = (
        ", ".join(f"{e.name} {e.rows} x {e.width}" for e in view.embeddings) or f"{view.prefix.operators} operators"
    )
    y = _sublayer(parts, view.prefix, "embedding", tables, (stream, boxes, room / longest), y, branch=False)
    for block, count in folded:
        y += 6
        start = y
        y += 12
        for region in block.regions:
            y = _sublayer(parts, region, _tone(region.kind), region.describe(), (stream, boxes, room / longest), y)
        y += 2
        last = block.index + count - 1
        name = f"block {block.index}" if count == 1 else f"blocks {block.index}-{last}"
        frame = (
            '<rect x="118" y="{}" width="{}" height="{}" rx="12" class="frame"/>'
            '<text x="104" y="{}" class="block" text-anchor="end">{}</text>'
            '<text x="104" y="{}" class="muted" text-anchor="end">{}</text>'
            '<text x="104" y="{}" class="muted" text-anchor="end">{}</text>'
        )
        middle = (start + y) / 2
        parts.insert(
            0,
            Markup(frame).format(
                _f(start), _WIDTH - 120, _f(y - start), _f(middle - 8), name, _f(middle + 9),
                f"{number(block.parameters)} params", _f(middle + 25), f"{count} alike" if count > 1 else "",
            ),
        )  # fmt: skip
        y += 6
    heads = ", ".join(f"{linear.name} {linear.in_features} > {linear.out_features}" for linear in view.linears)
    text = heads or f"{view.suffix.operators} operators"
    y = _sublayer(parts, view.suffix, "head", text, (stream, boxes, room / longest), y + 4, branch=False)
    line = Markup('<line x1="{0}" y1="{1}" x2="{0}" y2="{2}" class="stream"/>').format(stream, _f(top), _f(y))
    y = _terminal(parts, stream, y, f"out: {', '.join(port.name for port in view.outputs)}")
    frames = sum(1 for _ in folded)
    return _svg([*parts[:frames], line, *parts[frames:]], _WIDTH, y + 6, "the model along its residual stream")


def _terminal(parts: list[Markup], stream: float, y: float, text: str) -> float:
    parts.append(
        Markup('<circle cx="{}" cy="{}" r="6" class="port"/><text x="{}" y="{}" class="value">{}</text>').format(
            stream, _f(y + 8), stream + 18, _f(y + 12.5), text
        )
    )
    return y + 16


def _sublayer(
    parts: list[Markup], region: RegionView, tone: str, text: str, across: tuple[float, float, float], y: float,
    *, branch: bool = True,
) -> float:  # fmt: skip
    """Draw one sublayer from height y and return where it ends."""
    stream, x, scale = across
    width = max(3.0, scale * region.parameters)
    active = width * region.active_parameters / region.parameters if region.parameters else width
    facts = f"{number(region.parameters)} parameters"
    facts += f" ({number(region.active_parameters)} active)" if region.active_parameters != region.parameters else ""
    facts += f", {number(region.flops)} FLOPs per token" if region.flops else ""
    facts += f", {size(region.bytes)}"
    middle = y + 20
    if branch:
        parts.append(
            Markup(
                '<path d="M{s} {a} C{s} {m} {c} {m} {x} {m}" class="branch"/>'
                '<path d="M{x} {n} C{c} {n} {s} {n} {s} {b}" class="branch"/>'
                '<circle cx="{s}" cy="{b}" r="5" class="join"/>'
                '<path d="M{p} {b} H{q} M{s} {t} V{u}" class="plus"/>'
            ).format(
                s=stream, x=x - 4, c=stream + 20, a=_f(y - 2), m=_f(middle - 4), n=_f(middle + 4), b=_f(middle + 20),
                p=stream - 3, q=stream + 3, t=_f(middle + 17), u=_f(middle + 23),
            )
        )  # fmt: skip
    else:
        parts.append(Markup('<path d="M{} {} H{}" class="branch"/>').format(stream, _f(middle), x - 4))
    parts.append(
        Markup(
            '<g><title>{title}</title><rect x="{x}" y="{y}" width="{w}" height="20" rx="4" class="t-{tone} idle"/>'
            '<rect x="{x}" y="{y}" width="{a}" height="20" rx="4" class="t-{tone}"/>'
            '<text x="{l}" y="{up}" class="value"><tspan class="kind">{kind}</tspan> {text}</text>'
            '<text x="{l}" y="{down}" class="muted">{facts}</text></g>'
        ).format(
            title=f"{region.kind}: {text}\n{facts}" + (f"\n{region.reason}" if region.reason else ""), x=x,
            y=_f(middle - 10), w=_f(width), a=_f(active), tone=tone, l=_f(x + width + 14), up=_f(middle - 1.5),
            kind=tone if not branch else region.kind, text=text, down=_f(middle + 14), facts=facts,
        )
    )  # fmt: skip
    return y + 48


def _tone(kind: str) -> str:
    return kind if kind in KINDS else "other"


def _f(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".removesuffix(".0")


def _svg(parts: Sequence[Markup], width: float, height: float, description: str) -> Markup:
    return Markup('<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">{3}</svg>').format(
        _f(width), _f(height), description, Markup("").join(parts)
    )
