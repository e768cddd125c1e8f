"""What may stand inside a loss on a mesh with an axis of the model, against the reference; and what is refused.

`pytest --regold` writes the table of docs/sharding.md again.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc import _jax
from stepc.testing import assert_equivalent

Tree: TypeAlias = dict[str, Any]  # Any: arrays, and trees of them
Loss: TypeAlias = Callable[[Any, Tree], Any]  # Any: a user's parameters; what a loss returns
WIDTH, HIDDEN, SIZES, NAMES = 4, 8, (4, 2), ("data", "model")
MODES = ("manual", "auto")
PAGE = Path(__file__).parent.parent / "docs" / "sharding.md"


def mesh_with(axis_type: AxisType) -> Mesh:
    return jax.make_mesh(SIZES, NAMES, axis_types=(axis_type,) * len(NAMES))


AUTOMATIC, EXPLICIT = mesh_with(AxisType.Auto), mesh_with(AxisType.Explicit)  # jax makes explicit ones by default


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {"w": normal(WIDTH, HIDDEN), "v": normal(HIDDEN, WIDTH, seed=1)}
RULES = {"w": P(None, "model"), "v": P("model")}
BATCH = {"x": normal(16, WIDTH, seed=2)}


def squares(values: jax.Array) -> jax.Array:
    return jnp.mean(values**2)


def one_part(w: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    """What one device makes of its columns of `w` and rows of `v`."""
    return lax.psum(jnp.tanh(x @ w) @ v, "model")


def mapped(function: Callable[..., Any], **given: Any) -> Callable[..., Any]:
    return jax.shard_map(function, in_specs=(P(None, "model"), P("model"), P()), out_specs=P(), **given)


# Sharding constraints.


def constrained(sharding: Any, params: Tree, rows: Tree) -> jax.Array:
    return squares(lax.with_sharding_constraint(jnp.tanh(rows["x"] @ params["w"]), sharding) @ params["v"])


def constrained_to_columns(params: Tree, rows: Tree) -> jax.Array:
    return constrained(P(None, "model"), params, rows)


def constrained_to_the_mesh(params: Tree, rows: Tree) -> jax.Array:
    return constrained(NamedSharding(EXPLICIT, P(None, "model")), params, rows)


# `shard_map`.


def in_shard_map(params: Tree, rows: Tree, **given: Any) -> jax.Array:
    return squares(mapped(one_part, **given)(params["w"], params["v"], rows["x"]))


def in_smap(params: Tree, rows: Tree) -> jax.Array:
    run = jax.smap(one_part, in_axes=(1, 0, None), out_axes=None, axis_name="model")
    return squares(run(params["w"], params["v"], rows["x"]))


def over_the_rows(params: Tree, rows: Tree) -> jax.Array:
    doubled = jax.shard_map(lambda x: 2 * x, mesh=EXPLICIT, in_specs=P("data"), out_specs=P("data"))(rows["x"])
    return squares(jnp.tanh(doubled @ params["w"]) @ params["v"])


def in_scan_of_remat(params: Tree, rows: Tree) -> jax.Array:
    @jax.checkpoint
    def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + mapped(one_part, mesh=EXPLICIT)(params["w"], params["v"], x), None

    return squares(lax.scan(layer, rows["x"], None, length=3)[0])


def in_conditional(params: Tree, rows: Tree) -> jax.Array:
    def yes(x: jax.Array) -> jax.Array:
        return mapped(one_part, mesh=EXPLICIT)(params["w"], params["v"], x)

    return squares(lax.cond(jnp.sum(rows["x"]) > 0, yes, lambda x: x * jnp.sum(params["w"]), rows["x"]))


@jax.jit
def jitted_layer(w: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    return mapped(one_part, mesh=EXPLICIT)(w, v, x)


def in_jit(params: Tree, rows: Tree) -> jax.Array:
    return squares(jitted_layer(params["w"], params["v"], rows["x"]))


def in_vmap(params: Tree, rows: Tree) -> jax.Array:
    def row(x: jax.Array) -> jax.Array:
        return mapped(one_part, mesh=EXPLICIT)(params["w"], params["v"], x[None])

    return squares(jax.vmap(row)(rows["x"]))


# Shardings by other words.


def put_on_the_mesh(mesh: Mesh, params: Tree, rows: Tree) -> jax.Array:
    hidden = jax.device_put(jnp.tanh(rows["x"] @ params["w"]), NamedSharding(mesh, P(None, "model")))
    return squares(hidden @ params["v"])


@partial(jax.jit, in_shardings=NamedSharding(EXPLICIT, P(None, "model")))
def sharded_tanh(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


def in_jit_with_shardings(params: Tree, rows: Tree) -> jax.Array:
    return squares(sharded_tanh(rows["x"] @ params["w"]) @ params["v"])


def resharded(params: Tree, rows: Tree) -> jax.Array:
    return squares(jax.sharding.reshard(jnp.tanh(rows["x"] @ params["w"]), P(None, "model")) @ params["v"])


def in_explicit_axes(params: Tree, rows: Tree) -> jax.Array:
    def explicitly(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.sharding.reshard(jnp.tanh(x @ w), P())

    run = jax.sharding.explicit_axes(explicitly, axes=("model",), in_sharding=(P(), P(None, "model")))
    return squares(run(rows["x"], params["w"]) @ params["v"])


# Custom derivatives and kernels.


@jax.custom_vjp
def product(w: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    return mapped(one_part, mesh=EXPLICIT)(w, v, x)


def product_forward(w: jax.Array, v: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return product(w, v, x), (w, v, x)


def product_backward(kept: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
    def back(w: jax.Array, v: jax.Array, x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        hidden = jnp.tanh(x @ w)
        of_hidden = (cotangent @ v.T) * (1 - hidden**2)
        return x.T @ of_hidden, hidden.T @ cotangent, lax.psum(of_hidden @ w.T, "model")

    specs = (P(None, "model"), P("model"), P())
    mapped = jax.shard_map(back, mesh=EXPLICIT, in_specs=(*specs, P()), out_specs=specs, check_vma=False)
    return mapped(*kept, cotangent)


product.defvjp(product_forward, product_backward)


def in_custom_vjp(params: Tree, rows: Tree) -> jax.Array:
    return squares(product(params["w"], params["v"], rows["x"]))


@jax.custom_vjp
def kernel(x: jax.Array) -> jax.Array:
    def body(x: Any, out: Any) -> None:
        out[...] = jnp.tanh(x[...])

    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


kernel.defvjp(lambda x: (kernel(x), x), lambda x, cotangent: (cotangent * (1 - jnp.tanh(x) ** 2),))


def in_pallas(params: Tree, rows: Tree) -> jax.Array:
    return squares(kernel(rows["x"] @ params["w"]) @ params["v"])


def in_pallas_in_shard_map(params: Tree, rows: Tree) -> jax.Array:
    def part(w: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
        return lax.psum(kernel(x @ w) @ v, "model")

    return squares(mapped(part, mesh=EXPLICIT, check_vma=False)(params["w"], params["v"], rows["x"]))


@custom_partitioning
def partitioned(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


def partition(mesh: Any, given: Any, result: Any) -> Any:
    sharding = NamedSharding(mesh, given[0].sharding.spec)
    return mesh, jnp.tanh, sharding, (sharding,)


partitioned.def_partition(
    partition=partition,
    infer_sharding_from_operands=lambda mesh, given, result: NamedSharding(mesh, given[0].sharding.spec),
    sharding_rule="i j -> i j",
)


@jax.custom_vjp
def differentiable(x: jax.Array) -> jax.Array:
    return partitioned(x)


differentiable.defvjp(lambda x: (partitioned(x), x), lambda x, cotangent: (cotangent * (1 - jnp.tanh(x) ** 2),))


def in_custom_partitioning(params: Tree, rows: Tree) -> jax.Array:
    return squares(differentiable(rows["x"] @ params["w"]) @ params["v"])


# Callbacks.


def in_debug_callback(params: Tree, rows: Tree) -> jax.Array:
    hidden = jnp.tanh(rows["x"] @ params["w"])
    jax.debug.callback(lambda value: None, hidden)
    return squares(hidden @ params["v"])


def called_back(x: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: np.asarray(x) + 1, shape, x, vmap_method="sequential")


def in_pure_callback(params: Tree, rows: Tree) -> jax.Array:
    return squares((called_back(rows["x"]) @ params["w"]) @ params["v"])


def in_pure_callback_in_shard_map(params: Tree, rows: Tree) -> jax.Array:
    everywhere = jax.shard_map(called_back, in_specs=P(), out_specs=P(), check_vma=False)
    return squares((everywhere(rows["x"]) @ params["w"]) @ params["v"])


def in_custom_partitioning_in_shard_map(params: Tree, rows: Tree) -> jax.Array:
    columns = P(None, "model")
    run = jax.shard_map(differentiable, in_specs=columns, out_specs=columns, check_vma=False)
    return squares(run(rows["x"] @ params["w"]) @ params["v"])


# Attention along a sequence that is sharded, experts that are sharded.

SEQUENCE = {"x": normal(16, 8, WIDTH, seed=3)}


def ring_attention(params: Tree, rows: Tree) -> jax.Array:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        size = lax.axis_size("model")
        around = [(place, (place + 1) % size) for place in range(size)]

        def turn(carry: Any, _: None) -> tuple[Any, None]:
            k, v, total, weight, largest = carry
            scores = jnp.einsum("bqd,bkd->bqk", q, k)
            new = jnp.maximum(largest, scores.max(axis=-1))
            kept, added = jnp.exp(largest - new), jnp.exp(scores - new[..., None])
            total = total * kept[..., None] + jnp.einsum("bqk,bkd->bqd", added, v)
            weight = weight * kept + added.sum(axis=-1)
            return (lax.ppermute(k, "model", around), lax.ppermute(v, "model", around), total, weight, new), None

        zeros = q[..., 0] * 0.0
        start = (k, v, jnp.zeros_like(v), zeros, zeros - 1e9)
        (_, _, total, weight, _), _ = lax.scan(turn, start, None, length=size)
        return total / weight[..., None]

    spec = P(None, "model")
    attention = jax.shard_map(attend, mesh=EXPLICIT, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    q, k, v = (rows["x"] @ params[name] for name in ("q", "k", "v"))
    return squares(attention(q, k, v))


ATTENTION = {name: normal(WIDTH, WIDTH, seed=seed) / 2 for seed, name in enumerate("qkv")}
EXPERTS = {"router": normal(WIDTH, 4), "up": normal(4, WIDTH, HIDDEN), "down": normal(4, HIDDEN, WIDTH, seed=1)}


def routed(params: Tree, rows: Tree, *, axis: str, of_rows: tuple[str, ...]) -> jax.Array:
    """Every row goes to its best expert and back, by two all-to-alls over the axis that shards the experts."""

    def dispatched(x: jax.Array, router: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(x @ router)
        chosen = jax.nn.one_hot(jnp.argmax(gates, axis=-1), gates.shape[-1])
        sent = jnp.einsum("ne,nd->end", chosen, x)  # room for every row at each expert
        sent = lax.all_to_all(sent, axis, split_axis=0, concat_axis=1, tiled=True)
        made = jnp.einsum("enh,ehd->end", jnp.tanh(jnp.einsum("end,edh->enh", sent, up)), down)
        back = lax.all_to_all(made, axis, split_axis=1, concat_axis=0, tiled=True)
        return jnp.einsum("end,ne->nd", back, chosen * gates)

    run = jax.shard_map(
        dispatched, mesh=EXPLICIT, in_specs=(P(of_rows), P(), P(axis), P(axis)), out_specs=P(of_rows), check_vma=False
    )
    return squares(run(rows["x"], params["router"], params["up"], params["down"]) - rows["x"])


# Model libraries.


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = nn.initializers.lecun_normal()
        hidden = jnp.tanh(nn.Dense(HIDDEN, kernel_init=nn.with_partitioning(normal, (None, "model")))(x))
        hidden = nn.with_logical_constraint(hidden, ("rows", "hidden"))
        return nn.Dense(WIDTH, kernel_init=nn.with_partitioning(normal, ("model", None)))(hidden)


BOXED = Perceptron().init(jax.random.key(0), BATCH["x"])["params"]


def in_linen(params: Any, rows: Tree) -> jax.Array:
    with nn.logical_axis_rules([("rows", None), ("hidden", "model")]):
        return squares(Perceptron().apply({"params": params}, rows["x"]))


class PerceptronOfNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.lecun_normal()
        columns, rows = (nnx.with_partitioning(normal, names) for names in ((None, "model"), ("model", None)))
        self.w = nnx.Linear(WIDTH, HIDDEN, kernel_init=columns, rngs=rngs)
        self.v = nnx.Linear(HIDDEN, WIDTH, kernel_init=rows, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.v(lax.with_sharding_constraint(jnp.tanh(self.w(x)), P(None, "model")))


with jax.set_mesh(AUTOMATIC):
    GRAPH, VARIABLES = nnx.split(PerceptronOfNnx(nnx.Rngs(0)), nnx.Param)


def in_nnx(params: Any, rows: Tree) -> jax.Array:
    return squares(nnx.merge(GRAPH, params)(rows["x"]))


@dataclass(frozen=True)
class Construct:
    """A loss, and what each mode makes of it: "works", or the remedy with which it is refused."""

    loss: Loss
    manual: str = "works"
    auto: str = "works"
    params: Any = None  # Any: a user's parameters
    rules: Any = None  # Any: of `tp`; None for those of `PARAMS`
    batch: Tree | None = None


COLUMNS = sc.tp({"w/kernel/**": P(None, "model"), "v/kernel/**": P("model")}, default=P())
OF_LINEN = sc.tp({"Dense_0/kernel": P(None, "model"), "Dense_1/kernel": P("model")}, default=P())
IN_SHARD_MAP = "refused: call it in a `shard_map` over the other axes, which are then manual too"
NAMED = 'refused: rows are split over the axis already; `mode="auto"` leaves it to XLA'
CONSTRUCTS = {
    '`with_sharding_constraint(x, P(None, "model"))`': Construct(constrained_to_columns),
    "`with_sharding_constraint(x, NamedSharding(mesh, ...))`": Construct(constrained_to_the_mesh),
    "`shard_map(...)`": Construct(in_shard_map),
    "`shard_map(..., mesh=mesh)`, axes of type Auto": Construct(partial(in_shard_map, mesh=AUTOMATIC)),
    "`shard_map(..., mesh=mesh)`, axes of type Explicit": Construct(partial(in_shard_map, mesh=EXPLICIT)),
    "`shard_map(..., mesh=mesh, check_vma=False)`": Construct(partial(in_shard_map, mesh=EXPLICIT, check_vma=False)),
    '`shard_map(..., mesh=mesh, axis_names={"model"})`': Construct(
        partial(in_shard_map, mesh=EXPLICIT, axis_names={"model"})
    ),
    "`smap`": Construct(in_smap),
    "`shard_map` in a scan over rematerialised layers": Construct(in_scan_of_remat),
    "`shard_map` in a conditional": Construct(in_conditional),
    "`shard_map` in `jit`": Construct(in_jit),
    "`shard_map` in `vmap`": Construct(in_vmap),
    "`shard_map` in both halves of a `custom_vjp`": Construct(in_custom_vjp),
    "`shard_map` or a constraint along the axis of the rows": Construct(over_the_rows, manual=NAMED),
    "`jit(..., in_shardings=...)`": Construct(in_jit_with_shardings),
    "`device_put(x, NamedSharding(mesh, ...))`, Auto": Construct(partial(put_on_the_mesh, AUTOMATIC)),
    "`device_put(x, NamedSharding(mesh, ...))`, Explicit": Construct(
        partial(put_on_the_mesh, EXPLICIT),
        manual="refused: `with_sharding_constraint`",
        auto="refused: `with_sharding_constraint`",
    ),
    "`reshard`, `out_sharding=`": Construct(
        resharded,
        manual="refused: `with_sharding_constraint`, or `explicit_axes` around it",
        auto="refused: `with_sharding_constraint`, or `explicit_axes` around it",
    ),
    '`explicit_axes(..., axes=("model",))`': Construct(in_explicit_axes),
    "a Pallas kernel (interpreted)": Construct(in_pallas),
    "a Pallas kernel in a `shard_map`": Construct(in_pallas_in_shard_map),
    "`custom_partitioning`": Construct(in_custom_partitioning, manual=IN_SHARD_MAP),
    "`custom_partitioning` in a `shard_map`": Construct(in_custom_partitioning_in_shard_map),
    "`debug.callback`, `debug.print`": Construct(in_debug_callback),
    "`pure_callback`, `io_callback`": Construct(in_pure_callback, manual=IN_SHARD_MAP),
    "`pure_callback` in a `shard_map`": Construct(in_pure_callback_in_shard_map),
    "ring attention along an axis of the sequence": Construct(
        ring_attention, params=ATTENTION, rules=sc.tp({}, default=P()), batch=SEQUENCE
    ),
    "experts along an axis of the model, with all-to-alls": Construct(
        partial(routed, axis="model", of_rows=("model",)),
        params=EXPERTS,
        rules=sc.tp({"up": P("model"), "down": P("model")}, default=P()),
    ),
    "experts along the axis of the rows, with all-to-alls": Construct(
        partial(routed, axis="data", of_rows=("data",)),
        manual='refused: `mode="auto"`',
        params=EXPERTS,
        rules=sc.tp({"up": P("data"), "down": P("data")}, default=P()),
    ),
    "Flax Linen, with partitioning metadata": Construct(in_linen, params=BOXED, rules=OF_LINEN),
    "Flax NNX, with partitioning metadata": Construct(in_nnx, params=VARIABLES, rules=COLUMNS),
}


def step_of(name: str, mode: str) -> tuple[sc.Step, sc.State, Tree]:
    """On an explicit mesh, as `jax.make_mesh` makes it, in a scan over two microbatches."""
    one = CONSTRUCTS[name]
    rules = sc.tp(RULES) if one.rules is None else one.rules
    source = sc.accumulate(2) @ sc.shard(sc.dp("data"), rules, mode=mode) @ sc.grad(one.loss)
    step = sc.compile(sc.update(optax.sgd(0.5)) @ source, mesh=EXPLICIT)
    return step, step.init(PARAMS if one.params is None else one.params), one.batch or BATCH


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONSTRUCTS)
def test_construct_in_a_loss_equals_its_reference_or_is_refused(name: str, mode: str) -> None:
    outcome = {"manual": CONSTRUCTS[name].manual, "auto": CONSTRUCTS[name].auto}[mode]
    if outcome == "works":
        assert_equivalent(*step_of(name, mode))
        return
    for is_reference in (False, True):
        with pytest.raises(sc.ShardingError) as raised:
            step, state, batch = step_of(name, mode)
            (step.reference if is_reference else step)(state, batch)
        assert raised.value.suggestion


def expert_step(k: int, loss: Any = None, **given: Any) -> tuple[sc.Step, sc.State]:
    """Experts along the axis of the rows, under an optimizer with moments, a norm and an average."""
    one = CONSTRUCTS["experts along the axis of the rows, with all-to-alls"]
    outer = sc.ema(0.9) @ sc.skip_nonfinite() @ sc.update(optax.adam(1e-2)) @ sc.clip(0.1)
    source = sc.grad(loss or one.loss, **given)
    step = sc.compile(
        outer @ sc.accumulate(k) @ sc.shard(sc.dp("data"), one.rules, mode="auto") @ source, mesh=EXPLICIT
    )
    return step, step.init(EXPERTS)


def test_gradient_of_experts_along_the_rows_is_not_reduced_over_them() -> None:
    step, state = expert_step(4)
    assert_equivalent(step, state, BATCH)
    lowered = step.lower(state, BATCH)
    over_rows = [row for row in lowered.compile().collectives() if "data" in row.axes and row.kind != "all-to-all"]
    router = EXPERTS["router"].nbytes
    assert {row.kind for row in over_rows} == {"all-reduce"}
    assert max(row.bytes for row in over_rows) == router < EXPERTS["up"].nbytes // SIZES[0]
    assert f"sums the gradient of {router} B over data at least once a microbatch" in str(lowered.plan)
    said = "`down`, `up` are sharded over an axis of the rows, and their gradient is not reduced over it"
    assert said in str(lowered.plan)
    sharded = [row for row in step.shardings(state).rows if row.spec == P("data")]
    assert [row.path for row in sharded if row.path.startswith("params")] == ["params/down", "params/up"]
    assert len(sharded) == 2 * 4  # the parameters, two moments, the average
    assert all(row.bytes_ * SIZES[0] == row.total_bytes for row in sharded)


def test_experts_along_the_rows_are_saved_and_restored(tmp_path: Path) -> None:
    step, state = expert_step(2)
    run = sc.run(step, state, [BATCH] * 2, checkpoint=sc.Checkpoints(tmp_path, every=1))
    restored = sc.restore(tmp_path, like=run.state)
    for one, two in zip(jax.tree.leaves(restored.params), jax.tree.leaves(run.state.params), strict=True):
        assert one.sharding == two.sharding
        np.testing.assert_array_equal(one, two)


def test_experts_along_the_rows_in_a_loss_of_the_whole_batch_equal_the_reference() -> None:
    def encode(params: Tree, rows: Tree) -> Tree:
        error = routed(params, rows, axis="data", of_rows=("data",))
        return {"error": sc.Mean(error * len(rows["x"]), len(rows["x"])), "x": rows["x"] @ params["router"]}

    def head(params: Tree, z: Tree) -> jax.Array:
        return z["error"].value + jnp.mean(z["x"]) ** 2

    assert_equivalent(*expert_step(2, sc.across(head) @ encode), BATCH)


def test_jax_that_does_not_ask_for_the_mesh_of_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jax, "_of_context", lambda mesh, own, asked_by: mesh)

    def loss(params: Any, rows: Any) -> jax.Array:
        specs = (P(None, "model"), P("model"), P())
        part = jax.shard_map(one_part, mesh=EXPLICIT, in_specs=specs, out_specs=P(), axis_names={"model"})
        return squares(part(params["w"], params["v"], rows["x"]))

    pipeline = sc.update(optax.sgd(0.1)) @ sc.shard(sc.dp("data"), sc.tp(RULES)) @ sc.grad(loss)
    step = sc.compile(pipeline, mesh=AUTOMATIC)
    with pytest.raises(sc.ShardingError, match="Leave `mesh=` out"):
        step.lower(step.init(PARAMS), BATCH)


def test_page_has_a_row_for_every_construct(request: pytest.FixtureRequest) -> None:
    head = '| in a loss, on a mesh with an axis of the model | `mode="manual"` | `mode="auto"` |\n|---|---|---|\n'
    table = head + "".join(f"| {name} | {one.manual} | {one.auto} |\n" for name, one in CONSTRUCTS.items())
    text = PAGE.read_text()
    if request.config.getoption("--regold"):
        PAGE.write_text(re.sub(rf"{re.escape(head)}(\|.*\n)*", lambda _: table, text))
    assert table in PAGE.read_text()
