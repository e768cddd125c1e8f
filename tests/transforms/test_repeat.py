"""`repeat`: the same bits as single steps, in one dispatch."""

import jax
import numpy as np
import optax
import pytest
from catalogue import probe_batch, probe_params
from conftest import mesh_of

import stepc as sc
from stepc.testing import assert_equal_trees
from stepc.testing.probes import drawing

STEP = sc.skip_nonfinite() @ sc.ema(0.5) @ sc.update(optax.sgd(0.5, momentum=0.5)) @ sc.accumulate(2)


@pytest.mark.parametrize("devices", [1, 4])
def test_repeated_steps_are_single_steps(devices: int) -> None:
    inner = STEP @ sc.shard(sc.dp("data")) @ sc.grad(drawing, rng="example")
    single, many = (sc.compile(one, mesh=mesh_of(data=devices)) for one in (inner, sc.repeat(3) @ inner))
    batches = [probe_batch(16, seed=number) for number in range(3)]
    batches[1]["y"][3] = np.nan
    state, losses = single.init(probe_params()), []
    for batch in batches:
        state, metrics = single(state, batch)
        losses.append(metrics["loss"])
    together, stacked, watch = many.step_with_diagnostics(
        many.init(probe_params()), jax.tree.map(lambda *x: np.stack(x), *batches)
    )
    assert_equal_trees(together, state, tolerance=0.0, of="three steps in one dispatch and in three")
    assert np.array_equal(stacked["loss"], np.stack(losses), equal_nan=True)
    assert list(np.asarray(stacked["skipped"])) == [0, 1, 0]
    assert list(np.asarray(watch.finite)) == [True, False, True]
    assert int(together.step) == 2
    assert (many.steps_per_call, single.steps_per_call) == (3, 1)


def test_every_leaf_is_donated_through_the_loop() -> None:
    step = sc.compile(sc.repeat(4) @ STEP @ sc.grad(drawing, rng="example"))
    batch = jax.tree.map(lambda leaf: np.stack([leaf] * 4), probe_batch(8))
    program = step.lower(step.init(probe_params()), batch).compile()
    assert all(leaf.donated and leaf.aliased for leaf in program.donated())


def test_optimizer_whose_state_changes_type_is_refused_in_a_loop() -> None:
    """As without one. The loop of jax would refuse it in its own words."""
    optimizer = optax.GradientTransformation(lambda params: np.int32(0), lambda grads, state, params=None: (grads, 0.5))
    step = sc.compile(sc.repeat(2) @ sc.update(optimizer) @ sc.grad(drawing, rng="example"))
    batch = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), probe_batch(16))
    with pytest.raises(sc.ConfigError) as refused:
        step(step.init(probe_params()), batch)
    assert str(refused.value) == (
        "`opt_state` goes in as int32[] and comes out as float32[].\n\n"
        "  reason  a state whose type changes is retraced every step, and its buffers cannot be reused"
    )
