"""The one error tree of surgeon.

A ``SurgeonError`` is the user's or the model's doing: the command line prints it without a traceback and exits with 2.
Anything else that escapes is a bug of ours.  A message says what went wrong, where (pass, site, node), the value found,
the value needed, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SurgeonError(Exception):
    """Base of every error that surgeon raises on purpose."""


class SurgeonWarning(UserWarning):
    """What a user should know of what is done all the same."""


class RecipeError(SurgeonError):
    """A recipe, an override or an argument of the Python API is wrong."""


class RegistryError(SurgeonError):
    """A pass or backend of that name does not exist, or could not be loaded."""


class TraceError(SurgeonError):
    """The source model could not be loaded or traced to a canonical graph."""


class DiscoverError(SurgeonError):
    """The graph has no structure that surgeon recognises; says which rule came nearest and where it broke."""


class ObserveError(SurgeonError):
    """Calibration data is missing, empty or does not fit the model."""


class PlanError(SurgeonError):
    """A pass cannot do what was asked on this model, or a saved plan does not fit it."""


class RewriteError(SurgeonError):
    """An edit of the graph broke one of its invariants."""


class VerifyError(SurgeonError):
    """A rewritten graph or an artefact does not compute what it must."""


class GenerateError(SurgeonError):
    """Text cannot be generated with this model, or not as asked."""


class LowerError(SurgeonError):
    """A backend cannot express this graph, or its library is missing."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return a sentence fragment that lists what exists and names the nearest spelling of ``word``.

    Example:
        >>> nearest("drop_block", ["drop_blocks", "quantize"])
        "did you mean 'drop_blocks'? known: drop_blocks, quantize"
    """
    known = sorted(candidates)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) if known else '(none)'}"
