"""Rung 1 of the ladder: the reference of a pipeline equals its expansion, evaluated. No compiler here."""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import (
    AXES,
    EXACT,
    JITTED_SOURCES,
    LOSSES,
    PROBES,
    ROUNDED,
    SAMPLES,
    STEPS,
    UPDATES,
    fits,
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


def assert_expansion_equals_reference(pipeline: sc.Pipeline, *, tolerance: float) -> None:
    reference = sc.reference(pipeline, axes=AXES)
    repeats = [transform.n for transform in pipeline.transforms if repr(transform).startswith("repeat")]
    batch = jax.tree.map(jnp.asarray, probe_batch(ROWS))
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * repeats[0]), batch) if repeats else batch
    source: Any = pipeline.transforms[-1]
    params, model_state = jax.tree.map(jnp.asarray, (probe_params(source), probe_model_state(source, ROWS)))
    state = reference.init(params, seed=3, model_state=model_state)
    program = bind(expand_transforms(pipeline.transforms), AXES)
    after, metrics = reference(state, batch)
    evaluated, evaluated_metrics = evaluate(program, evaluation_state(state), batch)
    expected = (compared_leaves(evaluation_state(after)), metrics)
    got = (compared_leaves(evaluated), evaluated_metrics)
    assert_equal_trees(got, expected, tolerance=tolerance, of=repr(pipeline))


@pytest.mark.parametrize("source", JITTED_SOURCES)
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_expansion_of_a_gradient_transform_equals_its_reference(name: str, source: str) -> None:
    transform, grad, replica = SAMPLES[name], JITTED_SOURCES[source], sc.shard(sc.dp("replica"))
    split = sc.accumulate(2) @ replica @ transform if name == "rows" else sc.accumulate(2) @ transform @ replica
    # The same operations in the same order, so bitwise even where there is rounding.
    for pipeline in (SGD @ transform @ grad, SGD @ split @ grad):
        assert_expansion_equals_reference(pipeline, tolerance=0.0)


@pytest.mark.parametrize(
    ("name", "source"), [pair for pair in product(STEPS, JITTED_SOURCES) if fits(pair[0], JITTED_SOURCES[pair[1]])]
)
def test_expansion_of_a_step_transform_equals_its_reference(name: str, source: str) -> None:
    assert_expansion_equals_reference(
        SAMPLES[name] @ SGD @ sc.clip(1.0) @ sc.accumulate(2) @ JITTED_SOURCES[source], tolerance=0.0
    )


@pytest.mark.parametrize("name", LOSSES)
def test_expansion_of_a_loss_transform_equals_its_reference(name: str) -> None:
    for probe in PROBES.values():
        assert_expansion_equals_reference(SGD @ sc.accumulate(2) @ sc.grad(SAMPLES[name] @ probe), tolerance=0.0)


@pytest.mark.parametrize("name", UPDATES)
def test_expansion_of_an_update_equals_its_reference(name: str) -> None:
    assert_expansion_equals_reference(
        SAMPLES[name] @ sc.clip(1.0) @ sc.accumulate(2) @ sc.grad(PROBES["over_rows"]), tolerance=0.0
    )


def test_reference_equals_manual_averaging() -> None:
    loss = PROBES["coupling_rows"]
    pipeline = SGD @ sc.accumulate(2) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
    reference = sc.reference(pipeline, axes={"data": 2})
    params, batch = jax.tree.map(jnp.asarray, (probe_params(), probe_batch(8)))
    state, metrics = reference(reference.init(params), batch)
    # By hand: the rows of each local microbatch, written out.
    microbatches = [[0, 2], [4, 6], [1, 3], [5, 7]]
    values = [
        jax.value_and_grad(loss)(params, jax.tree.map(lambda x, m=m: x[np.array(m)], batch)) for m in microbatches
    ]
    assert metrics["loss"] == sum(value for value, _ in values) / 4
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *[grads for _, grads in values])
    assert_equal_trees(
        state.params, jax.tree.map(lambda p, g: p - 0.5 * g, params, mean), tolerance=0.0, of="manual averaging"
    )


def test_reference_of_the_whole_batch_equals_accumulation_for_a_mean_over_rows() -> None:
    batch, params = probe_batch(16), jax.tree.map(jnp.asarray, probe_params())
    at_once = sc.reference(SGD @ sc.grad(PROBES["over_rows"]))
    accumulated = sc.reference(SGD @ sc.accumulate(4) @ sc.grad(PROBES["over_rows"]))
    got = accumulated(accumulated.init(params), batch)
    expected = at_once(at_once.init(params), batch)
    assert_equal_trees(got, expected, tolerance=0.0, of="the accumulated and the whole batch")
