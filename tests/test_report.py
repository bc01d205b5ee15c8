"""The report: JSON round trip, the terminal at 80 columns, HTML that is well-formed, escaped and self-contained."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from surgeon import formatting
from surgeon.picture import Bar, bars, blocks_picture
from surgeon.report import Comparison, Latency, PassReport, Report, render_terminal
from surgeon.report_html import render_html
from tests.pages import Page

EVIL = "<script>alert('&\"')</script>"


def region(kind: str, size: int, active: int | None = None) -> dict[str, Any]:
    active = size if active is None else active
    return {
        "kind": kind, "parameters": size, "active_parameters": active, "bytes": 4 * size, "flops": 2 * active,
        "text": f"{kind} {EVIL}",
    }  # fmt: skip


def side(blocks: int, ffn: str = "ffn") -> dict[str, Any]:
    parts = [region("attention", 1000), region(ffn, 3000, 1500 if ffn == "moe" else None)]
    whole = {**region("attention+ffn", 4000), "regions": parts}
    rest = region("prefix", 500)
    return {
        **region("model", 4000 * blocks), "prefix": rest, "suffix": rest, "unrecognised": {},
        "blocks": [{**whole, "index": index} for index in range(blocks)],
    }  # fmt: skip


def step(name: str, sites: list[str], removed: list[int] | None = None, *, exact: bool = False) -> PassReport:
    return PassReport(
        name=name, fields={"count": 2}, summary=f"{len(sites)} sites [bold]{EVIL}", exact=exact, seconds=1.25,
        observed_tokens=4096, parameters=(24_000, 16_000), active_parameters=(24_000, 12_000), bytes=(96_000, 64_000),
        divergence={"relative_error": 0.0123, "cosine_similarity": 0.98765, "kl": math.inf, "perplexity": 11.2},
        notes=["left block 0 alone [/red]"], plan={"decisions": [{"site": site} for site in sites], "notes": []},
        removed_blocks=removed or [],
    )  # fmt: skip


@pytest.fixture
def report() -> Report:
    return Report(
        surgeon="0.1.0",
        versions={"torch": "2.13.0", "evil": EVIL},
        model={"description": f"a [red]model[/red] {EVIL}", "task": "forward", "inputs": {"input_ids": ["batch"]}},
        recipe={"passes": [{"drop_blocks": {"count": 2}}]},
        structure={"before": side(6), "after": side(4, "moe")},
        passes=[
            step("drop_blocks", ["blocks.1", "blocks.4"], [1, 4]),
            step("moefy_ffn", ["blocks.0.ffn", "blocks.1.ffn", "blocks.3.ffn"]),
            step("rename_nothing", [], exact=True),
        ],
        quality={"cosine_similarity": 0.9912, "artifact_cosine_similarity": 0.9907, "kl": math.nan},
        bytes=(90_868_370, 21_400_000),
        parameters=(22_713_216, 19_164_288),
        active_parameters=(22_713_216, 15_615_360),
        artifact={
            "folder": "/tmp/a folder/" + "with-a-long-name/" * 8,
            "backend": "onnxruntime",
            "options": {"provider": "cpu"},
            "files": [{"path": "model.onnx", "bytes": 21_400_000, "sha256": "0" * 64}],
            "details": {"operators": {"MatMul": 12}, "note": EVIL},
        },
        comparisons=[
            Comparison(shapes={"input_ids": [3, 17]}, relative_error={"out": 2e-3}, cosine={"out": 0.99999}),
            Comparison(shapes={"input_ids": [1, 64]}, relative_error={"out": 5e-3}, cosine={"out": 0.99991}),
        ],
        latency=[
            Latency(batch=1, length=128, eager_ms=24.0, artifact_ms=8.0, threads=2),
            Latency(batch=32, length=128, eager_ms=612.0, artifact_ms=816.0, threads=2),
        ],
        seconds={"load": 1.0, "trace": 8.0, "total": 74.4},
        peak_memory_bytes=612_000_000,
        warnings=["the calibration text is short " + EVIL],
    )


@pytest.fixture
def bare() -> Report:
    return Report(surgeon="0.1.0", bytes=(8, 8), parameters=(2, 2), active_parameters=(2, 2))


def printed(report: Report, width: int = 80) -> str:
    text = io.StringIO()
    render_terminal(report, Console(file=text, width=width))
    return text.getvalue()


# -- data ---------------------------------------------------------------------------------------------------------


def test_json_round_trip(report: Report) -> None:
    again = Report.from_json(report.to_json())
    assert math.isnan(again.quality.pop("kl"))
    assert math.isnan(report.quality.pop("kl"))
    assert again.passes[0].divergence["kl"] == math.inf
    assert again == report
    assert again.passes[0].parameters == (24_000, 16_000)


def test_json_with_an_unknown_field_is_refused(bare: Report) -> None:
    with pytest.raises(ValidationError, match="speed"):
        Report.from_json(bare.to_json().replace('"surgeon"', '"speed": 1, "surgeon"', 1))


def test_the_page_spells_names_and_numbers(report: Report) -> None:
    page = render_html(report, None)
    assert "<h3>KL</h3>" in page
    assert "2 threads</h3>" in page
    report.latency = [row.model_copy(update={"threads": 1}) for row in report.latency]
    assert "1 thread</h3>" in render_html(report, None)


def test_phases_and_devices_are_named_where_they_are_not_the_usual_ones(report: Report) -> None:
    first, second = report.latency
    for text in (printed(report), render_html(report, None)):
        assert "batch 1, length 128" in text
        assert "forward, batch" not in text
        assert "median, cpu" not in text
        assert "threads, cpu" not in text
    older = report.to_json().replace('"phase": "forward",', "").replace(',\n      "device": "cpu"', "")
    assert "phase" not in older
    assert '      "device"' not in older  # of a latency; the report's own stands further left
    assert Report.from_json(older).latency == report.latency  # as reports were before there were such fields
    report.latency = [
        first.model_copy(update={"phase": "prefill", "device": "cuda:0"}),
        second.model_copy(update={"phase": "decode", "device": "cuda:0"}),
    ]
    table, page = printed(report), render_html(report, None)
    assert "latency (median, cuda:0, 2 threads)" in table
    assert "2 threads, cuda:0</h3>" in page
    for title in ("prefill, batch 1, length 128", "decode, batch 32, behind 128"):
        assert title in table
        assert title in page
    for label in ("prefill, batch 1<", "decode, batch 32<"):  # of the chart
        assert label in page


def test_derived_figures(report: Report) -> None:
    assert [row.ratio for row in report.latency] == [3.0, 0.75]
    assert report.worst_errors() == {"out": (5e-3, 0.99991)}
    table = {name: (graph, artefact) for name, graph, artefact in report.quality_table()}
    assert table["cosine_similarity"] == (0.9912, 0.9907)
    assert table["kl"][1] is None
    assert report.passes[0].sites == ["blocks.1", "blocks.4"]


# -- numbers as text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.number(22_713_216), "22.7 M"),
        (formatting.number(999_949), "1.00 M"),
        (formatting.number(999), "999"),
        (formatting.number(0), "0"),
        (formatting.number(-1500), "-1.50 k"),
        (formatting.number(math.inf), "inf"),
        (formatting.size(90_868_370), "90.9 MB"),
        (formatting.size(12), "12 B"),
        (formatting.milliseconds(8.314), "8.31 ms"),
        (formatting.milliseconds(1204), "1.20 s"),
        (formatting.seconds(0.001), "0 s"),
        (formatting.seconds(185), "3 min 05 s"),
        (formatting.seconds(7325), "2 h 02 min"),
        (formatting.percent(21.4, 90.9), "23.5 %"),
        (formatting.percent(1, 0), "-"),
        (formatting.figure(0.000123456), "0.0001235"),
        (formatting.figure(True), "True"),
        (formatting.heading("/data/models/tiny"), "models/tiny"),
        (formatting.heading("org/name"), "org/name"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected


# -- terminal -----------------------------------------------------------------------------------------------------


def test_terminal_does_not_stretch_over_a_wide_screen(report: Report) -> None:
    folder = report.artifact["folder"] if report.artifact else ""
    assert max(len(line) for line in printed(report, 300).splitlines() if folder not in line) <= 100


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_fits_the_width(report: Report, width: int) -> None:
    lines = printed(report, width).splitlines()
    folder = report.artifact["folder"] if report.artifact else ""
    assert all(len(line) <= width for line in lines if folder not in line)
    assert [line for line in lines if folder in line]  # a path is never broken, so that it can be copied
    assert not [line for line in lines if "\x1b" in line]


def test_terminal_shows_what_the_demo_promises(report: Report) -> None:
    text = re.sub(r"\s+", " ", printed(report))
    for words in (
        "size 90.9 MB 21.4 MB 23.6 %", "parameters 22.7 M 19.2 M 84.4 %", "active parameters 22.7 M 15.6 M 68.8 %",
        "batch 1, length 128 24.0 ms 8.00 ms 3.00x", "batch 32, length 128 612 ms 816 ms 0.75x", "2 threads",
        "cosine similarity 0.9912 0.9907", "drop_blocks lossy", "rename_nothing exact", "2 sites [bold]<script>",
        "left block 0 alone [/red]", "out 5.00e-03 0.999910", "report.html", "model.onnx 21.4 MB",
        "a [red]model[/red]", "74.4 s in all", "the calibration text is short",
    ):  # fmt: skip
        assert words in text, words


def test_terminal_without_unicode(report: Report) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    render_terminal(report, Console(file=stream, width=80))
    stream.flush()
    assert b"active parameters" in raw.getvalue()


def test_terminal_of_a_build_that_did_nothing(bare: Report) -> None:
    text = printed(bare)
    assert "torch graph" in text
    assert "passes" not in text


# -- HTML ---------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_escaped(report: Report) -> None:
    html = render_html(report)
    page = Page(html)  # refuses scripts, external references and unclosed tags
    assert EVIL not in html
    assert page.text.count(EVIL) >= 5  # description, warning, summary, hover titles, versions
    for words in ("90.9 MB", "21.4 MB", "3.00x faster", "0.75x as fast", "drop_blocks", "Artefact against graph"):
        assert words in page.text, words
    assert page.tags.count("svg") == 8  # size, latency, blocks, size after each pass, four measures


def test_page_of_a_build_that_did_nothing(bare: Report) -> None:
    page = Page(render_html(bare))
    assert "kept as a torch graph" in page.text
    assert page.tags.count("svg") == 1


def test_bars_are_proportional() -> None:
    picture = bars([[Bar("a", 8.0, "8"), Bar("b", 2.0, "2"), Bar("c", 0.0, "0")]], "test")
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', picture)]
    assert widths[0] == pytest.approx(4 * widths[1], rel=1e-2)
    assert 0 < widths[2] < 2  # visible all the same


def test_blocks_keep_their_place(report: Report) -> None:
    picture = blocks_picture(report)
    assert picture is not None
    # removed: 1 and 4; then the second pass calls the survivors 0, 2, 3, 5 by new numbers 0 to 3 and touches 0, 1, 3
    assert re.findall(r"block (\d+) was removed by drop_blocks", picture) == ["1", "4"]
    touched = re.findall(r"<title>pass (\d)(?:: ([\w., ]+))?</title><circle cx=\"[\d.]+\" cy=\"([\d.]+)\"", picture)
    rows = sorted({float(y) for *_, y in touched})
    assert [(n, s, rows.index(float(y))) for n, s, y in touched] == [
        ("2", "blocks.0.ffn", 0), ("1", "blocks.1", 1), ("2", "blocks.1.ffn", 2), ("1", "blocks.4", 3),
        ("2", "blocks.3.ffn", 4),
    ]  # fmt: skip
    pitch = min(later - earlier for earlier, later in zip(rows, rows[1:], strict=False))
    assert [round((y - rows[0]) / pitch) for y in rows] == [0, 1, 2, 4, 5]  # source blocks; 3 was not touched
    widths = re.findall(r'width="([\d.]+)" height="[\d.]+" rx="3" class="t-attention"', picture)
    assert len(widths) == 6 + 4
    assert len(set(widths)) == 1


def test_blocks_without_structure_are_left_out(bare: Report) -> None:
    assert blocks_picture(bare) is None


def test_report_says_what_became_of_the_graph(report: Report) -> None:
    kinds = {f"Kind{number}": 10 - number for number in range(10)}
    assert report.artifact is not None
    report.artifact["details"] = {
        "nodes": 60, "fused": {"matmul_nbits": 4}, "operators": {"com.microsoft.MatMulNBits": 4, **kinds},
    }  # fmt: skip
    report.seconds |= {"lower": 12.0, "check": 0.5}
    rows = dict(report.lowering_table())
    assert rows["nodes"] == "60"
    assert rows["fused"] == "matmul nbits 4"
    assert rows["55 other nodes"].startswith("Kind0 10, Kind1 9,")
    assert rows["55 other nodes"].endswith("Kind7 3, 3 of 2 more kinds")
    assert (rows["size"], rows["lowered in"], rows["checked in"]) == ("21.4 MB", "12.0 s", "0.50 s")
    text = printed(report)
    assert "lowered to onnxruntime" in text
    assert "matmul nbits 4" in Page(render_html(report)).text
    report.artifact = None
    assert report.lowering_table() == []
