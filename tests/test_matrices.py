"""Optimizers that multiply whole matrices equal their reference; what they send where `zero` shards the state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers, muon

import stepc as sc
from stepc.testing import assert_equivalent

IN, STACK = (8, 16), (4, 16, 16)  # on two devices each is sharded along its last dimension by default
IN_BYTES = 8 * 16 * 4
DIMENSIONS = {"in": MuonDimensionNumbers(0, 1), "bias": None, "layers": MuonDimensionNumbers(1, 2)}


def shampoo(rate: float) -> optax.GradientTransformation:
    """Preconditions each matrix by the inverse of the sum of its products; of vectors it takes the gradient."""

    def init(params: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[:-1] + leaf.shape[-2:-1]), params)

    def summed(total: jax.Array, grad: jax.Array) -> jax.Array:
        return total + (jnp.einsum("...ij,...kj->...ik", grad, grad) if grad.ndim > 1 else 0)

    def scaled(grad: jax.Array, total: jax.Array) -> jax.Array:
        if grad.ndim == 1:
            return -rate * grad
        return -rate * jnp.linalg.solve(total + jnp.eye(total.shape[-1])[(None,) * (total.ndim - 2)], grad)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = jax.tree.map(summed, state, grads)
        return jax.tree.map(scaled, grads, state), state

    return optax.GradientTransformation(init, update)


OPTIMIZERS = {
    "muon": lambda: muon(0.1, muon_weight_dimension_numbers=DIMENSIONS),
    "shampoo": lambda: shampoo(0.1),
    "lion": lambda: optax.lion(0.1),
}


def loss(params: Any, rows: jax.Array) -> jax.Array:
    stream = jnp.tanh(rows @ params["in"] + params["bias"][None])
    stream, _ = jax.lax.scan(lambda stream, layer: (jnp.tanh(stream @ layer), None), stream, params["layers"])
    return jnp.mean(stream**2)


def step_of(name: str, **level: Any) -> tuple[sc.Step, sc.State, jax.Array]:
    gradient = sc.accumulate(2) @ sc.shard(sc.dp("data", **level)) @ sc.grad(loss)
    step = sc.compile(sc.update(OPTIMIZERS[name]()) @ gradient, mesh=mesh_of(data=2))
    rng = np.random.default_rng(0)
    shapes = {"in": IN, "bias": (16,), "layers": STACK}
    params = {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    return step, step.init(params), jnp.asarray(rng.standard_normal((8, 8), np.float32))


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("muon", {"zero": 1}),
        ("muon", {"zero": 2}),
        ("muon", {"zero": 3}),
        ("muon", {"zero": 3, "gather": "layer"}),
        ("shampoo", {"zero": 1}),
        ("shampoo", {"zero": 3}),
    ],
    ids=str,
)
def test_step_of_an_optimizer_of_matrices_equals_its_reference(name: str, level: dict[str, Any]) -> None:
    assert_equivalent(*step_of(name, **level))


def test_optimizer_of_matrices_sends_one_gather_of_those_without_a_stack_more_than_another() -> None:
    sent = {}
    for name in ("muon", "lion"):
        step, state, rows = step_of(name, zero=1)
        sent[name] = step.lower(state, rows).compile().collectives().executed_bytes
    assert sent["muon"] == sent["lion"] + IN_BYTES


def test_stack_of_matrices_is_sharded_along_it_and_others_as_by_default() -> None:
    specs = {}
    for name in ("muon", "lion"):
        _, state, _ = step_of(name, zero=1)
        specs[name] = {path.split("/")[-1]: place.spec for path, place in state.placement if "mu/" in path}
    assert specs["muon"]["layers"] == P("data")
    assert specs["lion"]["layers"] == P(None, None, "data") or specs["lion"]["layers"] == P(None, "data")
    assert specs["muon"]["in"] == specs["lion"]["in"] == P(None, "data")


def test_stack_that_is_gathered_by_layer_is_moved_to_whole_matrices_and_back() -> None:
    step, state, rows = step_of("muon", zero=3, gather="layer")
    kinds = [row.kind for row in step.lower(state, rows).compile().collectives() if row.kind == "all-to-all"]
    assert len(kinds) == 2


def test_plan_says_what_becomes_of_the_matrices() -> None:
    found = {}
    for level in ({"zero": 1}, {"zero": 3, "gather": "layer"}):
        step, state, rows = step_of("muon", **level)
        found |= dict.fromkeys(note for note in step.lower(state, rows).plan.notes if "multiplies" in note)
    does = f"`{step.pipeline.transforms[0]!r}` multiplies matrices of"
    assert list(found) == [
        f"{does} `in`: 512 B are gathered once a step, and every device computes all of it",
        f"{does} `layers`: each device has whole ones",
        f"{does} `layers`: an all-to-all of 4,096 B gives each device whole ones, and another takes them back",
    ]
