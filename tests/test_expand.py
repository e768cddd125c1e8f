"""Rung 1 of the ladder: the meaning of a pipeline is the meaning of its expansion. No compiler here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import (
    AXES,
    EXACT,
    LOSSES,
    PROBES,
    ROUNDED,
    SAMPLES,
    SOURCES,
    STEPS,
    UPDATES,
    probe_batch,
    probe_model_state,
    probe_params,
)

import stepc as sc
from stepc._compiler.validation import bind
from stepc._language.pipeline import expand_transforms
from stepc.testing import assert_equal_trees
from stepc.testing.evaluate import evaluate
from stepc.testing.transforms import compared_leaves, evaluation_state

SGD = sc.update(optax.sgd(0.5))
ROWS = 32


def both_readings(pipeline: sc.Pipeline, *, tolerance: float) -> None:
    meaning = sc.reference(pipeline, axes=AXES)
    times = [transform.n for transform in pipeline.transforms if repr(transform).startswith("repeat")]
    batch = jax.tree.map(jnp.asarray, probe_batch(ROWS))
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * times[0]), batch) if times else batch
    params, model_state = jax.tree.map(jnp.asarray, (probe_params(), probe_model_state(pipeline.transforms[-1])))
    state = meaning.init(params, seed=3, model_state=model_state)
    program = bind(expand_transforms(pipeline.transforms), AXES)
    after, metrics = meaning(state, batch)
    got, told = evaluate(program, evaluation_state(state), batch)
    expected = (compared_leaves(evaluation_state(after)), metrics)
    assert_equal_trees((compared_leaves(got), told), expected, tolerance=tolerance, of=repr(pipeline))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_expansion_of_a_word_means_what_the_word_means(name: str, source: str) -> None:
    transform, grad, replica = SAMPLES[name], SOURCES[source], sc.shard(sc.dp("replica"))
    split = sc.accumulate(2) @ replica @ transform if name == "rows" else sc.accumulate(2) @ transform @ replica
    # Two readings, the same operations in the same order: bitwise also where there is rounding.
    for pipeline in (SGD @ transform @ grad, SGD @ split @ grad):
        both_readings(pipeline, tolerance=0.0)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", STEPS)
def test_expansion_of_a_step_word_means_what_the_word_means(name: str, source: str) -> None:
    both_readings(SAMPLES[name] @ SGD @ sc.clip(1.0) @ sc.accumulate(2) @ SOURCES[source], tolerance=0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_expansion_of_a_loss_word_means_what_the_word_means(name: str) -> None:
    for probe in PROBES.values():
        both_readings(SGD @ sc.accumulate(2) @ sc.grad(SAMPLES[name] @ probe), tolerance=0.0)


@pytest.mark.parametrize("name", UPDATES)
def test_expansion_of_an_update_means_what_the_update_means(name: str) -> None:
    both_readings(SAMPLES[name] @ sc.clip(1.0) @ sc.accumulate(2) @ sc.grad(PROBES["over_rows"]), tolerance=0.0)


def test_reference_equals_manual_averaging() -> None:
    loss = PROBES["coupling_rows"]
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
