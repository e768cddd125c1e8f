"""The example steps, each compared with the same step written by hand in plain JAX, and run as a program."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from examples.steps import frozen_embeddings, frozen_encoder, ppo, qlora
from stepc._language.semantics import draw_tag

ROOT = Path(__file__).parent.parent.parent
# The parameters that each trains: all others are frozen.
TRAINED = {
    "qlora": (qlora, ("lora",)),
    "frozen_encoder": (frozen_encoder, ("head",)),
    "frozen_embeddings": (frozen_embeddings, ("mix", "head")),
}


def by_hand(example: Any, trained: tuple[str, ...], steps: int) -> tuple[Any, Any]:
    """The parameters and the losses, in plain JAX: a gradient with respect to a part of the tree."""
    params, batch = example.init(jax.random.key(0)), example.batch()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    own = {name: params[name] for name in trained}
    opt_state = optimizer.init(own)

    @jax.jit
    def step(own: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda own: example.loss({**params, **own}, batch))(own)
        updates, opt_state = optimizer.update(grads, opt_state, own)
        return optax.apply_updates(own, updates), opt_state, loss

    losses = []
    for _ in range(steps):
        own, opt_state, loss = step(own, opt_state)
        losses.append(loss)
    return {**params, **own}, losses


@pytest.mark.parametrize(("k", "devices"), [(1, 1), (4, 1), (4, 8)])
@pytest.mark.parametrize("name", TRAINED)
def test_example_equals_the_step_by_hand(name: str, k: int, devices: int) -> None:
    example, trained = TRAINED[name]
    expected, losses = by_hand(example, trained, steps=3)
    step = sc.compile(example.pipeline(k=k), mesh=mesh_of(data=devices))
    state = step.init(example.init(jax.random.key(0)))
    for loss in losses:
        state, metrics = step(state, example.batch())
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(expected), strict=True
    ):
        largest = float(np.max(np.abs(np.asarray(want, np.float64))))
        # Sums in another order, and Adam divides by the root of a small number.
        assert np.max(np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))) <= 1e-5 * largest, path
    num_trained = len(jax.tree.leaves({one: expected[one] for one in trained}))
    assert len(jax.tree.leaves(state.opt_state)) == 2 * num_trained + 1  # two moments of each, and a count


def assert_same_parameters(got: Any, expected: Any) -> None:
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        wide = np.asarray(two, np.float64)
        # Sums in another order, and Adam divides by the root of a small number.
        assert np.max(np.abs(np.asarray(one, np.float64) - wide)) <= 1e-6 * np.max(np.abs(wide)), path


@pytest.mark.parametrize(("k", "devices"), [(1, 1), (4, 1), (4, 8)])
def test_ppo_equals_the_epochs_by_hand(k: int, devices: int) -> None:
    params, batch = ppo.init(jax.random.key(0)), ppo.rollout(ppo.init(jax.random.key(0)), jax.random.key(1))
    step = sc.compile(ppo.pipeline(k=k), mesh=mesh_of(data=devices))
    state = step.init(params, seed=5)
    key = jax.random.fold_in(jax.random.fold_in(state.rng, 0), draw_tag("epochs"))
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-3))
    opt_state, losses = optimizer.init(params), []

    @jax.jit
    def by_hand(params: Any, opt_state: Any, rows: Any) -> tuple[Any, Any, jax.Array]:
        (loss, _), grads = jax.value_and_grad(ppo.loss, has_aux=True)(params, rows)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    for epoch in range(4):
        for rows in np.split(np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), 256)), 4):
            minibatch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
            params, opt_state, loss = by_hand(params, opt_state, minibatch)
            losses.append(loss)
    state, metrics = step(state, jax.device_get(batch))
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)
    assert_same_parameters(state.params, params)


@pytest.mark.parametrize("name", [*TRAINED, "ppo"])
def test_example_runs_as_a_program(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.steps.{name}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout
