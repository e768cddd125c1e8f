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

from stepc.core.nodes import Lanes, Mean, Repeat, Time
from stepc.language.pipeline import Pipeline, Transform, expanded
from stepc.language.sharding import DataParallel, dp
from stepc.language.words.accumulate import accumulate
from stepc.language.words.cast import cast
from stepc.language.words.clip import clip
from stepc.language.words.ema import ema
from stepc.language.words.grad import Grad, grad
from stepc.language.words.loss_scale import loss_scale
from stepc.language.words.noise import noise
from stepc.language.words.remat import remat
from stepc.language.words.repeat import repeat
from stepc.language.words.rows import rows
from stepc.language.words.scale import scale
from stepc.language.words.shard import Shard, shard
from stepc.language.words.skip_nonfinite import skip_nonfinite
from stepc.language.words.update import update
from stepc.testing.probes import EXACT_SOURCES, SOURCES, Probe, probe_batch

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

    A narrow type rounds wherever it is summed, so what is drawn here casts to float32: the words, not the rounding.
    """
    plain = st.sampled_from(list((EXACT_SOURCES if exact else SOURCES).values()))
    wraps = [lambda word: word, lambda word: _inside(remat(), word), lambda word: _inside(cast(jnp.float32), word)]
    wraps += [lambda word: _inside(cast(jnp.float32) @ remat("dots_saveable"), word)]
    return st.builds(lambda wrap, word: wrap(word), st.sampled_from(wraps), plain)


def _inside(words: Transform | Pipeline, source: Grad) -> Grad:
    loss: Any = source.loss.value  # pyright: ignore[reportAttributeAccessIssue]
    return grad(words @ loss, has_aux=source.has_aux, rng=source.rng, carry=source.carry)


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
    chosen = draw(_gradient_words(axes, exact, words, longest))
    optimizers = [optax.sgd(0.5), optax.sgd(0.5, momentum=0.5)]
    pipeline = update(draw(st.sampled_from(optimizers)))
    outside: list[Transform] = draw(
        st.lists(st.sampled_from([skip_nonfinite(limit=3), ema(0.5)]), max_size=2, unique=True)
    )
    for word in outside:
        pipeline = word @ pipeline
    if draw(st.sampled_from([False, False, False, True])):
        pipeline = repeat(2) @ pipeline
    for word in chosen:
        pipeline = pipeline @ word
    return pipeline @ (grad(loss) if loss is not None else draw(sources(exact=exact)))


@st.composite
def _gradient_words(
    draw: st.DrawFn, axes: Mapping[str, int], exact: bool, words: tuple[Transform, ...], longest: int
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
            *([st.sampled_from(words)] if words else []),
        ]
        word = draw(st.one_of(options))
        chosen.append(word)
        cells *= num_parts(word, axes)
        rules = [rule for rule in word.rules if isinstance(rule, DataParallel)] if isinstance(word, Shard) else []
        free = {axis: size for axis, size in free.items() if not any(axis in rule.axes for rule in rules)}
        divided = divided or any(rule.zero for rule in rules)
    return chosen


def _shards(axes: list[str], *, levels: list[int]) -> st.SearchStrategy[Shard]:
    """`shard(dp(axis, ...))` over one of these axes, with one of these levels of `zero`."""

    def made(axis: str, zero: int, often: bool) -> Shard:
        return shard(dp(axis, zero=zero, gather="microbatch" if often and zero == 3 else "step"))

    return st.builds(made, st.sampled_from(axes), st.sampled_from(levels), st.booleans())


def batches(pipeline: Pipeline, *, axes: Mapping[str, int]) -> st.SearchStrategy[dict[str, Any]]:
    """Whole-number batches for the probes, with as many rows as the pipeline can split."""
    cells = prod(num_parts(word, axes) for word in pipeline.words)
    times = [node.size for node in expanded(pipeline.words) if isinstance(node, Repeat)]
    # Powers of two, so that a mean over the rows of a cell is exact.
    num_rows = st.sampled_from([1, 2, 4]).map(lambda each: each * cells)

    def made(number: int, seed: int) -> dict[str, Any]:
        if not times:
            return probe_batch(number, seed=seed)
        steps = [probe_batch(number, seed=seed + turn) for turn in range(times[0])]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *steps)

    return st.builds(made, num_rows, st.integers(0, 2**16))


def num_parts(word: Transform, axes: Mapping[str, int]) -> int:
    """Into how many parts a word splits its rows; a word that takes single rows is counted as one."""
    places = [node.place for node in word.expand() if isinstance(node, Mean) and not isinstance(node.place, Lanes)]
    return prod(one.size if isinstance(one, Time) else prod(axes[axis] for axis in one.axes) for one in places)
