"""What `shard` says of a mesh, held against its axes, the paths and the shapes: all faults at once, before any work.

It knows specs and shapes, no array and no device.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

from stepc._core.nodes import MeanNode, OverMesh, Program
from stepc._core.sharding import Rules, ShardingRules, Spec, axes_of, normalized_spec, spec_text
from stepc.errors import ShardingError, did_you_mean, faults_in_one

Shapes: TypeAlias = Sequence[tuple[str, Any]]  # Any: what has a shape and a dtype; pairs with paths


@dataclass(frozen=True)
class BoundRules:
    """The layout of a whole pipeline on a mesh.

    Args:
      layout: what its transforms say, in one.
      sizes: (name, size) of each axis of the mesh.
      rows: the axes that rows lie along, the outermost first; those that a mean is taken over, and automatic ones.
      axis: the axis along which things lie in parts; None if nothing does.
    """

    layout: ShardingRules = ShardingRules()
    sizes: tuple[tuple[str, int], ...] = ()
    rows: tuple[str, ...] = ()
    axis: str | None = None

    @property
    def num_parts(self) -> int:
        """Into how many parts that axis divides a leaf."""
        return 1 if self.axis is None else dict(self.sizes)[self.axis]

    @property
    def has_rules(self) -> bool:
        """Whether rules say where parameters lie, so that it does not matter how the caller's lie."""
        return bool(self.layout.params) or self.layout.default is not None


def bind_rules(program: Program, sizes: Mapping[str, int], rows: tuple[str, ...]) -> BoundRules:
    """The layouts of all means over space, in one, for a mesh.

    Errors: ShardingError if two transforms disagree, or a rule names an axis that it cannot.
    """
    means = [node for node in program if isinstance(node, MeanNode) and isinstance(node.place, OverMesh)]
    places = [node.place for node in means if isinstance(node.place, OverMesh)]
    divided = [place for place in places if place.layout.zero]
    dtypes = {place.layout.reduce_dtype for place in places if place.layout.reduce_dtype is not None}
    faults = ["two transforms say with `zero` along which axis things lie in parts."] if len(divided) > 1 else []
    faults += ["two transforms say in which dtype gradients are added up over devices."] if len(dtypes) > 1 else []
    merged = ShardingRules(
        zero=divided[0].layout.zero if divided else 0,
        gather=divided[0].layout.gather if divided else "step",
        reduce_dtype=next(iter(dtypes), None),
        params=tuple(rule for place in places for rule in place.layout.params),
        default=next((place.layout.default for place in places if place.layout.default is not None), None),
        batch=tuple(rule for place in places for rule in place.layout.batch),
        automatic=tuple(axis for place in places for axis in place.layout.automatic),
    )
    whole = divided[0].axes[-1] if divided and sizes[divided[0].axes[-1]] > 1 else None
    if merged.automatic and rows:
        faults.append("rows lie along some axes by hand and along others automatically: one mode for all of them.")
    rows = (*rows, *merged.automatic)
    faults += _rule_faults(merged, sizes, rows)
    if faults:
        raise _error(faults, sizes, of="the rules", hints=_hints(merged, sizes))
    return BoundRules(replace(merged, zero=merged.zero if whole else 0), tuple(sizes.items()), rows, whole)


def specs_of_params(laid: BoundRules, params: Shapes) -> dict[str, Spec]:
    """How each parameter lies along the axes that are not those of the rows, by the rules.

    Errors: ShardingError with every rule that matches no parameter, every parameter that no rule matches, every spec
      that does not fit its parameter.
    """
    found: dict[str, Spec] = {}
    matched: set[str] = set()
    faults, hints = [], []
    for path, leaf in params:
        rule = next((rule for rule in laid.layout.params if matches(rule[0], path)), None)
        if rule is not None:
            matched.add(rule[0])
        spec = laid.layout.default if rule is None else rule[1]
        if spec is None:
            faults.append(f"no rule matches the parameter `{path}`, {_described(leaf)}.")
            hints.append("`tp(..., default=P())` leaves what no rule matches whole.")
        else:
            by = "the default" if rule is None else f"the rule {rule[0]!r}"
            faults += _fit_faults(path, leaf, spec, dict(laid.sizes), by)
            found[path] = normalized_spec(spec)
    for pattern, spec in laid.layout.params:
        if pattern not in matched and not any(matches(pattern, path) for path, _ in params):
            faults.append(f"the rule {pattern!r}: {spec_text(spec)} matches no parameter.")
            hints.append(did_you_mean(pattern, [path for path, _ in params]) or "")
        elif pattern not in matched:
            faults.append(f"the rule {pattern!r}: {spec_text(spec)} never holds: a rule before it does, always.")
    if faults:
        raise _error(faults, dict(laid.sizes), of="the rules", hints=hints)
    return {path: spec for path, spec in found.items() if spec}


def shard_dimension(leaf: Any, spec: Spec, laid: BoundRules) -> int:  # Any: what has a shape and a dtype
    """Along which dimension a leaf lies in parts; -1 if it stays whole.

    One that no other axis divides and that divides evenly; of those, one that a TPU can scatter without a relayout (it
    is a major one, or a part of it fills its tiles of 32 bytes), then the largest, then the first. Where layers are
    gathered one at a time, the first dimension of a stack is that of the layers.
    """
    num_parts, stacked = laid.num_parts, laid.layout.gather == "layer" and leaf.ndim > 1
    rows_of_a_tile = max(32 // leaf.dtype.itemsize, 1)
    ranks = [
        (dim < leaf.ndim - 2 or (size // num_parts) % rows_of_a_tile == 0, size, -dim)
        for dim, size in enumerate(leaf.shape)
        if size and size % num_parts == 0 and (dim >= len(spec) or spec[dim] is None) and not (stacked and dim == 0)
    ]
    return -max(ranks)[-1] if ranks and num_parts > 1 else -1


def specs_of_batch(laid: BoundRules, batch: Shapes, leading: int) -> dict[str, Spec]:
    """How each leaf of a batch lies, its first dimension along the axes of the rows after `leading` whole ones.

    Errors: ShardingError with every rule that matches no leaf, every spec that does not fit.
    """
    rows = laid.rows[0] if len(laid.rows) == 1 else laid.rows or None
    found: dict[str, Spec] = {}
    faults, hints = [], []
    for path, leaf in batch:
        rule = next((rule for rule in laid.layout.batch if matches(rule[0], path)), None)
        spec = (rows,) if rule is None else rule[1]
        if (spec[0] if spec else None) != rows and rule is not None:
            faults.append(f"the rule {rule[0]!r}: {spec_text(spec)} of the batch: its rows lie along {_entry(rows)}.")
            hints.append(f"Write `{spec_text((rows, *spec[1:]))}`.")
        spec = (*([None] * leading), *spec)
        if rule is not None or laid.layout.automatic:
            by = "the place of its rows" if rule is None else f"the rule {rule[0]!r}"
            faults += _fit_faults(path, leaf, spec, dict(laid.sizes), by)
        found[path] = normalized_spec(spec)
    for pattern, spec in laid.layout.batch:
        if not any(matches(pattern, path) for path, _ in batch):
            faults.append(f"the rule {pattern!r}: {spec_text(spec)} matches no leaf of the batch.")
            hints.append(did_you_mean(pattern, [path for path, _ in batch]) or "")
    if faults:
        raise _error(faults, dict(laid.sizes), of="the rules of the batch", hints=hints)
    return found


def mirrors(paths: Sequence[str], params: Iterable[str]) -> dict[str, str]:
    """Which parameter each leaf of a state mirrors, of those that mirror one.

    A leaf mirrors a parameter whose path its own ends in. Where it ends in several, the one that makes what is left of
    the path the home of most mirrors: a copy of the tree of the parameters, whole or masked.
    """
    known = set(params)
    homes = {path: [(path[: len(path) - len(end)], end) for end in _ends(path) if end in known] for path in paths}
    crowd = Counter(home for found in homes.values() for home, _ in found)
    return {path: max(found, key=lambda one: crowd[one[0]])[1] for path, found in homes.items() if found}


def followed(shape: tuple[int, ...], like: tuple[int, ...], spec: Spec) -> Spec | None:
    """How a leaf lies that mirrors a parameter of shape `like`: as it does, or, if one of its dimensions is gone, as
    the rest of them do; None where its shape does not tell."""
    if shape == like:
        return spec
    full = (*spec, *([None] * (len(like) - len(spec))))
    rest = {
        normalized_spec((*full[:dim], *full[dim + 1 :]))
        for dim in range(len(like))
        if (*like[:dim], *like[dim + 1 :]) == shape
    }
    return rest.pop() if len(rest) == 1 else None


def matches(pattern: str, path: str) -> bool:
    """Whether a path matches: `*` stands for anything within a key, `**` across keys."""
    parts = re.split(r"(\*\*/|\*\*|\*)", pattern)
    means = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    return re.fullmatch("".join(means.get(part, re.escape(part)) for part in parts), path) is not None


def _ends(path: str) -> list[str]:
    keys = path.split("/")
    return ["/".join(keys[start:]) for start in range(1, len(keys) + 1)]


def _rule_faults(layout: ShardingRules, sizes: Mapping[str, int], rows: tuple[str, ...]) -> list[str]:
    default: Rules = () if layout.default is None else (("the default", layout.default),)
    faults = []
    for pattern, spec in (*layout.params, *default):
        rule = f"the rule {pattern!r}: {spec_text(spec)}"
        faults += _axis_faults(rule, spec, sizes)
        faults += [
            f"{rule} names the axis {axis!r}, along which rows lie: `dp({axis!r}, zero=3)` has parameters in parts."
            for axis in axes_of(spec)
            if axis in rows
        ]
    for pattern, spec in layout.batch:
        faults += _axis_faults(f"the rule {pattern!r}: {spec_text(spec)} of the batch", spec, sizes)
    return faults


def _axis_faults(rule: str, spec: Spec, sizes: Mapping[str, int]) -> list[str]:
    times = Counter(axes_of(spec))
    faults = [f"{rule} names the axis {axis!r}, which the mesh does not have." for axis in times if axis not in sizes]
    return faults + [f"{rule} names the axis {axis!r} twice." for axis, often in times.items() if often > 1]


def _fit_faults(path: str, leaf: Any, spec: Spec, sizes: Mapping[str, int], by: str) -> list[str]:
    shape = tuple(leaf.shape)
    if len(normalized_spec(spec)) > len(shape):
        return [f"`{path}`, {_described(leaf)}, has {len(shape)} dimensions, and {by} gives {spec_text(spec)}."]
    return [
        f"`{path}`, {_described(leaf)}: dimension {dim} of {size} does not divide by {_product(entry, sizes)}, "
        f"as {by} asks with {spec_text(spec)}."
        for dim, (size, entry) in enumerate(zip(shape, spec, strict=False))
        if size % prod(sizes[axis] for axis in axes_of((entry,)))
    ]


def _product(entry: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> str:
    axes = axes_of((entry,))
    named = " × ".join(f"{sizes[axis]} (axis {axis!r})" for axis in axes)
    return named if len(axes) == 1 else f"{prod(sizes[axis] for axis in axes)} = {named}"


def _error(faults: list[str], sizes: Mapping[str, int], *, of: str, hints: Iterable[str]) -> ShardingError:
    what = faults_in_one(faults, of=of)
    have = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "none was given to compile"
    suggestion = " ".join(dict.fromkeys(hint for hint in hints if hint)) or None
    return ShardingError(what[:1].upper() + what[1:], facts=(("mesh", have),), suggestion=suggestion)


def _hints(layout: ShardingRules, sizes: Mapping[str, int]) -> list[str]:
    specs = [spec for _, spec in (*layout.params, *layout.batch)] + [layout.default or ()]
    unknown = sorted({axis for spec in specs for axis in axes_of(spec)} - set(sizes))
    return [did_you_mean(axis, sizes) or "" for axis in unknown]


def _entry(entry: str | tuple[str, ...] | None) -> str:
    return "no axis" if entry is None else " and ".join(map(repr, axes_of((entry,))))


def _described(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
