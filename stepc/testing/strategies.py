"""Hypothesis strategies: well-typed pipelines, meshes and batches. Needs hypothesis, the extra `test`."""

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
import optax
from hypothesis import strategies as st
from jax.sharding import Mesh

from stepc.core.nodes import Mean, Time
from stepc.language.pipeline import Pipeline, Transform
from stepc.language.sharding import dp
from stepc.language.words.accumulate import accumulate
from stepc.language.words.clip import clip
from stepc.language.words.grad import grad
from stepc.language.words.scale import scale
from stepc.language.words.shard import shard
from stepc.language.words.update import update
from stepc.testing.probes import PROBES, Probe, probe_batch

MOST_CELLS = 32  # a reference runs every cell on its own


def meshes(*, axes: tuple[str, ...] = ("data", "replica"), most_devices: int | None = None) -> st.SearchStrategy[Mesh]:
    """Meshes over these axes, in either order, of any sizes that are powers of two and fit the devices."""
    devices = jax.devices()[:most_devices]
    sizes = st.tuples(*(st.sampled_from([1, 2, 4, 8]) for _ in axes)).filter(lambda shape: prod(shape) <= len(devices))

    def made(shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
        return jax.make_mesh(shape, names, devices=devices[: prod(shape)])

    return st.builds(made, sizes, st.permutations(axes).map(tuple))


@st.composite
def pipelines(
    draw: st.DrawFn,
    *,
    axes: Mapping[str, int],
    loss: Probe | None = None,
    exact: bool = False,
    words: tuple[Transform, ...] = (),
    longest: int = 5,
) -> Pipeline:
    """Well-typed pipelines over a mesh with these axes, with at most 32 cells.

    Args:
      axes: the size of each mesh axis; each is named at most once.
      loss: the loss; None for any of the probes.
      exact: only words whose results are exact on whole numbers, so that results compare bitwise.
      words: words of your own, from gradient to gradient, to mix in.
      longest: number of words between `update` and `grad` at most.
    """
    free, cells, chosen = dict(axes), 1, []
    for _ in range(draw(st.integers(0, longest))):
        sizes = [k for k in (1, 2, 4, 8) if cells * k <= MOST_CELLS]
        spaces = [axis for axis, size in free.items() if cells * size <= MOST_CELLS]
        options: list[st.SearchStrategy[Any]] = [
            st.sampled_from(sizes).map(accumulate),
            st.sampled_from([0.5, 2.0, -1.0, 1.0]).map(scale),
            *([st.sampled_from(spaces).map(lambda axis: shard(dp(axis)))] if spaces else []),
            *([] if exact else [st.sampled_from([0.5, 1.0, 1e6]).map(clip)]),
            *([st.sampled_from(words)] if words else []),
        ]
        word = draw(st.one_of(options))
        chosen.append(word)
        cells *= num_parts(word, axes)
        free = {axis: size for axis, size in free.items() if repr(word) != repr(shard(dp(axis)))}
    optimizers = [optax.sgd(0.5), optax.sgd(0.5, momentum=0.5)]
    probe = loss or draw(st.sampled_from(list(PROBES.values())))
    pipeline = update(draw(st.sampled_from(optimizers)))
    for word in chosen:
        pipeline = pipeline @ word
    return pipeline @ grad(probe)


def batches(pipeline: Pipeline, *, axes: Mapping[str, int]) -> st.SearchStrategy[dict[str, Any]]:
    """Whole-number batches for the probes, with as many rows as the pipeline can split."""
    cells = prod(num_parts(word, axes) for word in pipeline.words)
    # Powers of two, so that a mean over the rows of a cell is exact.
    rows = st.sampled_from([1, 2, 4]).map(lambda each: each * cells)
    return st.builds(lambda number, seed: probe_batch(number, seed=seed), rows, st.integers(0, 2**16))


def num_parts(word: Transform, axes: Mapping[str, int]) -> int:
    """Into how many parts a word splits its rows."""
    places = [node.place for node in word.expand() if isinstance(node, Mean)]
    return prod(one.size if isinstance(one, Time) else prod(axes[axis] for axis in one.axes) for one in places)
