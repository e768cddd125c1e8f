"""From sharding rules to the PartitionSpec of each parameter, optimizer slot and batch leaf, before any work is done.

It reports all faults at once. It knows specs and shapes, no arrays and no devices.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

from stepc._core.nodes import MeanNode, OverMesh, Program, Turn
from stepc._core.sharding import Entry, Rules, ShardingRules, Spec, axes_of, normalized_spec, spec_text
from stepc._language.state import describe_leaf, is_typed_key, path_matches, pattern_hint
from stepc.errors import ShardingError, faults_in_one, misspelt_axes

Shapes: TypeAlias = Sequence[tuple[str, Any]]  # (path, leaf) pairs. Any: a leaf has a shape and a dtype


@dataclass(frozen=True)
class BoundRules:
    """The sharding rules of a pipeline, merged and bound to a mesh.

    Args:
      layout: the rules of all its transforms.
      sizes: (name, size) of each mesh axis.
      rows: the mesh axes that the rows of a batch are sharded over, outermost first, automatic ones included.
      axis: the mesh axis that `zero` shards over; None if it shards nothing.
    """

    layout: ShardingRules = ShardingRules()
    sizes: tuple[tuple[str, int], ...] = ()
    rows: tuple[str, ...] = ()
    axis: str | None = None

    @property
    def num_parts(self) -> int:
        """The number of shards along `axis`."""
        return 1 if self.axis is None else dict(self.sizes)[self.axis]

    @property
    def has_rules(self) -> bool:
        """Whether rules place the parameters; the sharding of the caller's arrays is then ignored."""
        return bool(self.layout.params) or self.layout.default is not None


def bind_rules(program: Program, sizes: Mapping[str, int], rows: tuple[str, ...]) -> BoundRules:
    """Merge the rules of all means over the mesh, and bind them to its axes.

    Errors: ShardingError if two transforms disagree, or if a rule names an axis that it cannot.
    """
    places = [node.place for node in program if isinstance(node, MeanNode) and isinstance(node.place, OverMesh)]
    layouts = [place.layout for place in places]
    sharded = [place for place in places if place.layout.zero]
    dtypes = sorted({layout.reduce_dtype for layout in layouts if layout.reduce_dtype is not None})
    faults = [] if len(sharded) < 2 else ["two transforms set `zero`; only one axis can shard the optimizer state."]
    if len(dtypes) > 1:
        faults.append(f"transforms set different `reduce_dtype`s: {' and '.join(dtypes)}.")
    merged = ShardingRules(
        zero=sharded[0].layout.zero if sharded else 0,
        gather=sharded[0].layout.gather if sharded else "step",
        reduce_dtype=dtypes[0] if dtypes else None,
        params=tuple(rule for layout in layouts for rule in layout.params),
        default=next((layout.default for layout in layouts if layout.default is not None), None),
        batch=tuple(rule for layout in layouts for rule in layout.batch),
        automatic=tuple(axis for layout in layouts for axis in layout.automatic),
    )
    if merged.automatic and rows:
        manual, automatic = (", ".join(map(repr, axes)) for axes in (rows, merged.automatic))
        faults.append(
            f"the rows are sharded manually over {manual} and by `mode='auto'` over {automatic}; use one mode."
        )
    rows = (*rows, *merged.automatic)
    faults += _axis_faults(merged, sizes, rows)
    if faults:
        specs = [*(spec for _, spec in (*merged.params, *merged.batch)), merged.default or ()]
        unknown = sorted({axis for spec in specs for axis in axes_of(spec)} - set(sizes))
        taken = {axis for _, spec in (*merged.params, ("", merged.default or ())) for axis in axes_of(spec)} & {*rows}
        free = " or ".join(repr(axis) for axis in sizes if axis not in rows)
        hints = [misspelt_axes(unknown, sizes)]
        hints += [f"Parameters are sharded over an axis that shards no rows, such as {free}."] if taken and free else []
        raise _error(faults, sizes, of="the sharding rules", hints=hints)
    axis = sharded[0].axes[-1] if sharded else None
    if axis is None or sizes[axis] == 1:
        return BoundRules(replace(merged, zero=0), tuple(sizes.items()), rows)
    return BoundRules(merged, tuple(sizes.items()), rows, axis)


def check_turns_agree(turns: tuple[Turn, ...], rules: tuple[BoundRules, ...]) -> None:
    """Refuse turns that are sharded by different rules: they share one state and one batch. Errors: ShardingError."""
    if all(one == rules[0] for one in rules):
        return

    def written(program: Program) -> str:
        shards = [node.written for node in program if isinstance(node, MeanNode) and isinstance(node.place, OverMesh)]
        return " @ ".join(shards) or "no `shard`"

    facts = tuple((turn.name, written(turn.program)) for turn in turns)
    what = "The turns of `alternate` are sharded by different rules, and share one state and one batch."
    raise ShardingError(what, facts=facts, suggestion="Write the same `shard(...)` in each turn.")


def _axis_faults(layout: ShardingRules, sizes: Mapping[str, int], rows: tuple[str, ...]) -> list[str]:
    default: Rules = () if layout.default is None else (("the default", layout.default),)
    of_params = [(_rule(pattern, spec), spec) for pattern, spec in (*layout.params, *default)]
    of_batch = [(_rule(pattern, spec, of="batch "), spec) for pattern, spec in layout.batch]
    faults: list[str] = []
    for rule, spec in (*of_params, *of_batch):
        times = Counter(axes_of(spec))
        faults += [f"{rule} names the axis {axis!r}, which the mesh does not have." for axis in times.keys() - sizes]
        faults += [f"{rule} names the axis {axis!r} twice." for axis, often in times.items() if often > 1]
    faults += [
        f"{rule} names the axis {axis!r}, which shards the rows."
        for rule, spec in of_params
        for axis in axes_of(spec)
        if axis in rows
    ]
    return faults


def specs_of_params(rules: BoundRules, params: Shapes) -> dict[str, Spec]:
    """The spec that the rules give each parameter along the axes that do not shard rows; replicated ones are left out.

    Errors: ShardingError with every rule that matches no parameter, every parameter that matches no rule, and every
      spec that does not fit its parameter.
    """
    found: dict[str, Spec] = {}
    applied: set[str] = set()
    faults: list[str] = []
    hints: list[str | None] = []
    for path, leaf in params:
        rule = next((rule for rule in rules.layout.params if path_matches(rule[0], path)), None)
        if rule is not None:
            applied.add(rule[0])
        spec = rules.layout.default if rule is None else rule[1]
        if spec is None:
            faults.append(f"`{path}` ({describe_leaf(leaf)}) matches no rule.")
            hints.append("`tp(..., default=P())` replicates what matches no rule.")
        else:
            by = f"the default, {spec_text(spec)}," if rule is None else _rule(*rule)
            faults += _fit_faults(path, leaf, spec, rules, by)
            found[path] = normalized_spec(spec)
    for pattern, spec in rules.layout.params:
        if pattern in applied:
            continue
        if any(path_matches(pattern, path) for path, _ in params):
            faults.append(f"{_rule(pattern, spec)} never applies: earlier rules match the same parameters.")
        else:
            faults.append(f"{_rule(pattern, spec)} matches no parameter.")
            hints.append(pattern_hint(pattern, [path for path, _ in params]))
    if faults:
        raise _error(faults, dict(rules.sizes), of="the sharding rules", hints=hints)
    return {path: spec for path, spec in found.items() if spec}


def shard_dimension(leaf: Any, spec: Spec, rules: BoundRules) -> int:  # Any: it has a shape and a dtype
    """The dimension that `zero` shards; -1 if the leaf stays replicated.

    It is one that no other axis shards and that divides evenly. Among several: one that a TPU scatters without a
    relayout (a major one, or one whose shard fills tiles of 32 bytes), then the largest, then the first. Where layers
    are gathered one at a time, the first dimension may count layers, so it comes last: a scan over layers gathers a
    stack that is sharded along it whole.
    """
    num_shards, may_be_stack = rules.num_parts, rules.layout.gather == "layer" and leaf.ndim > 1
    rows_of_a_tile = max(32 // leaf.dtype.itemsize, 1)
    ranks = [
        (
            not (may_be_stack and dim == 0),
            dim < leaf.ndim - 2 or (size // num_shards) % rows_of_a_tile == 0,
            size,
            -dim,
        )
        for dim, size in enumerate(leaf.shape)
        if size and size % num_shards == 0 and (dim >= len(spec) or spec[dim] is None)
    ]
    return -max(ranks)[-1] if ranks and num_shards > 1 and not is_typed_key(leaf) else -1


def why_unsharded(leaf: Any, spec: Spec, rules: BoundRules) -> str:  # Any: as above
    """Why `zero` shards no dimension of a leaf: none divides evenly, or what each that does is taken by."""
    if is_typed_key(leaf):
        return "typed keys are never sharded"
    taken = [
        f"dimension {dim}, which is sharded over {', '.join(axes_of(spec[dim : dim + 1]))}"
        for dim, size in enumerate(leaf.shape)
        if size and size % rules.num_parts == 0
    ]
    parts = f"{rules.axis}={rules.num_parts}"
    return f"{parts} divides only {', and '.join(taken)}" if taken else f"not divisible by {parts}"


def mirrored_params(paths: Sequence[str], params: Iterable[str]) -> dict[str, str]:
    """The parameter that each leaf of a state mirrors, for those that mirror one.

    A leaf mirrors a parameter whose path is the end of its own. If several are, the one whose prefix leads to the most
    mirrors wins: that prefix holds a copy of the parameter tree, complete or masked.
    """
    known = set(params)
    found: dict[str, list[tuple[str, str]]] = {}  # (prefix, parameter) pairs
    for path in paths:
        keys = path.split("/")
        ends = ("/".join(keys[start:]) for start in range(1, len(keys) + 1))
        if pairs := [(path[: len(path) - len(end)], end) for end in ends if end in known]:
            found[path] = pairs
    mirrors = Counter(prefix for pairs in found.values() for prefix, _ in pairs)
    return {path: max(pairs, key=lambda pair: mirrors[pair[0]])[1] for path, pairs in found.items()}


def mirrored_spec(shape: tuple[int, ...], like: tuple[int, ...], spec: Spec) -> Spec | None:
    """The spec of a leaf that mirrors a parameter of shape `like` and of this spec.

    A leaf without one of the dimensions, such as a factored moment, keeps the spec of the others. None if its shape
    does not determine which dimension is missing.
    """
    if shape == like:
        return spec
    full = (*spec, *([None] * (len(like) - len(spec))))
    rest = {
        normalized_spec((*full[:dim], *full[dim + 1 :]))
        for dim in range(len(like))
        if (*like[:dim], *like[dim + 1 :]) == shape
    }
    return rest.pop() if len(rest) == 1 else None


def specs_of_batch(rules: BoundRules, batch: Shapes, leading: int) -> dict[str, Spec]:
    """The spec of each batch leaf: its rows sharded over the axes of the rows, after `leading` replicated dimensions.

    Errors: ShardingError with every rule that matches no leaf, and every spec that does not fit.
    """
    rows = rules.rows[0] if len(rules.rows) == 1 else rules.rows or None
    found: dict[str, Spec] = {}
    faults: list[str] = []
    hints: list[str | None] = []
    for path, leaf in batch:
        rule = next((rule for rule in rules.layout.batch if path_matches(rule[0], path)), None)
        spec = (rows,) if rule is None else rule[1]
        if rule is not None and (spec[0] if spec else None) != rows:
            over = "no axis" if rows is None else " and ".join(map(repr, rules.rows))
            faults.append(f"{_rule(*rule, of='batch ')} must shard dimension 0, the rows, over {over}.")
            hints.append(f"Write `{spec_text((rows, *spec[1:]))}`.")
        spec = (*([None] * leading), *spec)
        if rule is not None or rules.layout.automatic:
            by = f"{spec_text(spec)}, the sharding of the rows," if rule is None else _rule(*rule, of="batch ")
            faults += _fit_faults(path, leaf, spec, rules, by)
        found[path] = normalized_spec(spec)
    for pattern, spec in rules.layout.batch:
        if not any(path_matches(pattern, path) for path, _ in batch):
            faults.append(f"{_rule(pattern, spec, of='batch ')} matches no leaf of the batch.")
            hints.append(pattern_hint(pattern, [path for path, _ in batch]))
    if faults:
        raise _error(faults, dict(rules.sizes), of="the sharding of the batch", hints=hints)
    return found


def _fit_faults(path: str, leaf: Any, spec: Spec, rules: BoundRules, by: str) -> list[str]:  # Any: as in Shapes
    shape, sizes, described = tuple(leaf.shape), dict(rules.sizes), f"`{path}` ({describe_leaf(leaf)})"
    if len(normalized_spec(spec)) > len(shape):
        return [f"{described} has too few dimensions for {by.removesuffix(',')}."]
    return [
        f"{described}: dimension {dim}, of size {size}, does not divide by {_product(entry, sizes)}, as {by} requires."
        for dim, (size, entry) in enumerate(zip(shape, spec, strict=False))
        if size % prod(sizes[axis] for axis in axes_of((entry,)))
    ]


def _product(entry: Entry, sizes: Mapping[str, int]) -> str:
    axes = axes_of((entry,))
    named = " × ".join(f"{sizes[axis]} (axis {axis!r})" for axis in axes)
    return named if len(axes) == 1 else f"{prod(sizes[axis] for axis in axes)} = {named}"


def _rule(pattern: str, spec: Spec, *, of: str = "") -> str:
    return f"the {of}rule {pattern!r}: {spec_text(spec)}"


def _error(faults: list[str], sizes: Mapping[str, int], *, of: str, hints: Iterable[str | None]) -> ShardingError:
    what = faults_in_one(faults, of=of)
    mesh = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "none was given to compile"
    suggestion = " ".join(dict.fromkeys(hint for hint in hints if hint)) or None
    return ShardingError(what[:1].upper() + what[1:], facts=(("mesh", mesh),), suggestion=suggestion)
