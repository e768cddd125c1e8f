"""Hypothesis strategies: well-typed pipelines, meshes and batches. Needs hypothesis, the extra `test`."""

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st
from jax.sharding import Mesh

from stepc._core.nodes import InScan
from stepc._core.nodes import MeanNode
from stepc._core.nodes import RepeatNode
from stepc._core.nodes import UnderVmap
from stepc._language.pipeline import Pipeline
from stepc._language.pipeline import Transform
from stepc._language.pipeline import expand_transforms
from stepc._language.sharding import GATHERS
from stepc._language.sharding import DataParallel
from stepc._language.sharding import dp
from stepc._language.transforms.accumulate import accumulate
from stepc._language.transforms.cast import cast
from stepc._language.transforms.clip import clip
from stepc._language.transforms.ema import ema
from stepc._language.transforms.grad import Grad
from stepc._language.transforms.grad import grad
from stepc._language.transforms.loss_scale import loss_scale
from stepc._language.transforms.noise import noise
from stepc._language.transforms.remat import remat
from stepc._language.transforms.repeat import repeat
from stepc._language.transforms.rows import rows
from stepc._language.transforms.scale import scale
from stepc._language.transforms.shard import Shard
from stepc._language.transforms.shard import shard
from stepc._language.transforms.skip_nonfinite import skip_nonfinite
from stepc._language.transforms.update import update
from stepc.testing.probes import EXACT_SOURCES
from stepc.testing.probes import SOURCES
from stepc.testing.probes import Probe
from stepc.testing.probes import probe_batch

MOST_CELLS = 32  # a reference runs every cell on its own


def meshes(*, axes: tuple[str, ...] = ("data", "replica"), most_devices: int | None = None) -> st.SearchStrategy[Mesh]:
    """Meshes over these axes, in either order, of any sizes that are powers of two and fit the devices."""
    devices = jax.devices()[:most_devices]
    sizes = st.tuples(*(st.sampled_from([1, 2, 4, 8]) for _ in axes)).filter(lambda shape: prod(shape) <= len(devices))

    def made(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
        return jax.make_mesh(shape, names, devices=devices[: prod(shape)])

    return st.builds(made, sizes, st.permutations(axes).map(tuple))


def sources(*, exact: bool = False) -> st.SearchStrategy[Grad]:
    """The gradients of the probe losses, plain, cast and rematerialised.

    A narrow type rounds wherever it is summed, so what is drawn here casts to float32: the transforms, not the rounding.
    """
    plain = st.sampled_from(list((EXACT_SOURCES if exact else SOURCES).values()))
    wraps = [
        lambda transform: transform,
        lambda transform: _inside(remat(), transform),
        lambda transform: _inside(cast(jnp.float32), transform),
    ]
    wraps += [lambda transform: _inside(cast(jnp.float32) @ remat("dots_saveable"), transform)]
    return st.builds(lambda wrap, transform: wrap(transform), st.sampled_from(wraps), plain)


def _inside(transforms: Transform | Pipeline, source: Grad) -> Grad:
    loss: Any = source.loss.value  # pyright: ignore[reportAttributeAccessIssue]
    return grad(transforms @ loss, has_aux=source.has_aux, rng=source.rng, model_state=source.model_state)


@st.composite
def pipelines(
    draw: st.DrawFn,
    *,
    axes: Mapping[str, int],
    loss: Probe | None = None,
    exact: bool = False,
    transforms: tuple[Transform, ...] = (),
    longest: int = 5,
) -> Pipeline:
    """Well-typed pipelines over a mesh with these axes, with at most 32 cells.

    Args:
      axes: the size of each mesh axis; each is named at most once.
      loss: the loss; None for any of the probes.
      exact: only transforms whose results are exact on whole numbers, so that results compare bitwise.
      transforms: transforms of your own, from gradient to gradient, to mix in.
      longest: number of transforms between `update` and `grad` at most.
    """
    chosen = draw(_gradient_transforms(axes, exact, transforms, longest))
    optimizers = [optax.sgd(0.5), optax.sgd(0.5, momentum=0.5)]
    pipeline = update(draw(st.sampled_from(optimizers)))
    outside: list[Transform] = draw(
        st.lists(st.sampled_from([skip_nonfinite(limit=3), ema(0.5)]), max_size=2, unique=True)
    )
    for transform in outside:
        pipeline = transform @ pipeline
    if draw(st.sampled_from([False, False, False, True])):
        pipeline = repeat(2) @ pipeline
    for transform in chosen:
        pipeline = pipeline @ transform
    return pipeline @ (grad(loss) if loss is not None else draw(sources(exact=exact)))


@st.composite
def _gradient_transforms(
    draw: st.DrawFn, axes: Mapping[str, int], exact: bool, transforms: tuple[Transform, ...], longest: int
) -> list[Transform]:
    free, cells, divided, chosen = dict(axes), 1, False, []
    for _ in range(draw(st.integers(0, longest))):
        single = rows() in chosen  # one row has no parts
        sizes = [k for k in (1, 2, 4, 8) if cells * k <= MOST_CELLS] if not single else [1]
        spaces = [axis for axis, size in free.items() if cells * size <= MOST_CELLS and not (single and size > 1)]
        options: list[st.SearchStrategy[Any]] = [
            st.sampled_from(sizes).map(accumulate),
            st.sampled_from([0.5, 2.0, -1.0, 1.0]).map(scale),
            *([_shards(spaces, levels=[0, 0, 1, 2, 3] if not divided else [0])] if spaces else []),
            *([st.just(loss_scale(initial=8.0))] if loss_scale(initial=8.0) not in chosen else []),
            *([st.just(rows())] if cells <= MOST_CELLS // 4 else []),
            *([] if exact else [st.sampled_from([0.5, 1.0, 1e6]).map(clip), st.just(noise(0.25))]),
            st.sampled_from(sizes).map(lambda k: accumulate(k, dtype=jnp.float32)),
            *([st.sampled_from(transforms)] if transforms else []),
        ]
        transform = draw(st.one_of(options))
        chosen.append(transform)
        cells *= num_parts(transform, axes)
        rules = (
            [rule for rule in transform.rules if isinstance(rule, DataParallel)] if isinstance(transform, Shard) else []
        )
        free = {axis: size for axis, size in free.items() if not any(axis in rule.axes for rule in rules)}
        divided = divided or any(rule.zero for rule in rules)
    return chosen


def _shards(axes: list[str], *, levels: list[int]) -> st.SearchStrategy[Shard]:
    """`shard(dp(axis, ...))` over one of these axes, with one of these levels of `zero`."""

    def made(axis: str, zero: int, gather: str) -> Shard:
        return shard(dp(axis, zero=zero, gather=gather if zero == 3 else "step"))

    return st.builds(made, st.sampled_from(axes), st.sampled_from(levels), st.sampled_from(GATHERS))


def batches(pipeline: Pipeline, *, axes: Mapping[str, int]) -> st.SearchStrategy[dict[str, Any]]:
    """Whole-number batches for the probes, with as many rows as the pipeline can split."""
    cells = prod(num_parts(transform, axes) for transform in pipeline.transforms)
    times = [node.size for node in expand_transforms(pipeline.transforms) if isinstance(node, RepeatNode)]
    # Powers of two, so that a mean over the rows of a cell is exact.
    num_rows = st.sampled_from([1, 2, 4]).map(lambda each: each * cells)

    def made(number: int, seed: int) -> dict[str, Any]:
        if not times:
            return probe_batch(number, seed=seed)
        steps = [probe_batch(number, seed=seed + turn) for turn in range(times[0])]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *steps)

    return st.builds(made, num_rows, st.integers(0, 2**16))


def num_parts(transform: Transform, axes: Mapping[str, int]) -> int:
    """Into how many parts a transform splits its rows; a transform that takes single rows is counted as one."""
    places = [
        node.place
        for node in transform.expand()
        if isinstance(node, MeanNode) and not isinstance(node.place, UnderVmap)
    ]
    return prod(one.size if isinstance(one, InScan) else prod(axes[axis] for axis in one.axes) for one in places)
