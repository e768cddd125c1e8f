"""`cast`, `remat` and the dtype of the accumulator, read from the program."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import probe_batch, probe_params
from conftest import mesh_of
from jax.ad_checkpoint import checkpoint_name

import stepc as sc
from stepc._jax import scan_counts
from stepc.testing import assert_equivalent
from stepc.testing.probes import over_rows

ADAM = sc.update(optax.adam(1e-3))
DATA = sc.shard(sc.dp("data"))
WIDE = {"in": np.ones((4, 8), np.float32), "out": np.ones((8, 1), np.float32)}


def network(params: Any, rows: Any) -> jax.Array:
    hidden = jnp.tanh(rows["x"] @ params["in"])
    return jnp.mean(jnp.square((hidden @ params["out"]).astype(jnp.float32)))


def lowered(source: sc.Transform, k: int = 2, *, dtype: Any = None, params: Any = WIDE) -> sc.Lowered:
    step = sc.compile(ADAM @ sc.accumulate(k, dtype=dtype) @ DATA @ source, mesh=mesh_of(data=2))
    return step.lower(step.init(params), {"x": np.ones((16, 4), np.float32)})


def carried(jaxpr: Any) -> set[str]:
    """The dtypes of the matrices in the carries of all loops, nested ones too."""
    found: set[str] = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            start, num_carried = scan_counts(equation.params)
            kept = equation.invars[start : start + num_carried]
            found |= {str(var.aval.dtype) for var in kept if var.aval.ndim == 2}
        for part in equation.params.values():
            inner = getattr(part, "jaxpr", part)
            found |= carried(inner) if hasattr(inner, "eqns") else set()
    return found


def test_cast_computes_in_bfloat16_and_keeps_everything_else_in_float32() -> None:
    stage = lowered(sc.grad(sc.cast(jnp.bfloat16) @ network))
    text = str(stage.jaxpr())
    assert set(re.findall(r"(\w+)\[4,8\] = tanh", text)) == {"bf16"}
    assert all(kind == "bf16" for kind in re.findall(r":(\w+)\[[\d,]*\] = dot_general", text))
    assert {leaf.dtype for leaf in stage.plan.leaves if leaf.path.startswith(("params", "opt_state/0/mu"))} == {
        "float32"
    }
    (row,) = stage.compile().collectives()
    assert row.bytes == 4 * (4 * 8 + 8 + 1)  # reduced in float32


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_plan_says_what_a_narrower_reduction_would_send(zero: int) -> None:
    def note(compute: Any, dtype: Any) -> list[str]:
        rules = sc.dp("data", zero=zero, reduce_dtype=dtype)
        step = sc.compile(ADAM @ sc.shard(rules) @ sc.grad(sc.cast(compute) @ network), mesh=mesh_of(data=2))
        plan = step.lower(step.init(WIDE), {"x": np.ones((16, 4), np.float32)}).plan
        return [one for one in plan.notes if "reduce_dtype" in one]

    assert note(jnp.bfloat16, None) == [
        "the loss computes in bfloat16, and its gradient of 160 B is reduced in float32: "
        "`dp(…, reduce_dtype=jnp.bfloat16)` would send 80 B, rounded on each device"
    ]
    assert note(jnp.bfloat16, jnp.bfloat16) == note(jnp.float32, None) == []


@pytest.mark.parametrize(("dtype", "kind", "size"), [(None, "float32", 4), (jnp.bfloat16, "bfloat16", 2)])
def test_accumulator_has_the_given_dtype(dtype: Any, kind: str, size: int) -> None:
    stage = lowered(sc.grad(network), dtype=dtype)
    assert carried(stage.jaxpr().jaxpr) == {kind}
    gradient = 4 * 8 + 8
    total = sum(row.bytes for row in stage.compile().collectives())
    # XLA for CPU widens sums of bfloat16 over devices, so there the bytes are those of float32.
    assert total in (size * gradient + 4, 4 * gradient + 4)


def test_gradients_of_bfloat16_parameters_are_added_up_in_float32() -> None:
    def loss(params: Any, rows: Any) -> jax.Array:
        return jnp.mean(rows["x"]).astype(jnp.float32) * params["w"].astype(jnp.float32)

    step = sc.compile(sc.update(optax.trace(0.0)) @ sc.accumulate(256) @ sc.grad(loss))
    # The gradient of each microbatch is 1, and of one of them 257 / 256: a sum in bfloat16 stops at 256.
    x = np.ones((256, 1), np.float32)
    state, _ = step(step.init({"w": jnp.zeros((), jnp.bfloat16)}), {"x": x})
    assert state.opt_state.trace["w"].dtype == jnp.bfloat16
    assert float(state.opt_state.trace["w"]) == 1.0
    narrow = sc.compile(sc.update(optax.trace(0.0)) @ sc.accumulate(1024, dtype=jnp.bfloat16) @ sc.grad(loss))
    state, _ = narrow(narrow.init({"w": jnp.zeros((), jnp.bfloat16)}), {"x": np.ones((1024, 1), np.float32)})
    assert float(state.opt_state.trace["w"]) == 0.25  # 256 + 1 is 256 in eight bits


def test_cast_refuses_narrow_master_parameters() -> None:
    params = {"w": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(())}
    step = sc.compile(ADAM @ sc.grad(sc.cast(jnp.bfloat16) @ over_rows))
    with pytest.raises(sc.ConfigError, match="`w` is bfloat16, expected float32"):
        step(step.init(params), probe_batch(8))
    free = sc.compile(ADAM @ sc.grad(sc.cast(jnp.float16, params=None) @ over_rows))
    _, metrics = free(free.init(params), probe_batch(8))
    assert metrics["loss"].dtype == jnp.float32


def test_remat_computes_again_what_its_policy_does_not_keep() -> None:
    def dots(source: sc.Transform) -> int:
        return str(lowered(source).jaxpr()).count("dot_general")

    plain = dots(sc.grad(network))
    assert dots(sc.grad(sc.remat() @ network)) > plain
    assert dots(sc.grad(sc.remat("dots_saveable") @ network)) == plain
    assert dots(sc.grad(sc.remat("everything_saveable") @ network)) == plain


def named_network(params: Any, rows: Any) -> jax.Array:
    hidden = checkpoint_name(jnp.tanh(rows["x"] @ params["in"]), "hidden")
    return jnp.mean(jnp.square(checkpoint_name(hidden @ params["out"], "out")))


@pytest.mark.parametrize(
    "transform",
    [
        sc.remat("save_only_these_names", save=("hidden",)),
        sc.remat("save_and_offload_only_these_names", offload=("hidden",)),
        sc.remat("save_and_offload_only_these_names", save=("out",), offload=("hidden",)),
        sc.remat("offload_dot_with_no_batch_dims"),
    ],
    ids=repr,
)
def test_remat_keeps_names_on_the_device_or_in_the_memory_of_the_host(transform: sc.Transform) -> None:
    source, batch = sc.grad(transform @ named_network), {"x": np.ones((16, 4), np.float32)}
    for mesh in (mesh_of(data=2), mesh_of(data=2, model=2)):
        step = sc.compile(ADAM @ sc.accumulate(2) @ DATA @ source, mesh=mesh)
        state = step.init(WIDE)
        assert_equivalent(step, state, batch, tolerance=1e-6)  # sums over devices in another order
        text = str(step.lower(state, batch).jaxpr())
        assert ("MemorySpace.Host" in text or "pinned_host" in text) == ("offload" in repr(transform))
    assert eval(repr(transform), {"remat": sc.remat}) == transform


def test_remat_keeps_static_counts_static() -> None:
    def loss(params: Any, rows: Any) -> Any:
        return sc.Mean(jnp.sum((rows["x"] @ params["w"]) ** 2), rows["y"].shape[0]) + params["b"] ** 2

    step = sc.compile(ADAM @ sc.accumulate(2) @ sc.grad(sc.remat() @ loss))
    assert "count first" not in str(step.lower(step.init(probe_params()), probe_batch(8)).plan)


def times_x(params: Any, rows: Any) -> jax.Array:
    """A loss whose gradient is the mean of `x`."""
    return jnp.mean(rows["x"] * params["w"].astype(jnp.float32))


def sum_over_tokens(params: Any, rows: Any) -> sc.Mean:
    """A total in float16 whose gradient overflows where that of the mean does not."""
    return sc.Mean(jnp.sum(rows["x"].astype(jnp.float16) * params["w"]), jnp.sum(rows["x"] > 0))


def two_counts(params: Any, rows: Any) -> Any:
    """Two terms in float16 with counts of their own, whose gradients are the means of `x` and 0."""
    total = jnp.sum(rows["x"].astype(jnp.float16) * params["w"])
    return sc.Mean(total, jnp.sum(rows["x"] > 0)) + sc.Mean(jnp.sum(rows["x"]), jnp.sum(rows["x"] > -1) + 1)


def both_steps(pipeline: sc.Pipeline, x: Any, *, axes: dict[str, int] | None = None) -> tuple[Any, Any]:
    """The update of one float16 parameter and the metrics, by the program and by the reference, which must agree."""
    step = sc.compile(pipeline, mesh=mesh_of(**axes) if axes else None)
    state = step.init({"w": np.float16(0.0)})
    batch = {"x": np.asarray(x, np.float32)}
    expected, _ = step.reference(state, batch)
    state, metrics = step(state, batch)
    assert state.params["w"].dtype == expected.params["w"].dtype == jnp.float16
    assert float(state.params["w"]) == float(expected.params["w"])
    assert int(state.step) == int(expected.step)
    return -float(state.params["w"]), metrics


@pytest.mark.parametrize(
    ("transforms", "gradient", "expected"),
    [
        (sc.scale(2.0**-17) @ sc.clip(2.0**17) @ sc.scale(2.0**16), 8.0, 1.0),
        (sc.clip(1.0) @ sc.scale(1e5), 8.0, 1.0),  # 800,000 overflows
        (sc.scale(2.0**20) @ sc.clip(2.0**-20), 1024.0, 1.0),  # the factor underflows, and what it makes is subnormal
        (sc.scale(2.0**30) @ sc.clip(2.0**-30), 0.25, 1.0),
        (sc.scale(2.0**30) @ sc.accumulate(2) @ sc.clip(2.0**-30), 0.25, 1.0),
        (sc.scale(2.0**30) @ DATA @ sc.rows() @ sc.clip(2.0**-30), 0.25, 1.0),
    ],
)
def test_nothing_overflows_float16_between_two_transforms(transforms: Any, gradient: float, expected: float) -> None:
    pipeline = sc.update(optax.sgd(1.0)) @ transforms @ sc.grad(times_x)
    assert both_steps(pipeline, np.full(4, gradient), axes={"data": 2})[0] == expected


def test_noise_overflows_float16_only_where_the_optimizer_would_see_it() -> None:
    pipeline = sc.update(optax.sgd(1.0)) @ sc.scale(2.0**-20) @ sc.noise(2.0**20) @ sc.grad(times_x)
    small, _ = both_steps(pipeline, np.zeros(4))
    assert 0 < abs(small) < 5


@pytest.mark.parametrize("transforms", [sc.scale(1e5), sc.clip(1e6) @ sc.scale(1e5), sc.noise(1e8)])
def test_gradient_that_overflows_the_dtype_of_its_parameter_is_not_finite(transforms: Any) -> None:
    pipeline = sc.skip_nonfinite() @ sc.update(optax.sgd(1.0)) @ transforms @ sc.grad(times_x)
    update, metrics = both_steps(pipeline, np.full(4, 8.0))
    assert (update, int(metrics["skipped"])) == (0.0, 1)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("loss", [sum_over_tokens, two_counts])
def test_gradient_of_a_mean_does_not_overflow_as_its_total_would(loss: Any, k: int) -> None:
    pipeline = sc.update(optax.sgd(1.0)) @ sc.accumulate(k) @ DATA @ sc.grad(loss)
    # 16,384 tokens whose gradients are 16: their sum is four times the largest float16.
    assert both_steps(pipeline, np.full(16384, 16.0), axes={"data": 2})[0] == 16.0


def test_small_gradient_of_one_of_several_terms_does_not_underflow_by_the_number_of_parts() -> None:
    pipeline = sc.update(optax.sgd(1.0)) @ sc.scale(2.0**20) @ sc.accumulate(8) @ sc.grad(two_counts)
    assert both_steps(pipeline, np.full(8, 2.0**-23))[0] == 2.0**-3
