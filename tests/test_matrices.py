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


LAYERS = {f"layer{number}": (8, 8) for number in range(3)} | {"in": IN, "out": (16, 8), "bias": (8,)}


def chain_of(params: Any, rows: jax.Array) -> jax.Array:
    stream = jnp.tanh(rows @ params["in"]) @ params["out"] + params["bias"][None]
    for number in range(3):
        stream = jnp.tanh(stream @ params[f"layer{number}"])
    return jnp.mean(stream**2)


def step_of_layers(optimizer: Any, *, outer: Any = None, rules: Any = (), **level: Any) -> tuple[sc.Step, Any, Any]:
    gradient = sc.accumulate(2) @ sc.shard(sc.dp("data", **level), *rules) @ sc.grad(chain_of)
    update = sc.update(optimizer)
    mesh = mesh_of(data=2, model=2) if rules else mesh_of(data=2)
    step = sc.compile((update if outer is None else outer @ update) @ gradient, mesh=mesh)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in LAYERS.items()}
    return step, step.init(params), jnp.asarray(rng.standard_normal((8, 8), np.float32))


def mixing() -> optax.GradientTransformation:
    """Each matrix is changed by the product of all of one shape: no device may compute one alone."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        total = sum(grads[name] @ grads[name].T for name in LAYERS if name.startswith("layer"))
        return {name: -0.1 * (total @ g if name.startswith("layer") else g) for name, g in grads.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def halved() -> optax.GradientTransformation:
    """All gradients in one call, as newer versions of optax correct a bias."""
    update = jax.jit(lambda grads: jax.tree.map(lambda leaf: leaf / 2, grads))
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda grads, state, _: (update(grads), state)
    )


def by_label(*steps: int) -> optax.GradientTransformation:
    """Two optimizers of matrices, with so many steps of Newton and Schulz each; the second of `layer2` alone."""
    named = {str(place): muon(0.1, ns_steps=number) for place, number in enumerate(steps)}
    return optax.multi_transform(named, {name: "1" if name == "layer2" else "0" for name in LAYERS})


@pytest.mark.parametrize(
    ("optimizer", "shared", "options"),
    [
        (lambda: muon(0.1), 3, {"zero": 1}),
        (lambda: muon(0.1), 3, {"zero": 3, "outer": sc.skip_nonfinite(limit=3)}),
        (lambda: muon(0.1), 2, {"zero": 1, "rules": (sc.tp({"layer0": P(None, "model")}, default=P()),)}),
        (lambda: muon(0.1, adam_b1=0.8, weight_decay=0.1), 3, {"zero": 1, "offload": "optimizer"}),
        (lambda: shampoo(0.1), 3, {"zero": 2}),
        (mixing, 0, {"zero": 1}),
        (lambda: optax.chain(halved(), muon(0.1)), 3, {"zero": 1}),
        (lambda: by_label(5, 4), 2, {"zero": 1}),
        (lambda: by_label(5, 5), 3, {"zero": 1}),
    ],
    ids=[
        "muon",
        "zero=3, skip",
        "model",
        "decay, offload",
        "shampoo",
        "mixing",
        "one call",
        "other steps",
        "two labels",
    ],
)
def test_matrices_of_one_shape_are_shared_by_the_devices(optimizer: Any, shared: int, options: Any) -> None:
    step, state, rows = step_of_layers(optimizer(), **options)
    assert_equivalent(step, state, rows, tolerance=1e-5)
    state, _ = step(state, rows)
    assert_equivalent(step, state, rows, tolerance=1e-5)
    told = [note for note in step.lower(state, rows).plan.notes if "gives each device some, whole" in note]
    assert [note.count("`layer") for note in told] == ([shared] if shared else [])


def test_shared_matrices_take_a_part_of_the_operations_and_no_more_traffic() -> None:
    sizes, flops, sent = {"layer": (128, 128)}, {}, {}

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        return jnp.mean(jnp.stack([rows @ leaf for leaf in params.values()]) ** 2)

    for number in (1, 4):
        params = {f"layer{index}": jax.ShapeDtypeStruct(sizes["layer"], jnp.float32) for index in range(number)}
        step = sc.compile(sc.update(muon(0.1)) @ sc.shard(sc.dp("data", zero=1)) @ sc.grad(loss), mesh=mesh_of(data=4))
        made = step.lower(step.init(params), jax.ShapeDtypeStruct((4, 128), jnp.float32)).compile()
        flops[number] = made.executable.cost_analysis()["flops"]
        sent[number] = made.collectives().executed_bytes
    assert flops[4] < 1.1 * flops[1]  # each device computes one
    assert sent[4] < 4 * sent[1]


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
