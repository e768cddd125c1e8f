"""Rung 1 of the ladder: the meaning of a pipeline is the meaning of its expansion. No compiler here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import AXES, EXACT, PROBES, ROUNDED, SAMPLES, UPDATES, probe_batch, probe_params

import stepc as sc
from stepc.compiler.check import bind
from stepc.core.evaluate import evaluate
from stepc.testing import assert_equal_trees

SGD = sc.update(optax.sgd(0.5))
ROWS = 32


def both_readings(pipeline: sc.Pipeline, *, tolerance: float) -> None:
    meaning = sc.reference(pipeline, axes=AXES)
    batch = jax.tree.map(jnp.asarray, probe_batch(ROWS))
    state = meaning.init(jax.tree.map(jnp.asarray, probe_params()))
    after, metrics = meaning(state, batch)
    program = bind(tuple(node for word in pipeline.words for node in word.expand()), AXES)
    got = evaluate(program, state.params, state.opt_state, batch)
    assert_equal_trees(got, (after.params, after.opt_state, metrics), tolerance=tolerance, of=repr(pipeline))


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_expansion_of_a_word_means_what_the_word_means(name: str, probe: str) -> None:
    word, grad = SAMPLES[name], sc.grad(PROBES[probe])
    # Two readings, the same operations in the same order: bitwise also where there is rounding.
    for pipeline in (
        SGD @ word @ grad,
        SGD @ word @ sc.accumulate(2) @ grad,
        SGD @ sc.accumulate(2) @ word @ sc.shard(sc.dp("replica")) @ grad,
    ):
        both_readings(pipeline, tolerance=0.0)


@pytest.mark.parametrize("name", UPDATES)
def test_expansion_of_an_update_means_what_the_update_means(name: str) -> None:
    both_readings(SAMPLES[name] @ sc.clip(1.0) @ sc.accumulate(2) @ sc.grad(PROBES["over_rows"]), tolerance=0.0)


def test_reference_equals_manual_averaging() -> None:
    loss = PROBES["sharing_a_cell"]
    pipeline = SGD @ sc.accumulate(2) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
    meaning = sc.reference(pipeline, axes={"data": 2})
    params, batch = jax.tree.map(jnp.asarray, (probe_params(), probe_batch(8)))
    state, metrics = meaning(meaning.init(params), batch)
    # By hand: the rows of each cell, written out.
    cells = [[0, 2], [4, 6], [1, 3], [5, 7]]
    values = [jax.value_and_grad(loss)(params, jax.tree.map(lambda x, c=c: x[np.array(c)], batch)) for c in cells]
    assert metrics["loss"] == sum(value for value, _ in values) / 4
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *[grads for _, grads in values])
    assert_equal_trees(
        state.params, jax.tree.map(lambda p, g: p - 0.5 * g, params, mean), tolerance=0.0, of="manual averaging"
    )


def test_reference_of_the_whole_batch_equals_accumulation_for_a_mean_over_rows() -> None:
    batch, params = probe_batch(16), jax.tree.map(jnp.asarray, probe_params())
    whole = sc.reference(SGD @ sc.grad(PROBES["over_rows"]))
    parts = sc.reference(SGD @ sc.accumulate(4) @ sc.grad(PROBES["over_rows"]))
    got, expected = parts(parts.init(params), batch), whole(whole.init(params), batch)
    assert_equal_trees(got, expected, tolerance=0.0, of="accumulation and the whole batch")
