"""`assert_split_invariant`: which losses become another loss when the batch is split."""

import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params
from conftest import mesh_of

import stepc as sc
from stepc.testing import assert_equivalent, assert_split_invariant

SPLIT = sc.accumulate(2) @ sc.shard(sc.dp("data"))
PARAMS = {"w": jnp.eye(8, dtype=jnp.float32) + 0.1}
ROWS = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), jnp.float32)}


def contrastive(params: Any, rows: Any) -> jax.Array:
    """Each row against all others that the loss is given."""
    embedded = rows["x"] @ params["w"]
    logits = embedded @ rows["x"].T
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))


def normalized(params: Any, rows: Any) -> jax.Array:
    hidden = rows["x"] @ params["w"]
    return jnp.mean(((hidden - hidden.mean(axis=0, keepdims=True)) / (hidden.std(axis=0, keepdims=True) + 1e-3)) ** 3)


def mean(params: Any, rows: Any) -> jax.Array:
    return jnp.mean(jnp.tanh(rows["x"] @ params["w"]) ** 2)


def summed(params: Any, rows: Any) -> jax.Array:
    return jnp.sum(jnp.tanh(rows["x"] @ params["w"]) ** 2)


def masked(params: Any, rows: Any) -> sc.Mean:
    mask = (rows["x"][:, 0] > 0).astype(jnp.float32)
    return sc.Mean(jnp.sum(jnp.tanh(rows["x"] @ params["w"]).sum(axis=1) * mask), mask.sum())


def measured(loss: Any, middle: Any = SPLIT, *, params: Any = None, batch: Any = None, **options: Any) -> None:
    step = sc.compile(sc.update(optax.adam(1e-3)) @ middle @ sc.grad(loss, **options), mesh=mesh_of(data=4))
    state = step.init(PARAMS if params is None else params)
    assert_split_invariant(step, state, ROWS if batch is None else batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("loss", "middle"),
    [
        (mean, SPLIT),
        (masked, SPLIT),
        (mean, sc.clip(0.1) @ SPLIT),
        (mean, SPLIT @ sc.rows() @ sc.clip(0.1)),
        (mean, sc.loss_scale() @ SPLIT),
        (mean, sc.clip(0.1)),
    ],
    ids=lambda case: getattr(case, "__name__", str(case)),
)
def test_mean_over_rows_does_not_depend_on_the_split(loss: Any, middle: Any) -> None:
    measured(loss, middle)


def test_contrastive_loss_is_equivalent_to_its_reference_and_not_invariant() -> None:
    """24.5 of the whole batch became 8.7 without a word: the reference splits the batch as the step does."""
    step = sc.compile(sc.update(optax.sgd(0.5)) @ SPLIT @ sc.grad(contrastive), mesh=mesh_of(data=4))
    state = step.init(PARAMS)
    assert_equivalent(step, state, ROWS)
    with pytest.raises(sc.EquivalenceError) as raised:
        assert_split_invariant(step, state, ROWS)
    whole = float(contrastive(PARAMS, ROWS))
    # Microbatch j of device d has the rows i of its 8 with i mod 2 = j.
    parts = [{"x": ROWS["x"][8 * device + part : 8 * device + 8 : 2]} for device in range(4) for part in range(2)]
    split = float(np.mean([contrastive(PARAMS, part) for part in parts]))
    text = str(raised.value)
    assert text.startswith(
        '`accumulate(2) @ shard(dp("data"))` changes the gradient: '
        "the mean over parts of the batch is not that of the whole batch.\n"
    )
    assert f"loss      {split:.6g} in parts, {whole:.6g} of the whole batch" in text
    assert "gradient  differs in w by " in text
    line = contrastive.__code__.co_firstlineno + 3
    assert text.endswith(
        f"cause     `grad(contrastive)`: couples rows: `dot_general` at test_split_invariance.py:{line} takes several "
        "of them together, so parts have another loss than the whole"
    )


@pytest.mark.parametrize("loss", [contrastive, normalized, summed])
@pytest.mark.parametrize("middle", [SPLIT, sc.accumulate(4), sc.shard(sc.dp("data", zero=1))], ids=str)
def test_loss_that_couples_rows_or_sums_them_depends_on_the_split(loss: Any, middle: Any) -> None:
    with pytest.raises(sc.EquivalenceError, match="is not that of the whole batch"):
        measured(loss, middle)


def test_transform_that_takes_the_gradient_of_each_part_is_named() -> None:
    with pytest.raises(sc.EquivalenceError) as raised:
        measured(mean, sc.accumulate(4) @ sc.clip(0.001))
    assert "or `clip(0.001)` takes the gradient of each part" in str(raised.value)


def test_keys_of_examples_do_not_depend_on_the_split_and_those_of_microbatches_do() -> None:
    def noisy(params: Any, rows: Any, keys: Any) -> jax.Array:
        noise = jax.vmap(lambda key: jax.random.normal(key, (8,)))(keys)
        return jnp.mean(jnp.tanh((rows["x"] + noise) @ params["w"]) ** 2)

    def noisy_together(params: Any, rows: Any, key: Any) -> jax.Array:
        return jnp.mean(jnp.tanh((rows["x"] + jax.random.normal(key, rows["x"].shape)) @ params["w"]) ** 2)

    measured(noisy, rng="example")
    with pytest.raises(sc.EquivalenceError):
        measured(noisy_together, rng="microbatch")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([f"p{number:02}" for number in range(20)], r"differs in p\* by 0\.\d+ \(20 leaves\); its largest magnitude"),
        (string.ascii_lowercase[:20], r" and 12 more; its largest magnitude"),
    ],
    ids=["numbered", "named"],
)
def test_many_parameters_are_counted(names: Sequence[str], told: str) -> None:
    def many(params: Any, rows: Any) -> jax.Array:
        return jnp.sum(rows["x"]) * sum(jnp.sum(leaf) for leaf in params.values())

    with pytest.raises(sc.EquivalenceError, match=told):
        measured(many, params={name: jnp.ones(()) for name in names})


def test_repeat_measures_its_first_batch() -> None:
    step = sc.compile(sc.repeat(2) @ sc.update(optax.sgd(0.5)) @ sc.accumulate(4) @ sc.grad(PROBES["over_rows"]))
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), probe_batch(16))
    assert_split_invariant(step, step.init(probe_params()), batch)
