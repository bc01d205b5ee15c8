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
    start, room, pitch, gap = 130, width - 130 - 78, 24, 12
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
                    bar.title or f"{bar.label}: {bar.text}", start - 10, y + 12.5, _short(bar.label, 17), start, y, _f(length),
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
            Markup('<text x="{}" y="{}" class="label" text-anchor="end">{}</text>').format(left - 12, _f(y + bar / 2 + 4), row)
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
            parts.append(_badge(right + column + 18 + 20 * place, y + bar / 2, min(8.0, bar / 2), number_of_pass, sites))
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
        parts.append(Markup(rect).format(title, _f(x), _f(y), _f(max(1.0, width - 1.5)), _f(height), _tone(region["kind"])))
        x += width
    return Markup("").join(parts)


def _badge(x: float, y: float, radius: float, index: int, sites: str) -> Markup:
    return Markup(
        '<g><title>pass {}{}</title><circle cx="{}" cy="{}" r="{}" class="badge"/>'
        '<text x="{}" y="{}" class="badge-text" text-anchor="middle" style="font-size: {}px">{}</text></g>'
    ).format(
        index + 1, f": {sites}" if sites else "", _f(x), _f(y), _f(radius), _f(x), _f(y + radius * 0.45),
        _f(radius * 1.3), index + 1,
    )  # fmt: skip


# -- the model along its residual stream --------------------------------------------------------------------------


def model_picture(view: Inspection) -> Markup:
    """Each residual stream as a vertical line, sublayers hanging off it; widths are parameters.

    Runs of equal blocks are drawn once.  Of a mixture of experts the part that one token uses is in full colour.
    """
    regions = [region for block in view.blocks for region in block.regions]
    ends = [region for stream in view.streams for region in (stream.prefix, stream.between, stream.suffix)]
    longest = max([region.parameters for region in (*regions, *ends)], default=0) or 1
    drawing = _Stream(_BAR_ROOM / longest)
    tables = ", ".join(f"{table.rows} x {table.width}" for table in view.embeddings)
    linears = ", ".join(f"{linear.name} {linear.in_features} > {linear.out_features}" for linear in view.linears)
    lone = len(view.streams) == 1
    for stream in view.streams:
        drawing.terminal("in: " + ", ".join(port.name for port in view.inputs) if lone else f"{stream.label} in")
        if tables and stream is view.streams[0]:
            drawing.sublayer(stream.prefix, "embedding", "embedding", tables, branch=False)
        else:
            drawing.sublayer(stream.prefix, "before", "other", stream.prefix.describe(), branch=False)
        _draw_blocks(drawing, view, stream.label)
        if stream.between.operators:
            drawing.sublayer(stream.between, "between", "other", stream.between.describe(), branch=False)
        text = linears if linears and stream is view.streams[-1] else stream.suffix.describe()
        drawing.sublayer(stream.suffix, "after", "head", text, branch=False)
        drawing.terminal("out: " + ", ".join(port.name for port in view.outputs) if lone else f"{stream.label} out")
    return drawing.svg("the model along its residual stream" + ("" if lone else "s"))


def _draw_blocks(drawing: _Stream, view: Inspection, stream: str) -> None:
    for block, count in view.folded(stream):
        name = f"block {block.index}" if count == 1 else f"blocks {block.index}-{block.index + count - 1}"
        drawing.open_frame()
        for region in block.regions:
            # a norm between sublayers is part of the stream, everything else adds to it
            branch = region.kind != "norm"
            drawing.sublayer(region, region.kind, _tone(region.kind), region.describe(), branch=branch)
        drawing.close_frame(name, f"{number(block.parameters)} each" if count > 1 else number(block.parameters))


_BAR_ROOM = 330.0  # the longest bar; its figures stand to its right
_LONGEST_TEXT = 96  # characters that fit beside the stream


class _Stream:
    """Draws from top to bottom; frames go behind the stream, everything else before it.

    Attributes:
        y: where the next thing starts.
    """

    _line, _boxes, _frame = 150.0, 216.0, 118.0

    def __init__(self, scale: float) -> None:
        self.y = 8.0
        self._scale = scale
        self._front: list[Markup] = []
        self._frames: list[Markup] = []
        self._ends: list[float] = []
        self._opened = 0.0

    def terminal(self, text: str) -> None:
        """An end of a stream: inputs or outputs."""
        self._front.append(
            Markup('<circle cx="{}" cy="{}" r="6" class="port"/><text x="{}" y="{}" class="value">{}</text>').format(
                _f(self._line), _f(self.y + 8), _f(self._line + 18), _f(self.y + 12.5), _short(text)
            )
        )
        self._ends.append(self.y + 8)
        self.y += 24

    def open_frame(self) -> None:
        """Start a run of blocks."""
        self._opened = self.y + 4
        self.y += 16

    def close_frame(self, name: str, facts: str) -> None:
        """End a run of blocks, and label it."""
        self.y += 6
        middle = (self._opened + self.y) / 2
        self._frames.append(
            Markup(
                '<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="12" class="frame"/>'
                '<text x="{l}" y="{a}" class="block" text-anchor="end">{name}</text>'
                '<text x="{l}" y="{b}" class="muted" text-anchor="end">{facts}</text>'
            ).format(
                x=_f(self._frame), y=_f(self._opened), w=_f(_WIDTH - self._frame - 2), h=_f(self.y - self._opened),
                l=_f(self._frame - 14), a=_f(middle - 2), b=_f(middle + 15), name=name, facts=facts,
            )
        )  # fmt: skip
        self.y += 8

    def sublayer(self, region: RegionView, kind: str, tone: str, text: str, *, branch: bool = True) -> None:
        """A sublayer that leaves the stream and returns to it, or (``branch=False``) a part of the stream itself."""
        width = max(3.0, self._scale * region.parameters)
        active = width * region.active_parameters / region.parameters if region.parameters else width
        facts = f"{number(region.parameters)} parameters"
        if region.active_parameters != region.parameters:
            facts = f"{number(region.parameters)} ({number(region.active_parameters)} active)"
        facts += f", {number(region.flops)} FLOPs" if region.flops else ""
        facts += f", {size(region.bytes)}"
        middle = self.y + 27
        self._front.append(self._branch(middle) if branch else self._spur(middle))
        title = "\n".join(filter(None, (f"{kind}: {text}", facts, region.reason)))
        self._front.append(
            Markup(
                '<g><title>{title}</title>'
                '<text x="{x}" y="{up}" class="value"><tspan class="kind">{kind}</tspan> {text}</text>'
                '<rect x="{x}" y="{y}" width="{w}" height="14" rx="4" class="t-{tone} idle"/>'
                '<rect x="{x}" y="{y}" width="{a}" height="14" rx="4" class="t-{tone}"/>'
                '<text x="{r}" y="{down}" class="muted">{facts}</text></g>'
            ).format(
                title=title, x=_f(self._boxes), up=_f(middle - 13), kind=kind, text=_short(text), y=_f(middle - 7),
                w=_f(width), a=_f(active), tone=tone, r=_f(self._boxes + width + 10), facts=facts,
                down=_f(middle + 4.5),
            )
        )  # fmt: skip
        self.y += 52

    def svg(self, description: str) -> Markup:
        """The drawing."""
        lines = [
            Markup('<line x1="{0}" y1="{1}" x2="{0}" y2="{2}" class="stream"/>').format(_f(self._line), _f(start), _f(stop))
            for start, stop in zip(self._ends[::2], self._ends[1::2], strict=True)
        ]
        return _svg([*self._frames, *lines, *self._front], _WIDTH, self.y, description)

    def _branch(self, middle: float) -> Markup:
        return Markup(
            '<path d="M{s} {a} C{s} {m} {c} {m} {x} {m}" class="branch"/>'
            '<path d="M{x} {n} C{c} {n} {s} {n} {s} {b}" class="branch"/>'
            '<circle cx="{s}" cy="{b}" r="5" class="join"/><path d="M{p} {b} H{q} M{s} {t} V{u}" class="plus"/>'
        ).format(
            s=_f(self._line), x=_f(self._boxes - 4), c=_f(self._line + 20), a=_f(middle - 26), m=_f(middle - 4),
            n=_f(middle + 4), b=_f(middle + 20), p=_f(self._line - 3), q=_f(self._line + 3), t=_f(middle + 17),
            u=_f(middle + 23),
        )  # fmt: skip

    def _spur(self, middle: float) -> Markup:
        return Markup('<path d="M{} {} H{}" class="branch"/>').format(_f(self._line), _f(middle), _f(self._boxes - 4))


def _short(text: str, longest: int = _LONGEST_TEXT) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _tone(kind: str) -> str:
    return kind if kind in KINDS else "other"


def _f(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".removesuffix(".0")


def _svg(parts: Sequence[Markup], width: float, height: float, description: str) -> Markup:
    return Markup('<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" aria-label="{2}">{3}</svg>').format(
        _f(width), _f(height), description, Markup("").join(parts)
    )
