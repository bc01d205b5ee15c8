"""The page of the survey: counts by library, and a line for every model that is not right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from surgeon.environment import version_of

STATUSES = ("right", "opaque", "differs", "refused", "not traced", "crashed", "timed out", "not built")
HEAD = """\
# Survey

Structure discovery over models that no test holds, at tiny size and random weights, compared with what their
configurations say: blocks, heads, key/value heads, widths, activations, experts. Made by `benchmarks/survey.py`.

- *right*: everything that the configuration says was found so, no part is opaque, every weight has a role;
- *opaque*: nothing is found otherwise than it is said, and parts are not understood, with the reason;
- *differs*: something was found otherwise than it is said (either side may be wrong);
- *refused*: the model has no structure that is known, with the reason;
- *not traced*: with the first line of the error; *not built*: the survey's own rules made no small model or no inputs.
"""


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page in Markdown."""
    libraries = list(dict.fromkeys(name.partition("/")[0] for name in rows))
    lines = [HEAD, f"| | {' | '.join(STATUSES)} | all |", "|---" * (len(STATUSES) + 2) + "|"]
    for library in libraries:
        counts = Counter(row["status"] for name, row in rows.items() if name.startswith(f"{library}/"))
        version = version_of(library) or ""
        cells = [str(counts.get(status, 0)) for status in STATUSES]
        lines.append(f"| {library} {version} | {' | '.join(cells)} | {sum(counts.values())} |")
    lines += ["", "Models without a row were not looked at yet (`--missing` does it, in an order by lot).", ""]
    lines += [*_mixtures(rows), *_passes(rows)]
    for status in STATUSES[1:]:
        own = {name: row for name, row in rows.items() if row["status"] == status}
        if own:
            lines += [f"## {status.capitalize()}", "", "| model | why |", "|---|---|"]
            lines += [f"| {name} | {_cell(_why(row))} |" for name, row in sorted(own.items())]
            lines.append("")
    return "\n".join(lines)



def _why(row: Mapping[str, Any]) -> str:
    if row.get("differs"):
        return "; ".join([*row["differs"], *([row["note"]] if "note" in row else [])])
    if row.get("opaque"):
        first, *rest = row["opaque"]
        return first + (f" (and {len(rest)} more)" if rest else "")
    return str(row.get("reason", ""))


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:300]


def _mixtures(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What was found of every model with experts, and how many of them are as their configurations say."""
    keys = ("experts", "top_k", "scoring", "normalised", "scale", "groups", "shared")
    speaking = {name: row for name, row in rows.items() if any(part.get("experts") for part in row.get("said", ()))}
    if not speaking:
        return []
    table, right = [], 0
    for name, row in sorted(speaking.items()):
        streams = [stream for stream in row.get("found", ()) if stream["moes"]]
        wrong = [text for text in row.get("differs", ()) if any(key in text for key in (*keys, "mixture"))]
        right += bool(streams) and not wrong and all("normalised" in stream for stream in streams)
        for stream in streams:
            facts = " | ".join("/".join(map(str, stream.get(key, "?"))) for key in keys)
            table.append(f"| {name} | {facts} | {_cell('; '.join(wrong)) or 'as said'} |")
        if not streams:
            table.append(f"| {name} | {' | '.join('-' * len(keys))} | {row['status']}: {_cell(_why(row))} |")
    head = f"Of {len(speaking)} models whose configurations speak of experts, {right} have all of them as they say."
    titles = "model | experts | per token | scoring | normalised | scale | groups | shared | beside the configuration"
    return ["## Mixtures of experts", "", head, "", f"| {titles} |", "|---" * (len(keys) + 2) + "|", *table, ""]


def _passes(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    ran = {name: row["passes"] for name, row in rows.items() if row.get("passes")}
    if not ran:
        return []
    kinds = ("exact", "lossy", "n/a", "refused", "failed")
    names = list(dict.fromkeys(name for outcomes in ran.values() for name in outcomes))
    lines = ["## Passes", "", f"| pass | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name in names:
        counts = Counter(outcomes[name].split(":")[0] for outcomes in ran.values() if name in outcomes)
        lines.append(f"| `{name}` | {' | '.join(str(counts.get(kind, 0)) for kind in kinds)} |")
    lines += ["", "| model | pass | outcome |", "|---|---|---|"]
    for model, outcomes in sorted(ran.items()):
        lines += [
            f"| {model} | `{name}` | {_cell(text)} |"
            for name, text in outcomes.items()
            if text.startswith(("refused", "failed"))
        ]
    return [*lines, ""]
