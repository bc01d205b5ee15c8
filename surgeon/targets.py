"""What each backend would make of a model: nothing in the way, what it refuses, or what has to be installed first."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon import registry
from surgeon.contract import Refusal
from surgeon.errors import SurgeonError
from surgeon.graph import Graph


@dataclass(frozen=True)
class Verdict:
    """One backend and one model.

    Attributes:
        backend: name of the backend, with its default options.
        refusals: what it refuses, empty where it takes the model.
        missing: what has to be installed before it can say, with the line that does so; None where nothing is missing.
    """

    backend: str
    refusals: tuple[Refusal, ...] = ()
    missing: str | None = None

    @property
    def takes(self) -> bool:
        """Whether a build with this backend would start lowering."""
        return not self.refusals and self.missing is None


def verdicts(graph: Graph) -> list[Verdict]:
    """What every registered backend says about a graph.

    Args:
        graph: stays as it is.

    Returns:
        One verdict per backend that can be loaded, in the order of their names.
    """
    found = []
    for line in registry.listing("backend"):
        if line.found is None:
            found.append(Verdict(line.name, missing=line.problem))
            continue
        backend = registry.backend_class(line.name)
        lacking = [library for library, version in registry.versions(backend).items() if version is None]
        if lacking:
            found.append(Verdict(line.name, missing=f"{', '.join(lacking)} not installed: {backend.install()}"))
            continue
        try:
            found.append(Verdict(line.name, tuple(registry.make_backend(line.name).refuses(graph))))
        except SurgeonError as error:  # an option without a default, or a graph it cannot even look at
            found.append(Verdict(line.name, (Refusal(line.name, str(error)),)))
    return found
