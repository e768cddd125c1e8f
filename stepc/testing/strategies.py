"""Hypothesis strategies for well-typed pipelines, meshes and batches. It needs hypothesis, from the extra `test`."""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import permutations
from math import prod
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from stepc._core.nodes import (
    InScan,
    MeanNode,
    OverMesh,
    RepeatNode,
    UnderVmap,
    Wrap,
    num_minibatches,
    rows_axis,
    turns_of,
)
from stepc._language.optimizers import Optimizer
from stepc._language.pipeline import Objective, Pipeline, QuotedArgument, Transform, expand_transforms
from stepc._language.sharding import GATHERS, OFFLOADS, DataParallel, TensorParallel, dp, logical, tp
from stepc._language.transforms.accumulate import accumulate
from stepc._language.transforms.across import Across
from stepc._language.transforms.alternate import Alternate, alternate
from stepc._language.transforms.cast import cast
from stepc._language.transforms.clip import clip
from stepc._language.transforms.ema import ema
from stepc._language.transforms.epochs import epochs
from stepc._language.transforms.grad import Grad, grad
from stepc._language.transforms.loss_scale import loss_scale
from stepc._language.transforms.noise import noise
from stepc._language.transforms.remat import remat
from stepc._language.transforms.repeat import repeat
from stepc._language.transforms.rows import rows
from stepc._language.transforms.sam import sam
from stepc._language.transforms.scale import scale
from stepc._language.transforms.shard import Shard, shard
from stepc._language.transforms.skip_nonfinite import skip_nonfinite
from stepc._language.transforms.update import update
from stepc.testing.probes import EXACT_SOURCES, EXACT_WHOLE, SOURCES, WHOLE, Evaluating, Probe, probe_batch

MAX_MICROBATCHES = 16  # the reference calls the loss for each of them


def meshes(*, axes: tuple[str, ...] = ("data", "replica"), most_devices: int | None = None) -> st.SearchStrategy[Mesh]:
    """Meshes over these axes, in any order, whose sizes are powers of two and fit the devices."""
    devices = jax.devices()[:most_devices]
    sizes = st.tuples(*(st.sampled_from([1, 2, 4, 8]) for _ in axes)).filter(lambda shape: prod(shape) <= len(devices))

    def made(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
        return jax.make_mesh(shape, names, devices=devices[: prod(shape)])

    return st.builds(made, sizes, st.permutations(axes).map(tuple))


def sources(*, exact: bool = False) -> st.SearchStrategy[Grad]:
    """The gradients of the probe losses: plain, cast and rematerialised.

    A narrow dtype rounds wherever it is summed, so the casts are to float32: this is about the transform, not rounding.
    """
    known = {**EXACT_SOURCES, **EXACT_WHOLE} if exact else {**SOURCES, **WHOLE}
    plain = st.sampled_from(list(known.values()))
    inside = [None, remat(), cast(jnp.float32), cast(jnp.float32) @ remat("dots_saveable")]
    return st.builds(_with_loss_transforms, plain, st.sampled_from(inside))


def _with_loss_transforms(source: Grad, inside: Transform | Pipeline | None) -> Grad:
    if inside is None:
        return source
    match source.loss:
        case Pipeline((*outer, Objective(QuotedArgument(encoder)))):
            loss = reduce(lambda inner, one: one @ inner, reversed(outer), inside @ encoder)
        case Pipeline():
            raise ValueError("the loss of a source is complete")
        case QuotedArgument(value):
            loss = inside @ value
    return grad(loss, wrt=source.wrt, has_aux=source.has_aux, rng=source.rng, model_state=source.model_state)


@st.composite
def pipelines(
    draw: st.DrawFn,
    *,
    axes: Mapping[str, int],
    loss: Probe | None = None,
    exact: bool = False,
    transforms: tuple[Transform, ...] = (),
    longest: int = 5,
    offload: bool = False,
) -> Pipeline:
    """Well-typed pipelines over a mesh with these axes, with at most 16 local microbatches.

    Args:
      axes: the size of each mesh axis; a pipeline names each at most once.
      loss: the loss; None for any of the probes.
      exact: only transforms that are exact on whole numbers, so that results compare bitwise.
      transforms: your own transforms, from gradient to gradient, to mix in.
      longest: the largest number of transforms between `update` and `grad`.
      offload: also draw the optimizer state in the memory of the host.
    """
    source = grad(loss) if loss is not None else draw(sources(exact=exact))
    has_head = isinstance(source.loss, Pipeline) and any(isinstance(one, Across) for one in source.loss.transforms)
    offloads = OFFLOADS if offload else (None,)
    chosen = draw(_gradient_transforms(axes, exact, transforms, longest, offloads, single_rows=not has_head))
    optimizers = [optax.sgd(0.5), optax.sgd(0.5, momentum=0.5), Evaluating()]
    # A head multiplies sums: what it makes of parameters that are no whole numbers any more is rounded.
    one_step = has_head and exact
    if loss is None and not transforms and not one_step and draw(st.sampled_from([False, False, False, True])):
        pipeline = draw(_alternations(chosen, source, optimizers))
        one_step = exact  # two turns are two steps already
    else:
        pipeline = _chained(update(draw(st.sampled_from(optimizers))), chosen, source)
    outside: list[Transform] = draw(
        st.lists(st.sampled_from([skip_nonfinite(limit=3), ema(0.5)]), max_size=2, unique=True)
    )
    for transform in outside:
        pipeline = transform @ pipeline
    by_rows = _has_model_state_by_rows(source)
    # After more than two steps whole numbers have more bits than a float32.
    shuffled = epochs(1 if exact else 2, minibatches=2)
    several = [None, None, None, repeat(2), *([] if by_rows else [shuffled])]
    several = [None] if one_step else several
    if (transform := draw(st.sampled_from(several))) is not None:
        pipeline = transform @ pipeline
    return pipeline if isinstance(pipeline, Pipeline) else Pipeline((pipeline,))


def source_of(pipeline: Pipeline) -> Grad:
    """The gradient of the probe in a random pipeline, of the first turn if it has several."""
    match pipeline.transforms[-1]:
        case Alternate(((_, Pipeline((*_, Grad() as source))), *_)) | (Grad() as source):
            return source
        case other:
            raise ValueError(f"`{other!r}` is no gradient of a probe")


@st.composite
def _alternations(draw: st.DrawFn, chosen: list[Transform], source: Grad, optimizers: Sequence[Optimizer]) -> Transform:
    """Two turns with the same transforms: one trains the weights of the probes, one the bias."""

    def turn(wrt: str) -> Pipeline:
        options: Any = {
            "has_aux": source.has_aux, "rng": source.rng, "model_state": source.model_state, "reads": source.reads,
        }  # fmt: skip
        loss: Any = source.loss if isinstance(source.loss, Pipeline) else source.loss.value
        return _chained(update(draw(st.sampled_from(optimizers))), chosen, grad(loss, wrt=wrt, **options))

    often = draw(st.sampled_from([{}, {}, {"bias": 2}, {"weights": 2}]))
    return alternate(weights=turn("w"), bias=turn("b"), every=often)


def _chained(outermost: Transform, transforms: list[Transform], source: Grad) -> Pipeline:
    pipeline: Any = outermost
    for transform in (*transforms, source):
        pipeline = pipeline @ transform
    return pipeline


def _has_model_state_by_rows(source: Grad) -> bool:
    rules = () if source.model_state is None else source.model_state.by_pattern  # pyright: ignore
    return any(rule == "rows" for _, rule in rules)


@st.composite
def _gradient_transforms(
    draw: st.DrawFn,
    axes: Mapping[str, int],
    exact: bool,
    transforms: tuple[Transform, ...],
    longest: int,
    offloads: tuple[str | None, ...],
    *,
    single_rows: bool,
) -> list[Transform]:
    free, count, is_sharded, chosen = dict(axes), 1, False, []
    for _ in range(draw(st.integers(0, longest))):
        single = rows() in chosen  # what is left to split is one row, which has no parts
        scaled = loss_scale(initial=8.0) in chosen  # what is not linear would see the gradient of the scaled loss
        sizes = [k for k in (1, 2, 4, 8) if count * k <= MAX_MICROBATCHES] if not single else [1]
        fitting = [
            axis for axis, size in free.items() if count * size <= MAX_MICROBATCHES and not (single and size > 1)
        ]
        pairs = [
            both for both in permutations(fitting, 2) if count * prod(axes[axis] for axis in both) <= MAX_MICROBATCHES
        ]
        options: list[st.SearchStrategy[Any]] = [
            st.sampled_from(sizes).map(accumulate),
            st.sampled_from([0.5, 2.0, -1.0, 1.0]).map(scale),
            *([_hybrid(pairs)] if pairs and not is_sharded and not single else []),
            *([_shards(fitting, [0, 0, 1, 2, 3] if not is_sharded else [0], offloads)] if fitting else []),
            *([] if scaled else [st.just(loss_scale(initial=8.0))]),
            *([st.just(rows())] if single_rows and count <= MAX_MICROBATCHES // 4 else []),
            *([] if exact or scaled else [st.sampled_from([0.5, 1.0, 1e6]).map(clip), st.just(noise(0.25))]),
            *([] if exact or sam(0.125) in chosen else [st.just(sam(0.125))]),
            st.sampled_from(sizes).map(lambda k: accumulate(k, dtype=jnp.float32)),
            *([st.sampled_from(transforms)] if transforms and not scaled else []),
        ]
        transform = draw(st.one_of(options))
        chosen.append(transform)
        count *= num_parts(transform, axes)
        rules = transform.rules if isinstance(transform, Shard) else ()
        data = [rule for rule in rules if isinstance(rule, DataParallel)]
        free = {axis: size for axis, size in free.items() if not any(axis in rule.axes for rule in data)}
        is_sharded = is_sharded or any(rule.zero for rule in data)
    return chosen


def _shards(axes: list[str], levels: list[int], offloads: tuple[str | None, ...]) -> st.SearchStrategy[Shard]:
    """`shard(dp(axis, ...))` over one of these axes, with one of these levels of `zero`."""

    def made(axis: str, zero: int, gather: str | tuple[str, str], offload: str | None) -> Shard:
        return shard(dp(axis, zero=zero, gather=gather if zero == 3 else "step", offload=offload))

    choices = map(st.sampled_from, (axes, levels, GATHERS, offloads))
    return st.builds(made, *choices)


def _hybrid(pairs: list[tuple[str, str]]) -> st.SearchStrategy[Shard]:
    """`shard(dp((axis, axis), ...))` over one of these pairs, with the state sharded along both, or along the last."""

    def made(both: tuple[str, ...], zero: int, gather: str | tuple[str, str], along: int) -> Shard:
        return shard(dp(both, zero=zero, zero_axes=both[along:], gather=gather if zero == 3 else "step"))

    return st.builds(
        made, st.sampled_from(pairs), st.sampled_from([1, 2, 3]), st.sampled_from(GATHERS), st.sampled_from([0, 1])
    )


def batches(pipeline: Pipeline, *, axes: Mapping[str, int]) -> st.SearchStrategy[dict[str, Any]]:
    """Whole-number batches for the probes, with as many rows as the pipeline can split."""
    program = expand_transforms(pipeline.transforms)
    count = num_minibatches(program) * prod(num_parts(transform, axes) for transform in pipeline.transforms)
    repeats = [node.size for node in program if isinstance(node, RepeatNode)]
    # Powers of two, so that a mean over the rows of a local microbatch is exact.
    num_rows = st.sampled_from([1, 2, 4]).map(lambda each: each * count)

    def made(number: int, seed: int) -> dict[str, Any]:
        if not rows_axis(program):
            return probe_batch(number, seed=seed)
        steps = [probe_batch(number, seed=seed + step) for step in range(repeats[0])]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *steps)

    return st.builds(made, num_rows, st.integers(0, 2**16))


def num_parts(transform: Transform, axes: Mapping[str, int]) -> int:
    """The number of parts that a transform splits its rows into; 1 for `rows()`, whose number the batch gives."""
    nodes = tuple(node for node in transform.expand() if not isinstance(node, Wrap))
    places = (node.place for node in turns_of(nodes)[0].program if isinstance(node, MeanNode))
    return prod(_num_parts_of(place, axes) for place in places)


def _num_parts_of(place: InScan | OverMesh | UnderVmap, axes: Mapping[str, int]) -> int:
    match place:
        case InScan(size):
            return size
        case OverMesh(names):
            return prod(axes[name] for name in names)
        case UnderVmap():
            return 1
        case _:
            assert_never(place)


@st.composite
def tensor_rules(
    draw: st.DrawFn, shapes: Mapping[str, tuple[int, ...]], *, axes: Mapping[str, int], pad: bool = False
) -> TensorParallel:
    """Rules that shard parameters along some of these axes, by path pattern, by the names of dimensions, or both.

    Args:
      shapes: of each parameter, by path.
      axes: the size of each mesh axis that shards no rows.
      pad: whether dimensions that do not divide are sharded too, and padded.
    """
    patterns: dict[str, PartitionSpec] = {}
    names: dict[str, PartitionSpec] = {}
    table: dict[str, str | tuple[str, ...] | None] = {}
    for number, (path, shape) in enumerate(shapes.items()):
        free, entries = list(axes), list[str | tuple[str, ...] | None]()
        for size in shape:
            taken = draw(st.sampled_from([(), *((axis,) for axis in free), tuple(free)]))
            if not pad and size % prod(axes[axis] for axis in taken):
                taken = ()
            free = [axis for axis in free if axis not in taken]
            entries.append(taken if len(taken) > 1 else taken[0] if taken else None)
        if draw(st.booleans()):
            patterns[path] = PartitionSpec(*entries)
            continue
        # The name of a dimension stands for one entry only.
        named = [f"{number}_{dim}" for dim in range(len(shape))]
        names[path] = PartitionSpec(*named)
        table.update(zip(named, entries, strict=True))
    rules = [*([patterns] if patterns else []), *([logical(table, names=names)] if table else [])]
    return tp(*rules, default=PartitionSpec(), pad=pad)
