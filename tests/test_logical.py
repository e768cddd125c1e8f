"""The names that Flax gives the dimensions of parameters, and the rules that shard by them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from flax import nnx
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._language.state import leaves_by_path
from stepc.testing import assert_equivalent

RULES = sc.tp(sc.logical({"embed": None, "mlp": "model"}), default=P())
X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
BOXES: dict[str, Callable[..., Any]] = {
    "partitioned": nn.with_partitioning, "logical": nn.with_logical_partitioning,
}  # fmt: skip
SHARDED = {"up/kernel": P(None, "model"), "up/bias": P("model"), "down/kernel": P("model"), "down/bias": P()}


def linen(box: str) -> tuple[Callable[..., jax.Array], Any]:
    """A loss, and boxed parameters."""
    named, kernel = BOXES[box], nn.initializers.lecun_normal()

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            bias = named(nn.initializers.zeros, ("mlp",))
            hidden = nn.Dense(32, kernel_init=named(kernel, ("embed", "mlp")), bias_init=bias, name="up")(x)
            return nn.Dense(1, kernel_init=named(kernel, ("mlp", "embed")), name="down")(nn.relu(hidden))

    def loss(params: Any, rows: Any) -> jax.Array:
        return jnp.mean(model.apply({"params": params}, rows["x"]) ** 2)

    model = Model()
    return loss, model.init(jax.random.key(0), X)["params"]


def compiled(loss: Any, *rules: Any, **options: Any) -> sc.Step:
    pipeline = sc.update(optax.adam(1e-2)) @ sc.accumulate(2) @ sc.shard(sc.dp("data", **options), *rules)
    return sc.compile(pipeline @ sc.grad(loss), mesh=mesh_of(data=4, model=2))


def specs_of(state: sc.State) -> dict[str, P]:
    return {path: leaf.sharding.spec for path, leaf in leaves_by_path(state.params)}


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("box", BOXES)
def test_boxed_linen_parameters_are_sharded_by_their_names(box: str, zero: int) -> None:
    loss, params = linen(box)
    step = compiled(loss, RULES, zero=zero)
    state = step.init(params)
    if zero == 0:
        assert specs_of(state) == SHARDED
    assert_equivalent(step, state, {"x": X}, tolerance=1e-5)  # sums over devices in another order
    assert step.lower(state, {"x": X}).plan.notes == ()
    # A state goes on without the boxes, and keeps the names.
    again = step.init(state.params, like=state)
    assert specs_of(again) == specs_of(state)
    step(again, {"x": X})
    assert step.traces == 1


def test_shapes_of_boxed_parameters_are_sharded_as_they_are() -> None:
    loss, params = linen("partitioned")
    step = compiled(loss, RULES)
    assert specs_of(step.init(jax.eval_shape(lambda: params))) == SHARDED


@pytest.mark.parametrize("box", BOXES)
def test_boxes_are_taken_off_and_names_that_no_rule_reads_are_in_the_plan(box: str) -> None:
    """A box constrained its value to `embed`, which is no axis of the mesh: the loss did not trace."""
    loss, params = linen(box)
    step = compiled(loss)
    state = step.init(params)
    assert jax.tree.structure(state.params) == jax.tree.structure(nn.unbox(params))
    assert_equivalent(step, state, {"x": X}, tolerance=1e-5)  # as above
    (note,) = step.lower(state, {"x": X}).plan.notes
    assert note == (
        'the model names the dimensions of 3 parameters ("mlp", "embed"), and no rule reads the names: '
        '`tp(logical({"mlp": …, "embed": …}))` does, with a mesh axis or None for each'
    )


def test_pattern_decides_before_a_name_and_nothing_is_said_of_it() -> None:
    loss, params = linen("partitioned")
    up = sc.tp({"up/*": P()}, sc.logical({"embed": None, "mlp": "model"}), default=P())
    state = compiled(loss, up).init(params)
    assert specs_of(state) == {**SHARDED, "up/kernel": P(), "up/bias": P()}
    step = compiled(loss, sc.tp({"**": P()}))
    assert step.lower(step.init(params), {"x": X}).plan.notes == ()


def test_names_of_unboxed_parameters_are_an_argument() -> None:
    loss, boxed = linen("partitioned")
    specs, table = nn.get_partition_spec(boxed), {"embed": None, "mlp": "model"}
    by_pattern = {"up/kernel": P("embed", "mlp"), "up/bias": P("mlp"), "down/kernel": P("mlp", "embed")}
    for names, default in ((specs, None), (by_pattern, P())):
        rules = sc.tp(sc.logical(table, names=names), default=default)
        assert specs_of(compiled(loss, rules).init(nn.unbox(boxed))) == SHARDED
        assert eval(repr(rules), {"tp": sc.tp, "logical": sc.logical, "P": P}) == rules


def test_axis_that_a_scan_over_layers_adds_has_a_name_too() -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(8, kernel_init=kernel, use_bias=False, name="dense")(x), None

    layers = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()  # fmt: skip

    def loss(params: Any, rows: Any) -> jax.Array:
        return jnp.mean(layers.apply({"params": params}, rows["x"], None)[0] ** 2)

    rules = sc.tp(sc.logical({"layers": None, "embed": None, "mlp": "model"}))
    step = compiled(loss, rules)
    state = step.init(layers.init(jax.random.key(0), X, None)["params"])
    assert specs_of(state) == {"dense/kernel": P(None, None, "model")}
    assert_equivalent(step, state, {"x": X}, tolerance=1e-5)  # as above


@pytest.mark.parametrize("is_placed", [False, True])
def test_nnx_parameters_are_sharded_by_their_names(is_placed: bool) -> None:
    """Variables keep their metadata: `nnx.merge` needs them. What NNX has sharded itself stays so."""
    named = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.up = nnx.Linear(8, 32, rngs=nnx.Rngs(0), kernel_init=named)
            self.down = nnx.Linear(32, 1, rngs=nnx.Rngs(1))

    mesh = mesh_of(data=4, model=2)
    automatic = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    if is_placed:
        with jax.set_mesh(automatic), nnx.logical_axis_rules((("embed", None), ("mlp", "model"))):
            graph, params = nnx.split(Model(), nnx.Param)
    else:
        with nnx.use_eager_sharding(False):
            graph, params = nnx.split(Model(), nnx.Param)

    def loss(params: Any, rows: Any) -> jax.Array:
        model = nnx.merge(graph, params)
        return jnp.mean(model.down(nnx.relu(model.up(rows["x"]))) ** 2)

    for rules in ((RULES,), ()):
        step = compiled(loss, *rules)
        state = step.init(params)
        is_sharded = is_placed or bool(rules)
        assert specs_of(state)["up/kernel/value"] == (P(None, "model") if is_sharded else P())
        assert_equivalent(step, state, {"x": X}, tolerance=1e-5)  # as above
        notes = step.lower(state, {"x": X}).plan.notes
        assert [note[:44] for note in notes] == ([] if is_sharded else ["the model names the dimensions of 1 paramete"])


def test_single_device_shards_nothing_and_says_nothing() -> None:
    loss, params = linen("logical")
    step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(loss))
    state = step.init(params)
    assert step.lower(state, {"x": X}).plan.notes == ()
    assert_equivalent(step, state, {"x": X})
    assert jax.tree.structure(step.reference.init(params).params) == jax.tree.structure(state.params)
