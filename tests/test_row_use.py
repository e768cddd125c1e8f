"""What a loss does with its rows, as the plan says it: each kind by example, models, random losses for soundness."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._compiler.rows import RowUse, Same, row_uses
from stepc.testing import assert_equivalent, assert_split_invariant

Tree = Any
ROWS, BATCH = 4, 8  # rows of a part, and of the batch; features are 4 too, so that numbers coincide
random = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(random.normal(size=(4, 4)), jnp.float32),
    "c": jnp.asarray(random.normal(size=4), jnp.float32),
}
WHOLE = {
    "x": jnp.asarray(random.normal(size=(BATCH, 4)), jnp.float32),
    "y": jnp.asarray(random.normal(size=BATCH), jnp.float32),
    "label": jnp.asarray(random.integers(0, 4, size=BATCH)),
}  # fmt: skip


def reached(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss, of parameters that are all reached by its gradient."""

    @functools.wraps(loss)
    def of_all(params: Tree, *rest: Any) -> Any:
        zero = 0.0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
        return loss(jax.tree.map(lambda leaf: leaf + zero, params), *rest)

    return of_all


def use_of(loss: Callable[..., Any], params: Tree = PARAMS, batch: Tree = WHOLE, **options: Any) -> RowUse:
    """As the plan of `accumulate(2)` says it."""
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ sc.grad(reached(loss), **options))
    ((_, use),) = step.lower(step.init(params), batch).plan.losses
    return use


def hidden(params: Tree, rows: Tree) -> jax.Array:
    return jnp.tanh(rows["x"] @ params["w"])


@jax.custom_vjp
def own_gradient(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


own_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@jax.custom_vjp
def gradient_of_all(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


gradient_of_all.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x).mean(0, keepdims=True),))


@jax.custom_vjp
def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def cross_entropy(p: Tree, r: Tree) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(hidden(p, r), r["label"])


ALONE: dict[str, Callable[[Tree, Tree], Any]] = {
    "cross_entropy": lambda p, r: cross_entropy(p, r).mean(),
    "one_hot": lambda p, r: -(jax.nn.one_hot(r["label"], 4) * jax.nn.log_softmax(hidden(p, r))).sum(-1).mean(),
    "own_place": lambda p, r: -jax.nn.log_softmax(hidden(p, r))[jnp.arange(ROWS), r["label"]].mean()
    if r["x"].shape[0] == ROWS
    else -jax.nn.log_softmax(hidden(p, r))[jnp.arange(BATCH), r["label"]].mean(),
    "vmap": lambda p, r: jax.vmap(lambda x, y: jnp.tanh(x @ p["w"]).sum() * y)(r["x"], r["y"]).mean(),
    "map": lambda p, r: lax.map(lambda x: jnp.tanh(x @ p["w"]).sum(), r["x"]).mean(),
    "regularised": lambda p, r: cross_entropy(p, r).mean() + 0.1 * jnp.sum(p["w"] ** 2),
    "flattened": lambda p, r: jnp.mean((hidden(p, r).reshape(-1) - jnp.repeat(r["y"], 4)) ** 2),
    "product": lambda p, r: jnp.dot(hidden(p, r).sum(1), r["y"]) / r["y"].shape[0],
    "static_count": lambda p, r: sc.Mean(hidden(p, r).sum(), r["x"].size),
    "dynamic_count": lambda p, r: sc.Mean(jnp.sum(cross_entropy(p, r) * (r["y"] > 0)), jnp.sum(r["y"] > 0)),
    "norm_of_a_row": lambda p, r: jnp.mean(hidden(p, r) / jnp.linalg.norm(hidden(p, r), axis=1, keepdims=True)),
    "remat": lambda p, r: jax.checkpoint(lambda p, r: cross_entropy(p, r).mean())(p, r),
    "jit": lambda p, r: jax.jit(lambda p, r: cross_entropy(p, r).mean())(p, r),
    "cond": lambda p, r: lax.cond(jnp.sum(p["c"]) > 0, jnp.sin, jnp.cos, hidden(p, r)).mean(),
    "scan_over_layers": lambda p, r: lax.scan(lambda h, w: (jnp.tanh(h * w), None), hidden(p, r), p["c"])[0].mean(),
    "scan_over_time": lambda p, r: lax.scan(
        lambda h, x: (jnp.tanh(h + x), h * x), jnp.zeros(r["y"].shape), hidden(p, r).T
    )[1].mean(),
    "scan_of_loop": lambda p, r: lax.fori_loop(0, 3, lambda i, h: jnp.sin(h) * i, hidden(p, r)).mean(),
    "custom_jvp": lambda p, r: jax.nn.relu(r["x"] @ p["w"]).mean(),
    "custom_vjp": lambda p, r: linear(own_gradient(r["x"]), p["w"]).mean(),
    "convolution": lambda p, r: jax.vmap(lambda x: jnp.convolve(x, p["c"], "same"))(hidden(p, r)).mean(),
    "embedding": lambda p, r: jnp.mean(p["w"][r["label"]] * r["x"]),
    "sorted_row": lambda p, r: jnp.mean(jnp.sort(hidden(p, r), axis=-1)[:, 0]),
    "constant": lambda p, r: jnp.sum(p["w"] ** 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_loss_that_takes_each_row_alone_is_said_to_and_does_not_depend_on_the_split(name: str) -> None:
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ sc.grad(reached(ALONE[name])))
    state = step.init(PARAMS)
    assert_split_invariant(step, state, WHOLE)
    ((_, use),) = step.lower(state, WHOLE).plan.losses
    assert use == RowUse("constant" if name == "constant" else "alone")


def contrastive(params: Tree, rows: Tree) -> jax.Array:
    embedded = hidden(params, rows)
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(embedded @ embedded.T)))


COUPLED: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "contrastive": ("couples", "dot_general", contrastive),
    "batch_statistics": ("couples", "sub", lambda p, r: jnp.mean((hidden(p, r) - r["x"].mean(0, keepdims=True)) ** 3)),
    "softmax_over_rows": ("couples", "reduce_max", lambda p, r: jnp.mean(jax.nn.softmax(hidden(p, r), axis=0) ** 2)),
    "two_means": ("couples", "mul", lambda p, r: jnp.mean(hidden(p, r)) * jnp.mean(r["y"])),
    "root": ("couples", "sqrt", lambda p, r: jnp.sqrt(jnp.mean(hidden(p, r) ** 2))),
    "sort": ("couples", "sort", lambda p, r: jnp.sort(hidden(p, r), axis=0)[0].mean()),
    "cumsum": ("couples", "cumsum", lambda p, r: jnp.cumsum(hidden(p, r), axis=0).mean()),
    "largest": ("couples", "reduce_max", lambda p, r: jnp.max(hidden(p, r))),
    "cond": ("couples", "gt", lambda p, r: lax.cond(jnp.sum(r["y"]) > 0, jnp.sin, jnp.cos, hidden(p, r)).mean()),
    "ratio": ("ratio", "div", lambda p, r: jnp.sum(cross_entropy(p, r) * (r["y"] > 0)) / jnp.sum(r["y"] > 0)),
    "safe_ratio": ("ratio", "div", lambda p, r: jnp.sum(cross_entropy(p, r)) / jnp.maximum(jnp.sum(r["y"] > 0), 1)),
    "weight": ("weight", "add", lambda p, r: sc.Mean(cross_entropy(p, r).sum() + jnp.sum(p["c"]), jnp.sum(r["y"] > 0))),
    "roll": ("place", "slice", lambda p, r: jnp.mean(hidden(p, r) * jnp.roll(hidden(p, r), 1, axis=0))),
    "position": ("place", "mul", lambda p, r: jnp.mean(jnp.arange(r["y"].shape[0]) * hidden(p, r).sum(1))),
    "sum": ("sum", "", lambda p, r: jnp.sum(hidden(p, r))),
    "gradient_of_all": ("unknown", "custom_vjp_call", lambda p, r: gradient_of_all(hidden(p, r)).mean()),
    "scan_over_rows": (
        "unknown", "scan",
        lambda p, r: lax.scan(lambda c, x: (jnp.tanh(c + x), c), jnp.zeros(4), hidden(p, r))[0].mean(),
    ),
    "while_of_rows": (
        "unknown", "while",
        lambda p, r: jnp.mean(hidden(p, r) * jax.vmap(
            lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x * x + 1, x)
        )(r["x"])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_loss_that_does_not_is_named_with_the_operation_and_the_line(name: str) -> None:
    kind, primitive, loss = COUPLED[name]
    use = use_of(loss)
    assert (use.kind, use.primitive) == (kind, primitive)
    code = loss.__code__
    lines = {line for _, _, line in code.co_lines() if line}
    if primitive:
        file, _, line = use.line.partition(":")
        assert file == "test_row_use.py"
        assert int(line) in lines or kind == "unknown"


def test_key_of_a_call_draws_for_the_part_and_keys_of_rows_for_each() -> None:
    def with_keys(params: Tree, rows: Tree, keys: Any) -> jax.Array:
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (4,)))(keys)
        return jnp.mean(hidden(params, rows) * kept)

    def with_key(params: Tree, rows: Tree, key: Any) -> jax.Array:
        return jnp.mean(hidden(params, rows) * jax.random.bernoulli(key, 0.5, rows["x"].shape))

    assert use_of(with_keys, rng="example").kind == "alone"
    assert (use_of(with_key, rng="microbatch").kind, use_of(with_key, rng="microbatch").primitive) == ("draws", "mul")


def attention(params: Tree, tokens: jax.Array) -> jax.Array:
    """A causal transformer, as it is often written: attention inside of a row, logits flattened."""
    length = tokens.shape[1]
    hidden = params["embed"][tokens] + params["place"][None, :length]

    def layer(hidden: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
        q, k, v = ((hidden @ one).reshape(*hidden.shape[:2], 2, 4) for one in weights)
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        return jax.nn.standardize(hidden + mixed.reshape(hidden.shape)), None

    hidden, _ = lax.scan(jax.checkpoint(layer), hidden, params["layers"])
    logits = (hidden[:, :-1] @ params["embed"].T).reshape(-1, 11)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:].reshape(-1)).mean()


def test_transformer_takes_each_row_alone() -> None:
    shapes = {"embed": (11, 8), "place": (6, 8), "layers": (2, 3, 8, 8)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    assert use_of(attention, params, jnp.zeros((BATCH, 6), jnp.int32)).kind == "alone"


class Convolutional(nn.Module):
    norm: type[nn.Module] = nn.LayerNorm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(self.norm(use_running_average=False)(x) if self.norm is nn.BatchNorm else self.norm()(x))
        x = nn.avg_pool(nn.max_pool(x, (2, 2)), (2, 2), strides=(2, 2))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(("norm", "kind"), [(nn.LayerNorm, "alone"), (nn.BatchNorm, "couples")])
def test_flax_model_by_its_norm(norm: type[nn.Module], kind: str) -> None:
    model, images = Convolutional(norm), jnp.ones((BATCH, 8, 8, 2))
    variables = model.init(jax.random.key(0), images)
    state = {name: value for name, value in variables.items() if name != "params"}

    def loss(params: Tree, rows: Tree) -> jax.Array:
        logits = model.apply({"params": params, **state}, rows["x"], mutable=[*state])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows["label"]).mean()

    use = use_of(loss, variables["params"], {"x": images, "label": WHOLE["label"]})
    assert use.kind == kind
    assert use.line.startswith("test_row_use.py:" if kind == "couples" else "")


def test_equinox_model_under_vmap_takes_each_row_alone() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [eqx.nn.Conv2d(2, 3, 3, key=keys[0]), eqx.nn.Lambda(jax.nn.gelu), eqx.nn.MaxPool2d(2)]
    head = [eqx.nn.Lambda(jnp.ravel), eqx.nn.LayerNorm(75), eqx.nn.MLP(75, 3, 8, 1, key=keys[1])]
    params, static = eqx.partition(eqx.nn.Sequential([*layers, *head]), eqx.is_array)

    def loss(params: Tree, rows: Tree) -> jax.Array:
        logits = jax.vmap(eqx.combine(params, static))(rows["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows["label"]).mean()

    assert use_of(loss, params, {"x": jnp.ones((BATCH, 2, 8, 8)), "label": WHOLE["label"]}).kind == "alone"


def test_shard_map_and_constraints_over_a_model_axis_keep_rows_apart() -> None:
    mesh = mesh_of(data=2, model=2)

    def loss(params: Tree, rows: Tree) -> jax.Array:
        def part(w: jax.Array, x: jax.Array) -> jax.Array:
            return lax.psum(x @ w, "model")

        product = jax.shard_map(
            part, in_specs=(P("model"), P(None, "model")), out_specs=P(), axis_names={"model"}, check_vma=False
        )
        return jnp.mean(jnp.tanh(product(params["w"], rows["x"])))

    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.shard(sc.dp("data")) @ sc.grad(reached(loss)), mesh=mesh)
    assert [use.kind for _, use in step.lower(step.init(PARAMS), WHOLE).plan.losses] == ["alone"]


def test_rows_of_the_model_state_beside_those_of_the_batch_are_taken_alone() -> None:
    def loss(params: Tree, rows: Tree, state: Tree) -> tuple[jax.Array, Tree]:
        before = jnp.where(rows["y"][:, None] > 0, 0.0, state["hidden"])
        after = jnp.tanh(rows["x"] @ params["w"] + before)
        return jnp.mean(after * params["c"][None]), {"hidden": after}

    gradient = sc.accumulate(2) @ sc.shard(sc.dp("data")) @ sc.grad(loss, model_state={"hidden": "rows"})
    step = sc.compile(sc.update(optax.sgd(0.5)) @ gradient, mesh=mesh_of(data=2))
    state = step.init(PARAMS, model_state={"hidden": jnp.zeros((BATCH, 4))})
    assert [use for _, use in step.lower(state, WHOLE).plan.losses] == [RowUse("alone")]


# Where it is said.


def test_plan_says_it_only_where_the_batch_is_split() -> None:
    def plan(middle: Any, **sizes: int) -> str:
        step = sc.compile(
            sc.update(optax.sgd(0.5)) @ middle @ sc.grad(contrastive), mesh=sizes and mesh_of(**sizes) or None
        )
        return str(step.lower(step.init({"w": PARAMS["w"]}), WHOLE).plan)

    line = contrastive.__code__.co_firstlineno + 2
    said = (
        f"loss\n  grad(contrastive): couples rows: `dot_general` at test_row_use.py:{line} takes several of them "
        "together, so parts have another loss than the whole\n"
    )
    for middle, sizes in [(sc.accumulate(2), {}), (sc.shard(sc.dp("data")), {"data": 2})]:
        assert said in plan(middle, **sizes)
    for middle, sizes in [(sc.accumulate(1), {}), (sc.shard(sc.dp("data")), {"data": 1})]:
        assert "couples" not in plan(middle, **sizes)
        assert "\nloss\n" not in plan(middle, **sizes)
    assert "grad(contrastive): given one row at a time, so it can couple none" in plan(sc.rows() @ sc.clip(1.0))


def test_assertions_name_the_loss_that_couples_rows() -> None:
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ sc.grad(contrastive))
    said = r"`grad\(contrastive\)`: couples rows: `dot_general` at test_row_use"
    with pytest.raises(sc.EquivalenceError, match=f"cause +{said}"):
        assert_split_invariant(step, step.init({"w": PARAMS["w"]}), WHOLE)

    def forgetful(params: Tree, rows: Tree) -> jax.Array:
        calls.append(1)
        return contrastive(params, rows) * len(calls)

    calls: list[int] = []
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ sc.grad(forgetful))
    with pytest.raises(sc.EquivalenceError, match=f"loss +{said.replace('contrastive', 'forgetful')}"):
        assert_equivalent(step, step.init({"w": PARAMS["w"]}), WHOLE)


def test_ratio_of_sums_has_a_remedy_that_works() -> None:
    kind, _, ratio = COUPLED["ratio"]
    assert "`sc.Mean(total, count)` is" in str(use_of(ratio))
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ sc.grad(reached(ALONE["dynamic_count"])))
    assert_split_invariant(step, step.init(PARAMS), WHOLE)
    before = sc.compile(sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ sc.grad(reached(ratio)))
    with pytest.raises(sc.EquivalenceError, match="divides a sum over rows by another"):
        assert_split_invariant(before, before.init(PARAMS), WHOLE)
    assert kind == "ratio"


def test_loss_is_not_traced_once_more_for_it() -> None:
    def traced(pipeline: sc.Pipeline) -> int:
        step = sc.compile(pipeline @ sc.grad(reached(counted)))
        step.lower(step.init(PARAMS), WHOLE)
        return len(calls)

    def counted(params: Tree, rows: Tree) -> jax.Array:
        calls.append(1)
        return jnp.mean(jax.nn.relu(hidden(params, rows)))

    calls: list[int] = []
    unsplit = traced(sc.update(optax.sgd(0.5)) @ sc.accumulate(1))
    calls.clear()
    assert traced(sc.update(optax.sgd(0.5)) @ sc.accumulate(2)) == unsplit


def test_outputs_that_depend_on_rows_are_told_apart() -> None:
    def function(state: Tree, rows: jax.Array) -> Tree:
        return {"calls": state["calls"] + 1, "mean": 0.9 * state["mean"] + 0.1 * rows.mean(0), "same": state["same"]}

    state = {"calls": jnp.zeros((), jnp.int32), "mean": jnp.zeros(4), "same": jnp.zeros(3)}
    uses = row_uses(jax.make_jaxpr(function)(state, WHOLE["x"]), of_rows=[False] * 3 + [True], num_rows=BATCH)
    assert [isinstance(use, Same) for use in uses] == [True, False, True]


# Soundness: a random loss that is said to take each row alone has a gradient that no split changes.

OPERATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "tanh": lambda a, b: jnp.tanh(a),
    "mul": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "half": lambda a, b: a * 0.5,
    "mean0": lambda a, b: a.mean(0),
    "sum0": lambda a, b: a.sum(0),
    "mean1": lambda a, b: a.mean(-1),
    "sum1": lambda a, b: a.sum(-1),
    "max0": lambda a, b: a.max(0),
    "max1": lambda a, b: a.max(-1),
    "centre0": lambda a, b: a - a.mean(0, keepdims=True),
    "centre1": lambda a, b: a - a.mean(-1, keepdims=True),
    "transpose": lambda a, b: jnp.swapaxes(a, 0, -1),
    "dot": jnp.dot,
    "einsum_rows": lambda a, b: jnp.einsum("ij,ij->j", a, b),
    "einsum_row": lambda a, b: jnp.einsum("ij,ij->i", a, b),
    "gram": lambda a, b: a @ b.T,
    "flat": lambda a, b: a.reshape(-1),
    "unflat": lambda a, b: a.reshape(-1, 4),
    "sort1": lambda a, b: jnp.sort(a, -1),
    "sort0": lambda a, b: jnp.sort(a, 0),
    "cumsum1": lambda a, b: jnp.cumsum(a, -1),
    "cumsum0": lambda a, b: jnp.cumsum(a, 0),
    "softmax1": lambda a, b: jax.nn.softmax(a, -1),
    "softmax0": lambda a, b: jax.nn.softmax(a, 0),
    "roll0": lambda a, b: jnp.roll(a, 1, 0),
    "place1": lambda a, b: a * jnp.arange(a.shape[-1]),
    "count1": lambda a, b: a * jnp.cumsum(jnp.ones(a.shape[-1])),
    "count0": lambda a, b: (a.T * jnp.cumsum(jnp.ones(a.shape[0]))).T,
    "where": lambda a, b: jnp.where(a > 0, b, a),
    "map": lambda a, b: lax.map(lambda row: jnp.tanh(row).sum(), a),
    "map_place": lambda a, b: lax.map(lambda each: each[0] * each[1], (a, jnp.arange(a.shape[0], dtype=a.dtype))),
    "scan_rows": lambda a, b: lax.scan(lambda c, row: (c + row, c * row), jnp.zeros(a.shape[1:]), a)[1],
    "scan": lambda a, b: lax.scan(lambda c, one: (jnp.tanh(c + one), c), a, jnp.arange(3.0))[0],
    "vmap_sort": lambda a, b: jax.vmap(lambda row: jnp.sort(row) * row.sum())(a),
    "vmap_index": lambda a, b: jax.vmap(lambda row, by: row[jnp.argmax(by)])(a, b),
    "own_place": lambda a, b: a[jnp.arange(a.shape[0]), jnp.argmax(b, -1)],
    "first": lambda a, b: a[0],
    "column": lambda a, b: a[:, 0],
    "top": lambda a, b: lax.top_k(a, 2)[0],
    "set_column": lambda a, b: a.at[:, 0].set(1.0),
    "set_row": lambda a, b: a.at[0].set(1.0),
    "beside": lambda a, b: jnp.concatenate([a, b], -1),
    "below": lambda a, b: jnp.concatenate([a, b], 0),
    "ratio": lambda a, b: a / (1 + b * b),
    "cond": lambda a, b: lax.cond(jnp.sum(b) > 0, jnp.tanh, lambda x: x * 2, a),
    "remat": lambda a, b: jax.checkpoint(jnp.sin)(a),
    "relu": lambda a, b: jax.nn.relu(a),
    "widen": lambda a, b: jnp.broadcast_to(a, (4, *a.shape)),
    "zero": lambda a, b: a * 0,
    "diagonal": lambda a, b: jnp.diagonal(a),
    "triangle": lambda a, b: jnp.tril(a),
    "variance0": lambda a, b: a.var(0),
    "embed": lambda a, b: b[jnp.argmax(a, -1)],
    "take_along": lambda a, b: jnp.take_along_axis(a, jnp.argsort(b, -1), -1),
    "outer": lambda a, b: a[:, None] * b[None],
    "convolve": lambda a, b: jnp.convolve(a.reshape(-1), jnp.ones(3), "same"),
    "vmap_convolve": lambda a, b: jax.vmap(lambda row: jnp.convolve(row, jnp.arange(3.0), "same"))(a),
    "pad0": lambda a, b: jnp.pad(a, [(0, 1)] + [(0, 0)] * (a.ndim - 1)),
    "pad1": lambda a, b: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, 1)]),
    "how_many": lambda a, b: (a > 0).sum(0) * 1.0,
    "loop": lambda a, b: lax.fori_loop(0, 3, lambda i, c: c + jnp.tanh(b), a),
    "segments": lambda a, b: jax.ops.segment_sum(a, jnp.argmax(b, -1), 4),
    "halves": lambda a, b: sum(jnp.split(a, 2, -1), jnp.zeros(())),
    "fft": lambda a, b: jnp.abs(jnp.fft.fft(a)),
    "custom": lambda a, b: linear(own_gradient(a), b) if a.ndim == b.ndim == 2 else jnp.dot(a, b.T),
}  # fmt: skip
ENDS: dict[str, Callable[[jax.Array, Tree, Tree], Any]] = {
    "mean": lambda v, p, r: v.mean(),
    "sum_of_means": lambda v, p, r: v.mean(0).sum(),
    "mean_of_sums": lambda v, p, r: v.sum(0).mean(),
    "regularised": lambda v, p, r: v.mean() + 0.1 * jnp.sum(p["w"] ** 2),
    "counted": lambda v, p, r: sc.Mean(v.sum(), (r["y"] > 0).sum()),
    "of_size": lambda v, p, r: sc.Mean(v.sum(), v.size),
    "ratio": lambda v, p, r: v.sum() / (1 + (r["y"] > 0).sum()),
}  # fmt: skip
Program = tuple[list[tuple[str, int, int]], str]


def loss_of(program: Program) -> tuple[Callable[[Tree, Tree], Any], list[list[tuple[str, tuple[bool, ...]]]]]:
    """A random loss, and a list that gets what each call of it did: an operation that does not fit is left out."""
    calls: list[list[tuple[str, tuple[bool, ...]]]] = []

    def loss(params: Tree, rows: Tree) -> Any:
        done: list[tuple[str, tuple[bool, ...]]] = []
        values = [params["c"], params["w"], rows["y"], rows["x"]]
        for name, first, second in program[0]:
            try:
                value = OPERATIONS[name](values[-1 - first % len(values)], values[-1 - second % len(values)])
            except (TypeError, ValueError, IndexError):
                continue
            if jnp.issubdtype(value.dtype, jnp.floating) and 0 < value.size < 2000:
                values.append(value)
                # Along an axis of size 1 there is no place, and nothing to couple.
                done.append((name, tuple(size == 1 for size in value.shape)))
        calls.append(done)
        return ENDS[program[1]](jnp.atleast_1d(values[-1]), params, rows)

    return loss, calls


def gradient(loss: Callable[[Tree, Tree], Any], parts: list[Tree]) -> list[np.ndarray]:
    """Of the mean over parts, or of the ratio of sums."""

    def value(params: Tree) -> jax.Array:
        returned = [loss(params, part) for part in parts]
        totals = sum(one.total if isinstance(one, sc.Mean) else one for one in returned)
        counts = sum(one.count if isinstance(one, sc.Mean) else 1.0 for one in returned)
        return totals / jnp.maximum(counts, 1)

    return list(map(np.asarray, jax.tree.leaves(jax.value_and_grad(value)(PARAMS))))


OPERATION = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.sampled_from([0, 0, 0, 1, 2, 3]), st.integers(0, 5))


def check_soundness(program: Program) -> str | None:
    loss, calls = loss_of(program)
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ sc.grad(reached(loss)))
    state = jax.eval_shape(lambda: PARAMS)
    try:
        (structure,) = step.normal_form.schedule(step.init(state), WHOLE)[1]
    except (TypeError, ValueError):  # the end does not fit, or a count depends on the parameters
        return None
    if structure.row_use is None or structure.row_use.kind not in ("alone", "constant"):
        return structure.row_use and structure.row_use.kind
    whole = gradient(loss, [WHOLE])
    if calls[0] != calls[-1] or not all(np.isfinite(leaf).all() for leaf in whole):
        return None  # of all rows it is another program
    largest = max(np.abs(leaf).max() for leaf in whole)
    for parts in ([slice(0, 4), slice(4, 8)], [slice(0, None, 2), slice(1, None, 2)]):
        split = gradient(loss, [jax.tree.map(lambda leaf, part=part: leaf[part], WHOLE) for part in parts])
        for one, two in zip(split, whole, strict=True):  # rounding of sums in another order
            np.testing.assert_allclose(one, two, atol=1e-4 * max(largest, 1e-3), err_msg=str(structure.row_use))
    return structure.row_use.kind


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.lists(OPERATION, min_size=1, max_size=5), st.sampled_from(sorted(ENDS))))
def test_random_loss_that_is_said_to_take_each_row_alone_does(program: Program) -> None:
    check_soundness(program)


@pytest.mark.long
@settings(max_examples=5000, deadline=None)
@given(st.tuples(st.lists(OPERATION, min_size=1, max_size=7), st.sampled_from(sorted(ENDS))))
def test_many_random_losses_that_are_said_to_take_each_row_alone_do(program: Program) -> None:
    check_soundness(program)
