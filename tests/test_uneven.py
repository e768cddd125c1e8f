"""Parameters that their axes do not divide: `tp(..., pad=True)` pads the state, and nothing sees the padding.

The padding is NaN, so a number that depends on it is NaN too, and equals no reference.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._compiler.padded_update import padded_update
from stepc._language.state import leaves_by_path
from stepc.testing import assert_equivalent
from stepc.testing.strategies import tensor_rules

VOCABULARY, WIDTH = 13, 8
RULES = {
    "wte": P("model"), "head": P(None, "model"), "bias": P("model"),
    "layers/up": P(None, None, "model"), "layers/down": P(None, "model"),
}  # fmt: skip
ADAM = sc.update(optax.adam(1e-2))
LEVELS = [
    {}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 3, "gather": "microbatch"}, {"zero": 3, "gather": "layer"},
    {"zero": 3, "gather": ("layer", "step")},
]  # fmt: skip


def stream(params: Any, rows: Any) -> jax.Array:
    def layer(x: jax.Array, this: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ this["up"]) @ this["down"], None

    return jax.lax.scan(layer, params["wte"][rows["token"]], params["layers"])[0] * params["scale"][None]


def loss(params: Any, rows: Any) -> jax.Array:
    """A language model: the padding of its head would be one more token to choose from."""
    logits = stream(params, rows) @ params["head"] + params["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows["next"]).mean()


def params_of(vocabulary: int = VOCABULARY) -> Any:
    random = np.random.default_rng(0)
    shapes = {
        "wte": (vocabulary, WIDTH), "head": (WIDTH, vocabulary), "bias": (vocabulary,), "scale": (WIDTH,),
        "layers": {"up": (2, WIDTH, vocabulary), "down": (2, vocabulary, WIDTH)},
    }  # fmt: skip
    return jax.tree.map(
        lambda shape: random.normal(size=shape).astype(np.float32) / 2, shapes, is_leaf=lambda one: type(one) is tuple
    )


def batch_of(rows: int = 16, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    return {name: random.integers(0, VOCABULARY, size=rows).astype(np.int32) for name in ("token", "next")}


def tensor(**options: Any) -> Any:
    return sc.tp(RULES, default=P(), pad=True, **options)


def mesh() -> Mesh:
    return mesh_of(data=2, model=4)


def step_of(outer: Any = ADAM, *, k: int = 1, source: Any = None, mode: str = "manual", **level: Any) -> sc.Step:
    rules = sc.shard(sc.dp("data", **level), tensor(), mode=mode)
    return sc.compile(outer @ sc.accumulate(k) @ rules @ (source or sc.grad(loss)), mesh=mesh())


def paddings(state: sc.State) -> dict[str, Any]:
    """What stands in the padding of each padded leaf."""
    found = {}
    for path, place in state.placement:
        if place.shape is not None:
            leaf = np.asarray(dict(leaves_by_path(state))[path])
            inside = np.zeros(leaf.shape, bool)
            inside[tuple(map(slice, place.shape))] = True
            found[path] = leaf[~inside]
    return found


@pytest.mark.parametrize(("level", "k"), [({}, 1), *((level, 4) for level in LEVELS)], ids=str)
def test_padded_state_equals_the_reference_on_every_level(level: dict[str, Any], k: int) -> None:
    step = step_of(sc.ema(0.5) @ ADAM @ sc.clip(1.0), k=k, **level)
    state = step.init(params_of())
    assert state.params["wte"].shape == (16, WIDTH)
    assert_equivalent(step, state, batch_of())
    for seed in range(2):
        state, metrics = step(state, batch_of(seed=seed))
    assert step.traces == 1 and np.isfinite(metrics["loss"])
    found = paddings(state)
    assert {path.partition("/")[0] for path in found} == {"params", "opt_state", "slots"}
    assert all(np.isnan(padding).all() for padding in found.values())
    assert all(leaf.aliased for leaf in step.lower(state, batch_of()).compile().donated())


def contrast(params: Any, z: Any) -> jax.Array:
    return (
        jnp.mean((z["own"] - z["own"].mean(axis=0)[None]) ** 2)
        + jnp.mean(params["bias"] ** 2)
        + z["sum"].total / z["sum"].count
    )


def encoded(params: Any, rows: Any) -> Any:
    made = stream(params, rows) @ params["head"]
    return {"own": made, "sum": sc.Mean(made.sum(), made.size)}


def reading(params: Any, rows: Any, *, ema: Any) -> jax.Array:
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(ema), strict=True)
    return loss(params, rows) + sum(jnp.mean((leaf - old) ** 2) for leaf, old in pairs)


def seen(grads: Any, params: Any) -> dict[str, Any]:
    """Numbers that padding would change, whatever it is filled with."""
    sizes = [jnp.float32(leaf.size) for tree in (grads, params) for leaf in jax.tree.leaves(tree)]
    return {"sizes": sum(sizes), "spread": sum(jnp.std(leaf) for leaf in jax.tree.leaves(grads))}


def is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


OPTIMIZERS = {
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "muon": lambda: optax.contrib.muon(1e-2),
    "masked decay": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1, mask=is_matrix)
    ),
    "lbfgs": lambda: optax.lbfgs(memory_size=2),
}
PIPELINES: dict[str, Callable[..., sc.Step]] = {
    "measure": lambda **level: step_of(ADAM @ sc.measure(seen), k=2, **level),
    "measure in the loop": lambda **level: step_of(ADAM @ sc.accumulate(2) @ sc.measure(seen), **level),
    "noise": lambda **level: step_of(ADAM @ sc.noise(0.1), k=2, **level),
    "noise, in a branch": lambda **level: step_of(sc.skip_nonfinite(limit=3) @ ADAM @ sc.noise(0.1), **level),
    "noise in the loop": lambda **level: step_of(ADAM @ sc.accumulate(2) @ sc.noise(0.1) @ sc.clip(0.5), **level),
    "sam": lambda **level: step_of(ADAM @ sc.sam(0.1), k=2, **level),
    "rows": lambda **level: step_of(ADAM, source=sc.rows() @ sc.clip(0.5) @ sc.grad(loss), **level),
    "skip": lambda **level: step_of(sc.skip_nonfinite(limit=3) @ ADAM @ sc.loss_scale(initial=8.0), k=2, **level),
    "across": lambda **level: step_of(ADAM, k=2, source=sc.grad(sc.across(contrast) @ encoded), **level),
    "reads": lambda **level: step_of(sc.ema(0.5) @ ADAM, k=2, source=sc.grad(reading, reads="ema"), **level),
    "frozen": lambda **level: step_of(ADAM, source=sc.grad(loss, wrt=("head", "bias")), **level),
    "alternate": lambda **level: alternating(**level),
    "offload": lambda **level: step_of(sc.skip_nonfinite(limit=3) @ ADAM, offload="optimizer", **level),
    **{
        name: partial(lambda made, **level: step_of(sc.update(made()), k=2, **level), made)
        for name, made in OPTIMIZERS.items()
    },
}


def alternating(**level: Any) -> sc.Step:
    rules = sc.shard(sc.dp("data", **level), tensor())
    turns = {name: ADAM @ sc.accumulate(2) @ rules @ sc.grad(loss, wrt=name) for name in ("wte", "head")}
    return sc.compile(sc.alternate(**turns, every={"head": 2}), mesh=mesh())


ALL_LONG = ("measure", "noise", "rows", "frozen", "lbfgs")


@pytest.mark.parametrize(("name", "level"), [
    pytest.param(name, level, marks=pytest.mark.long if level != {"zero": 1} or name in ALL_LONG else ())
    for name in PIPELINES for level in ({}, {"zero": 1}, {"zero": 3})
], ids=str)  # fmt: skip
def test_every_transform_and_optimizer_sees_the_own_shapes(name: str, level: dict[str, Any]) -> None:
    step = PIPELINES[name](**level)
    state = step.init(params_of(), seed=3)
    state, _ = step(state, batch_of())
    assert_equivalent(step, state, batch_of(seed=1), tolerance=2e-5)  # sums in another order, divided by small numbers
    assert paddings(state)


@pytest.mark.parametrize("outer", [sc.repeat(2), sc.epochs(2, minibatches=2)], ids=repr)
def test_steps_in_a_loop_carry_the_padded_state(outer: Any) -> None:
    step = step_of(outer @ sc.ema(0.5) @ ADAM, zero=1)
    batch = batch_of()
    if isinstance(outer, type(sc.repeat(2))):
        batch = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), batch)
    state = step.init(params_of())
    assert_equivalent(step, state, batch)
    assert all(np.isnan(padding).all() for padding in paddings(step(state, batch)[0]).values())


@pytest.mark.parametrize("level", [{}, {"zero": 1}, {"zero": 3, "gather": "layer"}], ids=str)
def test_automatic_mode_pads_too(level: dict[str, Any]) -> None:
    step = step_of(sc.ema(0.5) @ ADAM @ sc.clip(1.0), k=4, mode="auto", **level)
    state, _ = step(step.init(params_of()), batch_of())
    assert_equivalent(step, state, batch_of(seed=1))
    assert all(np.isnan(padding).all() for padding in paddings(state).values())


@settings(max_examples=5)
@given(st.data())
def test_random_uneven_shapes_and_rules_equal_the_reference(data: st.DataObject) -> None:
    """Of any size, also less than the axis, along one axis or two, in either mode."""
    sizes = {axis: data.draw(st.sampled_from([1, 2, 4])) for axis in ("data", "model")}
    sizes["expert"] = data.draw(st.sampled_from([1, 2, 8 // (sizes["data"] * sizes["model"])]).filter(
        lambda size: size and sizes["data"] * sizes["model"] * size <= 8
    ))  # fmt: skip
    shapes = data.draw(st.dictionaries(
        st.sampled_from("abc"), st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1
    ))  # fmt: skip
    model_axes = {axis: size for axis, size in sizes.items() if axis != "data"}
    rules = data.draw(tensor_rules(shapes, axes=model_axes, pad=True))
    mode = data.draw(st.sampled_from(["manual", "manual", "auto"]))
    level = data.draw(st.sampled_from(LEVELS))
    outer = data.draw(st.sampled_from([sc.update(optax.sgd(0.5, momentum=0.5)), sc.update(optax.adafactor(1e-2, 2))]))
    inner = data.draw(st.sampled_from([sc.accumulate(1), sc.accumulate(2), sc.noise(0.25) @ sc.accumulate(2)]))

    def spread(params: Any, rows: Any) -> jax.Array:
        """Every element has another gradient, so that one in the wrong place shows."""
        parts = (jnp.sum(jnp.sin(leaf) * (1 + jnp.arange(leaf.size).reshape(leaf.shape))) for leaf in params.values())
        return jnp.mean((rows["x"] * sum(parts) / 100 - 1) ** 2)

    step = sc.compile(
        outer @ inner @ sc.shard(sc.dp("data", **level), rules, mode=mode) @ sc.grad(spread), mesh=mesh_of(**sizes)
    )
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    state = step.init({name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})
    assert_equivalent(step, state, {"x": random.normal(size=16).astype(np.float32)}, tolerance=1e-4)
    own = {path: leaf.shape for path, leaf in leaves_by_path(state.unpadded().params)}
    assert own == shapes


def test_unpadded_state_has_the_own_shapes_and_runs_in_the_users_own_functions() -> None:
    step = step_of(sc.ema(0.5) @ ADAM, zero=3)
    state = step.init(params_of())
    whole = state.unpadded()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole.params), params_of())
    assert whole.slots["ema"]["head"].shape == whole.opt_state[0].mu["head"].shape == (WIDTH, VOCABULARY)
    assert whole.params["wte"].sharding.spec == P(None, "data")  # gathered along the axis that pads it alone
    assert whole.unpadded() is whole
    expected = loss(params_of(), batch_of())
    for evaluated in (
        loss(whole.params, batch_of()),
        jax.jit(lambda state, batch: loss(state.unpadded().params, batch))(state, batch_of()),
        sc.evaluate(loss, whole.params, [batch_of()])["loss"],
        step.reference(state, batch_of())[1]["loss"],
    ):
        np.testing.assert_allclose(evaluated, expected, rtol=1e-6)
    assert np.isnan(loss(state.params, batch_of()))  # what reads the padding shows it
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state).unpadded()
    assert ensemble.params["head"].shape == (2, WIDTH, VOCABULARY)
    shapes = step.init(jax.eval_shape(params_of)).unpadded()
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, whole)


def test_function_and_reference_take_and_return_padded_states() -> None:
    step = step_of(ADAM, k=2)
    state = step.init(params_of())
    _, losses = jax.jit(lambda state: jax.lax.scan(lambda state, _: step.function(state, batch_of()), state, None, 2))(
        state
    )
    of_reference = state
    for number in range(2):
        of_reference, metrics = step.reference(of_reference, batch_of())
        np.testing.assert_allclose(losses["loss"][number], metrics["loss"], rtol=1e-6)
    assert jax.tree.structure(of_reference) == jax.tree.structure(state)


def test_state_goes_on_where_other_parameters_are_trained() -> None:
    before = step_of(ADAM, source=sc.grad(loss, wrt=("head", "bias")))
    state, _ = before(before.init(params_of()), batch_of())
    after = step_of(ADAM)
    new = after.init(state.params, like=state)
    mu, old = new.unpadded().opt_state[0].mu, state.unpadded().opt_state[0].mu
    np.testing.assert_array_equal(mu["head"], old["head"])
    assert not np.any(mu["wte"]) and new.params["wte"].shape == (16, WIDTH)
    assert_equivalent(after, new, batch_of(seed=1))


def test_parameters_on_the_devices_are_padded_there() -> None:
    step = step_of(ADAM)
    placed = jax.device_put(params_of(), NamedSharding(mesh(), P()))
    frozen = {**placed, "wte": jnp.arange(13 * WIDTH, dtype=jnp.int8).reshape(13, WIDTH)}
    quantised = step_of(ADAM, source=sc.grad(lambda p, rows: loss({**p, "wte": p["wte"] / 99}, rows), wrt="head"))
    for one, params in ((step, placed), (quantised, frozen)):
        state = one.init(params)
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state.unpadded().params, params)))
        assert_equivalent(one, state, batch_of())
    assert not np.any(paddings(state)["params/wte"])  # whole numbers have no NaN


def test_checkpoint_is_read_on_another_mesh_with_another_padding(tmp_path: Path) -> None:
    pytest.importorskip("orbax.checkpoint")

    def on(pad: bool = True, **axes: int) -> sc.Step:
        rules = sc.shard(sc.dp("data", zero=1, offload="optimizer"), sc.tp(RULES, default=P(), pad=pad))
        return sc.compile(sc.ema(0.5) @ ADAM @ rules @ sc.grad(loss), mesh=mesh_of(**axes))

    before, data = None, [batch_of(seed=seed) for seed in range(2)]
    steps = [on(data=2, model=4), on(pad=False, data=8, model=1), on(data=1, model=2)]
    for number, step in enumerate(steps, start=1):
        state = step.init(params_of())
        if before is not None:
            read = sc.restore(tmp_path, like=state)
            assert jax.tree.structure(read) == jax.tree.structure(state)
            pairs = zip(leaves_by_path(read.unpadded()), jax.tree.leaves(before), strict=True)
            for (path, one), two in pairs:
                assert path == "rng" or np.array_equal(one, two), path
            jax.tree.map(np.testing.assert_array_equal, *map(paddings, (read, state)))
        checkpoints = sc.Checkpoints(tmp_path, every=2, check_data=False)
        run = sc.run(step, state, data, steps=2 * number, checkpoint=checkpoints)
        before = run.state.unpadded()
    assert int(before.step) == 6
    with pytest.raises(sc.ResumeError) as refused:
        sc.restore(tmp_path, like=run.state.params, only="params/wte")
    assert str(refused.value) == (
        "The checkpoint of step 6 does not fit `like`.\n\n"
        "  params/wte  saved float32[13, 8], `like` has float32[14, 8]\n\n"
        "  If `like` is of a padded state, give the state itself, or `state.unpadded().params`."
    )
    plain = sc.restore(tmp_path, only="params/**")["params"]
    assert plain["wte"].shape == (VOCABULARY, WIDTH)
    assert sc.restore(tmp_path, like=params_of(), only="params/**")["head"].shape == (WIDTH, VOCABULARY)


def test_names_of_dimensions_pad_and_stay() -> None:
    names = {
        "wte": P("vocabulary", "embed"),
        "head": P("embed", "vocabulary"),
        "bias": P("vocabulary"),
        "layers/*": P(),
        "scale": P(),
    }
    rules = sc.tp(sc.logical({"vocabulary": "model", "embed": None}, names=names), pad=True)
    step = sc.compile(ADAM @ sc.shard(sc.dp("data"), rules) @ sc.grad(loss), mesh=mesh())
    state = step.init(params_of())
    assert set(paddings(state)) >= {"params/wte", "params/head", "params/bias"}
    assert_equivalent(step, state, batch_of())


@pytest.mark.parametrize("level", [{"zero": 1}, {"zero": 3, "gather": "layer"}, {"mode": "auto"}], ids=str)
def test_padding_moves_nothing(level: dict[str, Any]) -> None:
    """The collectives are those of a vocabulary that divides."""
    step = step_of(ADAM @ sc.clip(1.0), k=4, **level)

    def traffic(vocabulary: int) -> list[tuple[Any, ...]]:
        state = step.init(jax.eval_shape(lambda: params_of(vocabulary)))
        rows = step.lower(state, jax.eval_shape(batch_of)).compile().collectives()
        return sorted((row.kind, str(row.axes), row.executions, row.bytes) for row in rows)

    assert traffic(VOCABULARY) == traffic(16) != []


def mapped(pad: int) -> Any:
    """A loss with a `shard_map` of its own along the axis that pads `head`."""

    def product(x: jax.Array, head: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.tanh(x @ head).sum(), "model")

    def loss(params: Any, rows: Any) -> jax.Array:
        head = jnp.pad(params["head"], ((0, 0), (0, pad)))
        along = jax.shard_map(product, in_specs=(P(), P(None, "model")), out_specs=P(), axis_names={"model"})
        return along(stream(params, rows), head) / rows["token"].shape[0]

    return loss


@pytest.mark.parametrize("mode", ["manual", "auto"])
def test_shard_map_over_a_padded_axis_is_told_what_the_loss_is_given(mode: str) -> None:
    step = step_of(source=sc.grad(mapped(0), wrt=("head",)), mode=mode)
    with pytest.raises(ValueError, match="not evenly divisible") as raised:
        step(step.init(params_of()), batch_of())
    assert (
        "stepc: `tp(..., pad=True)` pads the state alone; the loss is given `bias` as float32[13], `head` as "
        "float32[8, 13], `layers/down` as float32[2, 13, 8], `layers/up` as float32[2, 8, 13], `wte` as "
        "float32[13, 8]. `jnp.pad` it there to what divides, before the `shard_map`."
    ) in raised.value.__notes__
    step = step_of(source=sc.grad(mapped(3), wrt=("head", "wte")), mode=mode)
    assert_equivalent(step, step.init(params_of()), batch_of(), tolerance=1e-5)


def by_leaf(change: Callable[[Any, Any], Any]) -> optax.GradientTransformation:
    """Keeps the last gradient of each leaf, and changes parameters by a function of the gradient and the parameter."""

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return jax.tree.map(change, grads, params), grads

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def noised(grad: jax.Array, param: jax.Array) -> jax.Array:
    return -0.1 * grad + 0.1 * jax.random.normal(jax.random.key(0), param.shape)


RATES = {(13, 8): 0.1, (8, 13): 0.2, (13,): 0.1, (8,): 0.1, (2, 8, 13): 0.2, (2, 13, 8): 0.1}
ON_PADDED: dict[str, tuple[Callable[[], Any], bool]] = {
    "adam": (lambda: optax.adam(1e-2), True),
    "adamw": (lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 9), weight_decay=0.1, mask=is_matrix), True),
    "nadam": (lambda: optax.nadam(1e-2), True),
    "amsgrad": (lambda: optax.amsgrad(1e-2), True),
    "lion": (lambda: optax.lion(1e-2), True),
    "injected": (lambda: optax.inject_hyperparams(optax.sgd)(1e-2, momentum=0.9, nesterov=True), True),
    "clipped elements": (lambda: optax.chain(optax.clip(0.01), optax.rmsprop(1e-2)), True),
    "what it keeps has no NaN": (lambda: by_leaf(lambda grad, _: -0.1 * grad), True),
    "compared": (lambda: by_leaf(lambda grad, param: -0.1 * grad * (param > 0)), True),
    "another rate for each shape": (lambda: by_leaf(lambda grad, _: -grad / grad.shape[-1]), False),
    "another sign for each shape": (lambda: by_leaf(lambda g, p: p * g - g if g.shape[0] % 2 else g - p * g), False),
    "another number for each row": (
        lambda: by_leaf(lambda g, _: -g * jnp.arange(g.size, dtype=g.dtype).reshape(g.shape)),
        False,
    ),
    "random": (lambda: by_leaf(noised), False),
    "mean": (lambda: by_leaf(lambda grad, _: -0.1 * (grad - jnp.mean(grad))), False),
    "norm of the gradient": (lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)), True),
    "norm of each leaf": (lambda: by_leaf(lambda g, _: -0.1 * g / jnp.sqrt(1e-3 + jnp.sum(g * g))), True),
    "norm of the parameters": (lambda: by_leaf(lambda g, p: -0.1 * g * jnp.sum(p * p)), False),
    "norm of each row": (lambda: by_leaf(lambda g, _: -0.1 * g * jnp.sum(g * g, axis=0, keepdims=True)), False),
    "sum of no zeros": (lambda: by_leaf(lambda g, _: -1e-3 * g * jnp.sum(jnp.exp(g))), False),
    "sum of zeros and one": (lambda: by_leaf(lambda g, _: -1e-3 * g * jnp.sum(g + 1)), False),
    "sum of a choice": (lambda: by_leaf(lambda g, _: -1e-3 * g * jnp.sum(jnp.where(g == 0, 1, g))), False),
    "product with a parameter": (lambda: by_leaf(lambda g, p: -0.1 * g * jnp.sum(g * p)), False),
    "number of elements": (lambda: by_leaf(lambda g, _: -g / jnp.sum(jnp.ones_like(g))), False),
    "largest of a range": (lambda: by_leaf(lambda g, _: -1e-2 * g * jnp.max(jnp.arange(1.0, 1 + g.shape[0]))), False),
    "no gradient": (
        lambda: by_leaf(lambda g, _: -1e-3 * jnp.arange(g.size, dtype=g.dtype).reshape(g.shape)),
        False,
    ),
    "another rate in a table of shapes": (lambda: by_leaf(lambda g, _: -RATES[g.shape] * g), False),
    "one random number": (
        lambda: by_leaf(lambda g, _: -0.1 * g * jax.random.normal(jax.random.key(0), g.shape).sum()),
        False,
    ),
    "one random number for all": (
        lambda: by_leaf(lambda g, _: -0.1 * g * jax.random.normal(jax.random.key(0), (3,)).sum()),
        True,
    ),
    "trust ratio": (lambda: optax.lamb(1e-2), False),
    "factored": (lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4), False),
    "line search": (lambda: optax.lbfgs(memory_size=2), False),
}


@pytest.mark.parametrize("name", ON_PADDED)
def test_optimizer_runs_on_padded_leaves_only_where_that_changes_nothing(name: str) -> None:
    made, is_on_padded = ON_PADDED[name]

    def shapes(vocabulary: int) -> Any:
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params_of(vocabulary))
        return params, jax.eval_shape(made().init, params)

    found = padded_update(made(), *shapes(VOCABULARY), stored=shapes(16), written="update")
    assert (found is not None) is is_on_padded


@pytest.mark.parametrize("name", [name for name in ON_PADDED if name not in ("adam", "line search", "factored")])
def test_padding_stays_nan_and_unseen_whatever_the_optimizer(name: str) -> None:
    step = step_of(sc.ema(0.5) @ sc.update(ON_PADDED[name][0]()) @ sc.clip(1.0), zero=1)
    state = step.init(params_of())
    for seed in range(2):
        assert_equivalent(step, state, batch_of(seed=seed), tolerance=2e-5)  # some divide by small numbers
        state, _ = step(state, batch_of(seed=seed))
    assert all(np.isnan(padding).all() for padding in paddings(state).values())


def shards_of_padding(outer: Any, k: int = 1, *, mode: str = "manual", steps: int = 0, **level: Any) -> float:
    """How much more temporaries a vocabulary of 2,001 takes than one of 2,002, as a part of a shard of an embedding.

    Args:
      outer: what is left of `accumulate`; or a function of the two turns that train the two embeddings.
      steps: the number of batches that a call is given, if it is given several.
    """
    size, turns = 256, callable(outer) and not isinstance(outer, sc.Transform | sc.Pipeline)

    def loss(params: Any, rows: Any) -> jax.Array:
        logits = jnp.tanh(params["wte"][rows["token"]]) @ params["head" if turns else "wte"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows["next"]).mean()

    def temporaries(vocabulary: int) -> int:
        rules = sc.shard(sc.dp("data", **level), sc.tp({"*": P("model")}, pad=True), mode=mode)
        inner, names = sc.accumulate(k) @ rules, ("wte", "head") if turns else ("wte",)
        each = {name: ADAM @ inner @ sc.grad(loss, wrt=name) for name in names}
        step = sc.compile(outer(**each) if turns else outer @ inner @ sc.grad(loss), mesh=mesh_of(data=4, model=2))
        state = step.init({name: jax.ShapeDtypeStruct((vocabulary, size), jnp.float32) for name in names})
        rows = batch_of()
        batch = jax.tree.map(lambda leaf: np.stack([leaf] * steps), rows) if steps else rows
        return step.lower(state, batch).compile().memory().temporaries

    return (temporaries(2001) - temporaries(2002)) / (4 * 1001 * size)


@pytest.mark.parametrize(("k", "level"), [(4, {}), (1, {"zero": 1}), (1, {"zero": 3}), (1, {"mode": "auto"})], ids=str)
def test_padding_takes_no_more_temporaries_than_one_masked_copy(k: int, level: dict[str, Any]) -> None:
    """That of an embedding, of which a product over the vocabulary is made; before, up to two for each leaf."""
    assert shards_of_padding(ADAM @ sc.clip(1.0), k, **level) < 1.1


# In a loop XLA keeps the masks, of a byte an element: a quarter of a shard each.
@pytest.mark.parametrize(("outer", "options", "most"), [
    (ADAM @ sc.noise(0.1), {"k": 4}, 0.1),
    (sc.update(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))), {"k": 4}, 0.1),
    (sc.repeat(2) @ ADAM, {"k": 4, "steps": 2}, 0.6),
    (sc.repeat(2) @ ADAM, {"zero": 1, "steps": 2}, 1.6),
    (sc.epochs(2, minibatches=2) @ ADAM, {"zero": 1}, 1.6),
    (sc.alternate, {"mode": "auto"}, 0.1),
    (partial(sc.alternate, every={"head": 2}), {"mode": "auto"}, 0.1),
    (lambda **turns: sc.skip_nonfinite(limit=3) @ sc.ema(0.5) @ sc.alternate(**turns), {"k": 4}, 0.1),
], ids=["noise", "norm", "repeat", "repeat zero", "epochs", "turns", "turns every", "turns ema"])  # fmt: skip
def test_padding_stays_where_it_is_in_loops_and_turns(outer: Any, options: dict[str, Any], most: float) -> None:
    """No leaf is cut and filled in each step or turn: that took one shard to four."""
    assert shards_of_padding(outer, **options) < most


def doubled(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return grads, jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), state)


def widened(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return grads, grads


@pytest.mark.parametrize("outer", [None, sc.repeat(2), sc.skip_nonfinite(limit=3)], ids=repr)
@pytest.mark.parametrize(("update", "after"), [(doubled, "bfloat16[26]"), (widened, "float32[13]")])
def test_optimizer_state_that_changes_its_type_is_told_in_its_own_shape(outer: Any, update: Any, after: str) -> None:
    optimizer = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16), params), update
    )
    made = sc.update(optimizer)
    step = step_of(made if outer is None else outer @ made, source=sc.grad(loss, wrt="bias"), zero=1)
    batch = batch_of()
    if isinstance(outer, type(sc.repeat(2))):
        batch = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), batch)
    with pytest.raises(sc.ConfigError) as refused:
        step(step.init(params_of()), batch)
    assert str(refused.value) == (
        f"`opt_state/bias` goes in as bfloat16[13] and comes out as {after}.\n\n"
        "  reason  a state whose type changes is retraced every step, and its buffers cannot be reused"
    )


def test_pad_is_a_boolean_and_prints() -> None:
    assert repr(tensor()).endswith("default=P(), pad=True)")
    assert sc.tp(RULES) == sc.tp(RULES, pad=False) != sc.tp(RULES, pad=True)
