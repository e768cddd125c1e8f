"""The step of the demo: what is drawn, in which precision, and what a bad batch does."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import optax
import pytest

import stepc as sc
from examples.gpt import model as gpt
from examples.gpt.job import Job
from examples.gpt.train import pipeline_of

JOB = Job(steps=5, batch=8, k=2, devices=1, layers=1, width=16, heads=2, context=8)
PRODUCT_AND_EXP = (" dot_general[", " exp ")  # as a jaxpr writes them


def params() -> gpt.GPT:
    return gpt.init(jax.random.key(0), JOB.size)


def windows(seed: int = 1) -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(seed).integers(0, 256, (JOB.batch, JOB.context + 1)).astype(np.int32)}


def step_of(job: Job) -> sc.Step:
    return sc.compile(pipeline_of(job), mesh=jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))


@cache
def after_one_step(*, k: int, devices: int, seed: int) -> gpt.GPT:
    """With sgd, so that a small difference of gradients stays one."""
    loss = gpt.make_dropout_loss(JOB.size, dropout=0.5)
    pipeline = sc.update(optax.sgd(1.0)) @ sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss, rng="example")
    step = sc.compile(pipeline, mesh=jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices]))
    state, _ = step(step.init(params(), seed=seed), windows())
    return jax.device_get(state.params)


def largest_difference(one: Any, other: Any) -> float:  # Any: two trees alike
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, other)))


@pytest.mark.parametrize(("k", "devices"), [(4, 1), (1, 2), (4, 2)])
def test_dropout_does_not_depend_on_k_or_devices(k: int, devices: int) -> None:
    whole = after_one_step(k=1, devices=1, seed=0)
    # The same numbers in another order of summation.
    assert largest_difference(after_one_step(k=k, devices=devices, seed=0), whole) < 1e-5


def test_dropout_changes_with_seed() -> None:
    one, other = (after_one_step(k=1, devices=1, seed=seed) for seed in (0, 1))
    assert largest_difference(one, other) > 1e-3


def test_dropout_of_nothing_is_the_plain_loss() -> None:
    keys = jax.random.split(jax.random.key(0), JOB.batch)
    plain = jax.jit(gpt.make_loss(JOB.size))(params(), windows())
    # A division by 1 is fused in another place.
    found = jax.jit(gpt.make_dropout_loss(JOB.size, dropout=0.0))(params(), windows(), keys)
    np.testing.assert_allclose(found, plain, rtol=1e-6)


def test_bf16_multiplies_in_bfloat16_and_keeps_float32_parameters() -> None:
    step = step_of(replace(JOB, bf16=True))
    state = step.init(params())
    lines = [line.partition("=") for line in str(step.lower(state, windows()).jaxpr()).splitlines()]
    products, exponentials = ([made for made, _, how in lines if how.startswith(name)] for name in PRODUCT_AND_EXP)
    assert products and all(":bf16[" in made for made in products)
    assert len(exponentials) >= 2 and all(":f32[" in made for made in exponentials)  # attention, cross-entropy
    state, metrics = step(state, windows())
    floats = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim]
    assert {leaf.dtype for leaf in floats} == {np.dtype("float32")}
    assert metrics["loss"].dtype == np.dtype("float32")


def test_bf16_loss_is_close_to_float32() -> None:
    losses = []
    for job in (JOB, replace(JOB, bf16=True)):
        step = step_of(job)
        losses.append(float(step(step.init(params()), windows())[1]["loss"]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)  # bfloat16 has eight bits
    assert losses[0] != losses[1]


def test_batch_of_nan_leaves_the_run_as_if_it_had_not_been_there() -> None:
    job = replace(JOB, dropout=0.1)
    bad = windows(2)
    bad["tokens"][3, -1] = 300  # no byte: its cross-entropy is NaN
    step = step_of(job)
    state, without = step.init(params()), step.init(params())
    skipped = []
    for batch in (windows(1), bad, windows(3)):
        state, metrics = step(state, batch)
        skipped.append(int(metrics["skipped"]))
    for batch in (windows(1), windows(3)):
        without, _ = step(without, batch)
    assert skipped == [0, 1, 0]
    for one, other in zip(
        jax.tree.leaves((state.params, state.opt_state, state.step)),
        jax.tree.leaves((without.params, without.opt_state, without.step)),
        strict=True,
    ):
        assert (one == other).all()


def test_pipeline_without_dropout_draws_nothing() -> None:
    assert repr(pipeline_of(JOB)).endswith("@ grad(loss)")
