"""Finding the configuration under which a class has exactly the tensors that a rewritten model holds.

Nothing here knows a family.  Which field counts the layers, and which the experts or the neurons, is found by building
the class with another value and looking at the names and shapes of its tensors; that the result computes the same is
left to the comparison with the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgeon.backends._hf_contents import ENGINES, Contents, Held
from surgeon.backends._hf_skeleton import Path, Skeleton, changed, field_name, values
from surgeon.contract import Refusal

_LEADING = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
"""Fields that count the leading layers of a kind."""
_PER_LAYER = ("layer", "block", "pattern")
"""Words in the names of lists with one entry per layer, or with the numbers of some layers."""
_HEAD_SIZE = "head_dim"
"""Field that says the size of a head: not a declared one everywhere, but read in most places."""


@dataclass(frozen=True)
class Fitted:
    """A configuration and where its tensors come from.

    Attributes:
        skeleton: the class under that configuration.
        origin: names of the source's tensors by the name they have now.
        changes: what was changed in the configuration: field -> (before, after).
    """

    skeleton: Skeleton
    origin: Mapping[str, str]
    changes: Mapping[str, tuple[object, object]]


def fit(source: Skeleton, contents: Contents, heads: Mapping[str, int]) -> Fitted | list[Refusal]:
    """The configuration that a rewritten model has, or what no configuration of its class says.

    Args:
        source: the class under the source's configuration.
        contents: what the model holds.
        heads: size of one head by the name of every tensor of an attention's projections.  Passes change how many heads there
            are, never their size, and shapes alone do not tell one from the other.
    """
    fitted = Fitted(source, {name: name for name in source.shapes}, {})
    removed = _removed(source, contents.held)
    for prefix, gone in removed.items():
        shorter = _without(fitted, prefix, gone)
        if isinstance(shorter, Refusal):
            return [shorter]
        fitted = shorter
    uneven = _uneven(fitted, contents.held)
    if uneven:
        return uneven
    fitted = _sized(_with_head_size(fitted, contents.held, heads), contents.held, heads)
    wrong = _misfits(fitted, contents.held)
    if wrong:
        return [
            Refusal(fitted.origin[name], f"its shape is {list(contents.held[fitted.origin[name]].shape)}, and no field of the "
                    f"configuration of {source.model_class} gives anything but {list(fitted.skeleton.shapes[name])}")
            for name in wrong[:5]
        ]  # fmt: skip
    return _untied(fitted, contents.held)


# -- layers -------------------------------------------------------------------------------------------------------


def _lists(names: Iterable[str]) -> dict[str, set[int]]:
    """Members of every numbered list of modules, by the name in front of the number; only complete lists 0 .. n-1."""
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for position, part in enumerate(parts):
            if part.isdigit():
                found.setdefault(".".join(parts[:position]), set()).add(int(part))
    return {prefix: members for prefix, members in found.items() if members == set(range(len(members)))}


def _removed(source: Skeleton, held: Mapping[str, Held]) -> dict[str, set[int]]:
    """Members of lists of which nothing is left, outermost lists only."""
    after: dict[str, set[int]] = {}
    for prefix, members in sorted(_lists(source.shapes).items(), key=lambda item: item[0].count(".")):
        left = {m for m in members if any(name.startswith(f"{prefix}.{m}.") for name in held)}
        inside = any(f"{prefix}.".startswith(f"{outer}.{m}.") for outer, gone in after.items() for m in gone)
        if left and left != members and not inside:
            after[prefix] = members - left
    return after


def _without(fitted: Fitted, prefix: str, gone: set[int]) -> Fitted | Refusal:
    """The class with some members of one list left out and the others moved up."""
    skeleton = fitted.skeleton
    before = len(_lists(skeleton.shapes)[prefix])
    survivors = [member for member in range(before) if member not in gone]
    lists = {key: len(members) for key, members in _lists(skeleton.shapes).items() if not key.startswith(f"{prefix}.")}
    for path, value in values(skeleton.config, int):
        if value != before:
            continue
        changes = {path: len(survivors)} | _per_layer(skeleton.config, before, survivors)
        built = Skeleton.build(skeleton.model_class, changed(skeleton.config, changes))
        if isinstance(built, str):
            continue
        found = {key: len(members) for key, members in _lists(built.shapes).items() if not key.startswith(f"{prefix}.")}
        if found != lists | {prefix: len(survivors)}:
            continue
        origin = {}
        for name in built.shapes:
            old = name
            if name.startswith(f"{prefix}."):
                number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
                old = f"{prefix}.{survivors[int(number)]}.{rest}"
            origin[name] = fitted.origin.get(old, old)
        done = {field_name(path): (_at(skeleton.config, path), value) for path, value in changes.items()}
        return replace(fitted, skeleton=built, origin=origin, changes={**fitted.changes, **done})
    missing = ", ".join(f"{prefix}.{member}" for member in sorted(gone))
    reason = (
        f"{missing} {'is' if len(gone) == 1 else 'are'} gone, and no field of the configuration of "
        f"{skeleton.model_class} says that {prefix} has {len(survivors)} members instead of {before}; {ENGINES} say it"
    )
    return Refusal(f"{prefix}.{min(gone)}", reason)


def _per_layer(config: Mapping[str, object], before: int, survivors: list[int]) -> dict[Path, object]:
    """Changes of the fields that speak of single layers."""
    changes: dict[Path, object] = {}
    for path, value in values(config, list):
        name = str(path[-1])
        if not any(word in name for word in _PER_LAYER):
            continue
        if len(value) == before:
            changes[path] = [value[member] for member in survivors]
        elif value and all(type(item) is int and 0 <= item < before for item in value):  # numbers of layers
            changes[path] = [survivors.index(item) for item in value if item in survivors]
    for path, value in values(config, int):
        if path[-1] in _LEADING and 0 < value < before:
            changes[path] = sum(member < value for member in survivors)
    return changes


# -- sizes --------------------------------------------------------------------------------------------------------


def _uneven(fitted: Fitted, held: Mapping[str, Held]) -> list[Refusal]:
    """Tensors of one place that had one size in all layers and have several now."""
    places: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in fitted.skeleton.shapes:
        if fitted.origin[name] in held:
            place = ".".join("*" if part.isdigit() else part for part in name.split("."))
            places.setdefault(place, {})[fitted.origin[name]] = held[fitted.origin[name]].shape
    refusals = []
    source = {fitted.origin[name]: shape for name, shape in fitted.skeleton.shapes.items()}
    for shapes in places.values():
        kinds = list(shapes.values())
        if len(set(kinds)) < 2 or len({source[name] for name in shapes}) > 1:
            continue
        usual = max(set(kinds), key=kinds.count)
        for name, shape in shapes.items():
            if shape != usual:
                reason = (
                    f"its shape is {list(shape)}, in other layers {list(usual)}; the configuration of "
                    f"{fitted.skeleton.model_class} has one number for all layers, {ENGINES} take one per layer"
                )
                refusals.append(Refusal(name, reason))
    return refusals


def _misfits(fitted: Fitted, held: Mapping[str, Held]) -> list[str]:
    """Tensors whose shape is not what the configuration makes it."""
    return [
        name
        for name, shape in fitted.skeleton.shapes.items()
        if fitted.origin[name] in held and held[fitted.origin[name]].shape != shape
    ]


def _with_head_size(fitted: Fitted, held: Mapping[str, Held], heads: Mapping[str, int]) -> Fitted:
    """The configuration with the size of a head said, where it followed from the number of heads and that has changed."""
    sizes = {heads[fitted.origin[name]] for name in _misfits(fitted, held) if fitted.origin[name] in heads}
    if len(sizes) != 1:
        return fitted
    for path in dict.fromkeys(path[:-1] for path, _ in values(fitted.skeleton.config, int) if _counts_heads(path)):
        owner = _at(fitted.skeleton.config, path)
        if isinstance(owner, Mapping) and owner.get(_HEAD_SIZE) is None:
            fitted = _with(fitted, (*path, _HEAD_SIZE), next(iter(sizes))) or fitted
    return fitted


def _counts_heads(path: Path) -> bool:
    """Whether a field's name says a number of heads: ``num_attention_heads``, ``n_head``, not ``head_dim``."""
    name = str(path[-1])
    return "head" in name and not any(word in name for word in ("dim", "size"))


def _sized(fitted: Fitted, held: Mapping[str, Held], heads: Mapping[str, int]) -> Fitted:
    """The configuration with sizes changed as the shapes of the tensors say, as far as single fields say it."""
    while wrong := _misfits(fitted, held):
        best, rest = None, len(wrong)
        tried = set()
        for name in wrong:
            have, need = fitted.skeleton.shapes[name], held[fitted.origin[name]].shape
            if len(have) != len(need):
                continue
            for a, b in zip(have, need, strict=True):
                # a field may be the size itself or a divisor of it: gate and up are stored as 2 x width
                for path, value in values(fitted.skeleton.config, int):
                    if a == b or value < 2 or a % value or (b * value) % a or (path, b * value // a) in tried:
                        continue
                    if value == heads.get(fitted.origin[name]) and not _counts_heads(path):
                        continue
                    tried.add((path, b * value // a))
                    found = _with(fitted, path, b * value // a)
                    left = len(_misfits(found, held)) if found is not None else rest
                    if found is not None and left < rest:
                        best, rest = found, left
        if best is None:
            return fitted
        fitted = best
    return fitted


def _with(fitted: Fitted, path: Path, value: object) -> Fitted | None:
    """One field changed, where the class accepts that and keeps its tensors."""
    built = Skeleton.build(fitted.skeleton.model_class, changed(fitted.skeleton.config, {path: value}))
    if isinstance(built, str) or set(built.shapes) != set(fitted.skeleton.shapes):
        return None
    owner: Any = _at(fitted.skeleton.config, path[:-1])
    was = owner.get(path[-1]) if isinstance(owner, Mapping) else owner[path[-1]]
    before = fitted.changes.get(field_name(path), (was, None))[0]
    return replace(fitted, skeleton=built, changes={**fitted.changes, field_name(path): (before, value)})


def _untied(fitted: Fitted, held: Mapping[str, Held]) -> Fitted | list[Refusal]:
    """Tensors that were one and are two now need a configuration that does not tie them."""
    apart = [
        name
        for name, first in fitted.skeleton.twins.items()
        if fitted.origin[name] in held
        and fitted.origin[first] in held
        and held[fitted.origin[name]].key != held[fitted.origin[first]].key
    ]
    for path, value in values(fitted.skeleton.config, bool):
        if apart and value and path[-1] == "tie_word_embeddings":
            found = _with(fitted, path, False)
            if found is not None and not set(apart) & set(found.skeleton.twins):
                return found
    return [
        Refusal(fitted.origin[name], f"{fitted.skeleton.model_class} ties it to {first}, and they are different tensors now")
        for name, first in fitted.skeleton.twins.items()
        if name in apart
    ] or fitted


def _at(config: Mapping[str, object], path: Path) -> object:
    owner: object = config
    for key in path:
        owner = owner[key]  # type: ignore[index]  # the path was found in this configuration
    return owner
