"""From sharding rules to the PartitionSpec of each parameter, optimizer slot and batch leaf, before any work is done.

It reports all faults at once. It knows specs and shapes, no arrays and no devices.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias

from stepc._core.nodes import MeanNode, OverMesh, Program, Turn
from stepc._core.sharding import Entry, Rules, ShardingRules, Spec, axes_of, entry_text, normalized_spec, spec_text
from stepc._language.state import describe_leaf, is_typed_key, path_matches, pattern_hint
from stepc.errors import ShardingError, did_you_mean, faults_in_one, leaf_text, misspelt_axes

Shapes: TypeAlias = Sequence[tuple[str, Any]]  # (path, leaf) pairs. Any: a leaf has a shape and a dtype


@dataclass(frozen=True)
class BoundRules:
    """The sharding rules of a pipeline, merged and bound to a mesh.

    Args:
      layout: the rules of all its transforms.
      sizes: (name, size) of each mesh axis.
      rows: the mesh axes that the rows of a batch are sharded over, outermost first, automatic ones included.
      shard_axes: the mesh axes that `zero` shards over, the outermost first; none if it shards nothing.
      written: the transform that sets `zero`, as written.
    """

    layout: ShardingRules = ShardingRules()
    sizes: tuple[tuple[str, int], ...] = ()
    rows: tuple[str, ...] = ()
    shard_axes: tuple[str, ...] = ()
    written: str = field(default="", compare=False)

    @property
    def num_parts(self) -> int:
        """The number of shards along `shard_axes`."""
        sizes = dict(self.sizes)
        return prod(sizes[axis] for axis in self.shard_axes)

    @property
    def manual_rows(self) -> tuple[str, ...]:
        """The axes among `rows` that a step is manual over: parameters are not sharded along them, but by `zero`."""
        return tuple(axis for axis in self.rows if axis not in self.layout.automatic)

    @property
    def has_rules(self) -> bool:
        """Whether rules place the parameters; the sharding of the caller's arrays is then ignored."""
        layout = self.layout
        return bool(layout.params) or layout.logical is not None or layout.default is not None


def bind_rules(program: Program, sizes: Mapping[str, int], rows: tuple[str, ...]) -> BoundRules:
    """Merge the rules of all means over the mesh, and bind them to its axes.

    Errors: ShardingError if two transforms disagree, or if a rule names an axis that it cannot.
    """
    pairs = [(node.place, node.written) for node in program if isinstance(node, MeanNode)]
    places = [(place, written) for place, written in pairs if isinstance(place, OverMesh)]
    layouts = [place.layout for place, _ in places]
    sharded = [(place, written) for place, written in places if place.layout.zero]
    by_name = [layout for layout in layouts if layout.logical is not None]
    dtypes = sorted({layout.reduce_dtype for layout in layouts if layout.reduce_dtype is not None})
    faults = [] if len(sharded) < 2 else ["two transforms set `zero`; only one axis can shard the optimizer state."]
    if len(dtypes) > 1:
        faults.append(f"transforms set different `reduce_dtype`s: {' and '.join(dtypes)}.")
    if len(by_name) > 1:
        faults.append("two transforms give `logical` rules; one table names every dimension.")
    pads = {
        layout.pad for layout in layouts if layout.params or layout.logical is not None or layout.default is not None
    }
    if len(pads) > 1:
        faults.append("one `tp` has `pad=True` and another does not; one choice holds for every parameter.")
    merged = ShardingRules(
        zero=sharded[0][0].layout.zero if sharded else 0,
        zero_axes=sharded[0][0].layout.zero_axes if sharded else (),
        gather=sharded[0][0].layout.gather if sharded else "step",
        outside=sharded[0][0].layout.outside if sharded else "microbatch",
        offload=next((layout.offload for layout in layouts if layout.offload), ""),
        reduce_dtype=dtypes[0] if dtypes else None,
        params=tuple(rule for layout in layouts for rule in layout.params),
        logical=by_name[0].logical if by_name else None,
        names=by_name[0].names if by_name else (),
        default=next((layout.default for layout in layouts if layout.default is not None), None),
        pad=True in pads,
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
        of_params = [spec for _, spec in _rules_of_params(merged)]
        specs = [*of_params, *(spec for _, spec in merged.batch)]
        unknown = sorted({axis for spec in specs for axis in axes_of(spec)} - set(sizes))
        named = {axis for spec in of_params for axis in axes_of(spec)}
        free = " or ".join(repr(axis) for axis in sizes if axis not in rows)
        hints = [misspelt_axes(unknown, sizes)]
        if named & set(rows) - set(merged.automatic):
            hints += [f"Parameters are sharded over an axis that shards no rows, such as {free}."] if free else []
            hints += ["Experts that are sharded over the axis of the rows need `shard(dp(...), tp(...), mode='auto')`."]
        raise _error(faults, sizes, of="the sharding rules", hints=hints)
    named = [place.layout.zero_axes or (place.axes or place.layout.automatic)[-1:] for place, _ in sharded]
    shard_axes = tuple(axis for axes in named for axis in axes if sizes[axis] > 1)
    if not shard_axes:
        return BoundRules(replace(merged, zero=0), tuple(sizes.items()), rows)
    return BoundRules(merged, tuple(sizes.items()), rows, shard_axes, sharded[0][1])


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
    of_params = _rules_of_params(layout)
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
        if axis in rows and axis not in layout.automatic
    ]
    return faults


def _rules_of_params(layout: ShardingRules) -> list[tuple[str, Spec]]:
    """Every rule that places parameters, as a message names it, with the axes that it names as a spec."""
    default: Rules = () if layout.default is None else (("the default", layout.default),)
    by_name = [(_logical_rule(name, entry), (entry,)) for name, entry in layout.logical or ()]
    return [*((_rule(pattern, spec), spec) for pattern, spec in (*layout.params, *default)), *by_name]


def names_of_params(
    rules: BoundRules, params: Iterable[str], given: Mapping[str, Spec]
) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """The names of the dimensions of parameters by path: those that a rule reads, and those that none does.

    Args:
      given: the names that parameters carry themselves.
    """
    layout = rules.layout
    found = {path: next((names for one, names in layout.names if path_matches(one, path)), None) for path in params}
    names = {path: given.get(path, ()) if of_rule is None else of_rule for path, of_rule in found.items()}
    names = {path: one for path, one in names.items() if any(one) or found[path] is not None}
    by_pattern = {path for path in names if any(path_matches(pattern, path) for pattern, _ in layout.params)}
    free = {path: one for path, one in names.items() if path not in by_pattern}
    return ({}, free) if layout.logical is None else (free, {})


def specs_of_params(rules: BoundRules, params: Shapes, given: Mapping[str, Spec]) -> dict[str, Spec]:
    """The spec that the rules give each parameter; replicated ones are left out.

    Args:
      given: the names of the dimensions of parameters that carry some, by path.
    Errors: ShardingError with every rule that matches no parameter, every parameter that matches no rule, every name
      without a rule, and every spec that does not fit its parameter.
    """
    found: dict[str, Spec] = {}
    applied: set[str] = set()
    faults: list[str] = []
    hints: list[str | None] = []
    read, _ = names_of_params(rules, [path for path, _ in params], given)
    logical = dict(rules.layout.logical or ())
    for name in _names_in(read.values()):
        if name not in logical:
            paths = [path for path, names in read.items() if name in axes_of(names)]
            what = f"`{paths[0]}` {spec_text(read[paths[0]])}" + (f" and {len(paths) - 1} more" if paths[1:] else "")
            faults.append(f"the name {name!r}, of {what}, has no rule.")
            hints.append(
                did_you_mean(name, logical) or f'`logical({{..., "{name}": None}})` shards no dimension of that name.'
            )
    if unused := [name for name in logical if name not in _names_in(read.values())]:
        faults += [f"{_logical_rule(name, logical[name])} names no dimension of a parameter." for name in unused]
        hints.append("Leave out rules for names that no parameter has.")
    for path, leaf in params:
        shown = f"{leaf_text(path, 'the parameter')} ({describe_leaf(leaf)})"
        rule = next((rule for rule in rules.layout.params if path_matches(rule[0], path)), None)
        if rule is not None:
            applied.add(rule[0])
            by, spec = _rule(*rule), rule[1]
        elif path in read:
            spec = tuple(tuple(axes_of(logical.get(name) for name in axes_of((names,)))) for names in read[path])
            spec = normalized_spec(spec)
            by = f"{spec_text(spec)}, of its names {spec_text(read[path])},"
            faults += [
                f"{shown}: {by} names the axis {axis!r} twice."
                for axis, often in Counter(axes_of(spec)).items()
                if often > 1
            ]
        else:
            by, spec = f"the default, {spec_text(rules.layout.default or ())},", rules.layout.default
        if spec is None:
            faults.append(f"{shown} matches no rule.")
            hints.append("`tp(..., default=P())` replicates what matches no rule.")
        else:
            faults += (misfits := _rank_faults(shown, leaf, spec, by))
            if not misfits and not rules.layout.pad:
                faults += (uneven := _division_faults(shown, leaf, spec, rules, by))
                hints += ["`tp(..., pad=True)` pads dimensions that do not divide."] if uneven else []
            found[path] = normalized_spec(spec)
    for pattern, names in rules.layout.names:
        if not any(path_matches(pattern, path) for path, _ in params):
            faults.append(f"the names of {pattern!r}, {spec_text(names)}, match no parameter.")
            hints.append(pattern_hint(pattern, [path for path, _ in params]))
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


def shard_dimension(
    leaf: Any,  # Any: it has a shape and a dtype
    spec: Spec,
    rules: BoundRules,
    *,
    is_matrix: bool = False,
) -> int:
    """The dimension that `zero` shards; -1 if the leaf stays replicated.

    It is one that no other axis shards and that divides evenly, of a leaf that rules shard along none of the axes of
    `zero`: an expert. Among several: one that a TPU scatters without a relayout (a major one, or one whose shard fills
    tiles of 32 bytes), then the largest, then the first. Of a stack that another axis shards, such as experts, the last
    instead of the largest: XLA for TPUs puts the other dimension of the gradient of x @ w along the lanes of tiles, and
    makes an all-reduce of a reduce-scatter along these. Where layers are gathered one at a time, the first dimension
    may count layers, so it comes last: a scan over layers gathers a stack that is sharded along it whole. Otherwise it
    comes first in a stack of matrices that an optimizer multiplies, so that each device has whole ones.
    """
    num_shards, may_be_stack = rules.num_parts, rules.layout.gather == "layer" and leaf.ndim > 1
    rows_of_a_tile = max(32 // leaf.dtype.itemsize, 1)
    is_sharded_stack = any(spec[: max(leaf.ndim - 2, 0)])
    ranks = [
        (
            not (may_be_stack and dim == 0),
            is_matrix and counts_matrices(leaf, dim),
            dim < leaf.ndim - 2 or (size // num_shards) % rows_of_a_tile == 0,
            is_sharded_stack and dim == leaf.ndim - 1,
            size,
            -dim,
        )
        for dim, size in enumerate(leaf.shape)
        if size and size % num_shards == 0 and (dim >= len(spec) or spec[dim] is None)
    ]
    is_free = num_shards > 1 and not {*rules.shard_axes} & {*axes_of(spec)} and not is_typed_key(leaf)
    return -max(ranks)[-1] if ranks and is_free else -1


def counts_matrices(leaf: Any, dim: int) -> bool:  # Any: as above
    """Whether a dimension counts the matrices of a stack."""
    return dim == 0 and leaf.ndim > 2


def why_unsharded(leaf: Any, spec: Spec, rules: BoundRules) -> str:  # Any: as above
    """Why `zero` shards no dimension of a leaf: none divides evenly, or what each that does is taken by."""
    if is_typed_key(leaf):
        return "typed keys are never sharded"
    taken = [
        f"dimension {dim}, which is sharded over {', '.join(axes_of(spec[dim : dim + 1]))}"
        for dim, size in enumerate(leaf.shape)
        if size and size % rules.num_parts == 0
    ]
    parts = f"{' × '.join(rules.shard_axes)}={rules.num_parts}"
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
    sizes = dict(rules.sizes)
    found: dict[str, Spec] = {}
    faults: list[str] = []
    hints: list[str | None] = []
    for path, leaf in batch:
        rule = next((rule for rule in rules.layout.batch if path_matches(rule[0], path)), None)
        spec = (rows,) if rule is None else rule[1]
        if rule is not None and _sharding_axes(spec[:1], sizes) != _sharding_axes((rows,), sizes):
            over = "no axis" if rows is None else " and ".join(map(repr, rules.rows))
            faults.append(f"{_rule(*rule, of='batch ')} must shard dimension 0, the rows, over {over}.")
            rest = (None if {*axes_of((entry,))} & {*rules.rows} else entry for entry in spec[1:])
            hints.append(f"Write `{spec_text(normalized_spec((rows, *rest)))}`.")
        else:
            spec = (rows, *spec[1:])  # the normal form drops axes of size 1 from the rows
        spec = (*([None] * leading), *spec)
        if rule is not None or rules.layout.automatic:
            by = f"{spec_text(spec)}, the sharding of the rows," if rule is None else _rule(*rule, of="batch ")
            shown = f"{leaf_text(path, 'the batch')} ({describe_leaf(leaf)})"
            faults += _rank_faults(shown, leaf, spec, by) or _division_faults(shown, leaf, spec, rules, by)
        found[path] = normalized_spec(spec)
    for pattern, spec in rules.layout.batch:
        if not any(path_matches(pattern, path) for path, _ in batch):
            faults.append(f"{_rule(pattern, spec, of='batch ')} matches no leaf of the batch.")
            hints.append(pattern_hint(pattern, [path for path, _ in batch]))
    if faults:
        raise _error(faults, sizes, of="the sharding of the batch", hints=hints)
    return found


def _sharding_axes(spec: Spec, sizes: Mapping[str, int]) -> list[str]:
    """The axes that a spec names and that shard something: those of size 1 do not."""
    return [axis for axis in axes_of(spec) if sizes[axis] > 1]


def _rank_faults(shown: str, leaf: Any, spec: Spec, by: str) -> list[str]:  # Any: as in Shapes
    fits = len(normalized_spec(spec)) <= len(leaf.shape)
    return [] if fits else [f"{shown} has too few dimensions for {by.removesuffix(',')}."]


def _division_faults(shown: str, leaf: Any, spec: Spec, rules: BoundRules, by: str) -> list[str]:  # Any: as in Shapes
    sizes = dict(rules.sizes)
    return [
        f"{shown}: dimension {dim}, of size {size}, does not divide by {_product(entry, sizes)}, as {by} requires."
        for dim, (size, entry) in enumerate(zip(leaf.shape, spec, strict=False))
        if size % prod(sizes[axis] for axis in axes_of((entry,)))
    ]


def _product(entry: Entry, sizes: Mapping[str, int]) -> str:
    axes = axes_of((entry,))
    named = " × ".join(f"{sizes[axis]} (axis {axis!r})" for axis in axes)
    return named if len(axes) == 1 else f"{prod(sizes[axis] for axis in axes)} = {named}"


def _rule(pattern: str, spec: Spec, *, of: str = "") -> str:
    return f"the {of}rule {pattern!r}: {spec_text(spec)}"


def _logical_rule(name: str, entry: Entry) -> str:
    return f"the logical rule {name!r}: {entry_text(entry)}"


def _names_in(all_names: Iterable[Spec]) -> list[str]:
    """Every name of a dimension, once."""
    return list(dict.fromkeys(name for names in all_names for name in axes_of(names)))


def _error(faults: list[str], sizes: Mapping[str, int], *, of: str, hints: Iterable[str | None]) -> ShardingError:
    what = faults_in_one(faults, of=of)
    mesh = ", ".join(f"{name}={size}" for name, size in sizes.items()) or "none was given to compile"
    suggestion = " ".join(dict.fromkeys(hint for hint in hints if hint)) or None
    return ShardingError(what[:1].upper() + what[1:], facts=(("mesh", mesh),), suggestion=suggestion)
