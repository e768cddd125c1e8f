"""Every error that a user can meet here: its class, its builtin, its whole text, and that nothing was lost.

Each row is one mistake. The texts are in golden/errors, a file a group; a text that no row makes is refused.
"""

import functools
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, WHOLE, probe_batch, probe_model_state, probe_params
from conftest import GOLDEN, golden_texts, mesh_of
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._language.kinds import Kind
from stepc.errors import faults_in_one
from stepc.inspect.budget import reductions_of
from stepc.testing import assert_equal_trees, check_transform
from stepc.testing.probes import RECURRENT, WIDE, Evaluating, drawing, encoding, over_pairs, recurrent, wide_params

loss = PROBES["over_rows"]
adamw = optax.adamw(3e-4)
tx = optax.sgd(0.1)
dp = sc.shard(sc.dp("data"))
K, N = 4, 8
UNPINNED = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="unpinned_host")


def attending(params: Any, rows: Any) -> jax.Array:
    return loss(params, {**rows, "y": checkpoint_name(rows["y"], "attn")})


SHAPES = {"w": jax.ShapeDtypeStruct((3,), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.float32)}


def step_on(sizes: dict[str, int] | None = None) -> sc.Step:
    pipeline = sc.update(tx) @ sc.clip(1.0) @ sc.accumulate(K) @ dp @ sc.grad(loss)
    return sc.compile(pipeline, mesh=mesh_of(**(sizes or {"data": N})))


def with_options(options: Any) -> None:
    step = sc.compile(sc.update(tx) @ sc.grad(loss), compiler_options=options)
    step(step.init(probe_params()), probe_batch(8))


def call(batch: Any) -> None:
    step = step_on()
    step(step.init(probe_params()), batch)


def trained_with(bad: Any, *, seed: Any = 0, given: Any = None, params: Any = None, **options: Any) -> None:
    step = sc.compile(sc.update(tx) @ sc.grad(bad, **options))
    step(step.init(params or probe_params(), seed=seed, model_state=given), probe_batch(8))


def step_of(pipeline: Any) -> None:
    step = sc.compile(pipeline)
    step(step.init(probe_params()), probe_batch(8))


def encoded(head: Any, encode: Any, *, given: Any = None, **options: Any) -> None:
    step = sc.compile(sc.update(tx) @ sc.accumulate(2) @ sc.grad(sc.across(head) @ encode, **options))
    step(step.init(probe_params(), model_state=given), probe_batch(8))


def trained_on_devices(bad: Any, model_state: Any, rules: Any = True) -> None:
    step = sc.compile(sc.update(tx) @ dp @ sc.grad(bad, model_state=rules), mesh=mesh_of(data=2))
    step(step.init(probe_params(), model_state=model_state), probe_batch(8))


def asking(memory: int | str, batch: Any) -> None:
    step = sc.compile(sc.update(tx) @ sc.accumulate(memory=memory) @ dp @ sc.grad(loss), mesh=mesh_of(data=N))
    step(step.init(probe_params()), batch)


def fresh_with(source: sc.Transform, model_state: Any) -> None:
    sc.compile(sc.update(tx) @ source).init(probe_params(), model_state=model_state)


# `mlp` has no rule below, `out` has a dimension too few, two axes of `deep/w` are the same, one name is of no leaf.
NAMED = {"deep/w": P("embed", "heads", "embed"), "out": P("embed", "mlp"), "head": P("embed")}


def laid_by(transforms: Any, *, loss: Any = WIDE["over_rows"], num_rows: int = 16) -> None:
    step = sc.compile(sc.update(tx) @ transforms @ sc.grad(loss), mesh=mesh_of(data=2, replica=2, model=2))
    step(step.init(wide_params()), probe_batch(num_rows))


def padded_where_jax_looks_for_nan() -> None:
    with jax.debug_nans(True):
        laid_by(sc.shard(sc.dp("data"), sc.tp({"deep/w": P(None, "model")}, default=P(), pad=True)))


def constraining(params: Any, rows: Any) -> Any:
    y = jax.lax.with_sharding_constraint(rows["y"], P("data"))
    return jnp.mean(params["b"] * y)


def mapped(function: Any, **given: Any) -> Any:
    """A loss that calls this function of its rows in a `shard_map`, with these arguments."""

    def loss(params: Any, rows: Any) -> Any:
        run = jax.shard_map(function, **{"in_specs": P(), "out_specs": P(), "check_vma": False, **given})
        return jnp.mean(params["b"] * run(rows["y"]))

    return loss


def of_rows(function: Any) -> Any:
    """A loss that calls this function of its rows."""
    return lambda params, rows: (
        jnp.mean(params["b"] * function(rows["y"])) + params["out"].sum() + params["deep"]["w"].sum()
    )


def called_back(y: Any) -> Any:
    return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct(y.shape, y.dtype), y)


def under_a_mesh(y: Any) -> Any:
    with jax.set_mesh(mesh_of(model=2)):
        return y


@jax.custom_vjp
def averaged_back(y: Any) -> Any:
    return y


averaged_back.defvjp(lambda y: (y, None), lambda _, cotangent: (jax.lax.pmean(cotangent, "data"),))

EXPLICIT = mesh_of(data=2, replica=2, model=2)
LOSSES: dict[str, Any] = {
    "collective_over_the_rows": mapped(lambda y: jax.lax.psum(y, "data")),
    "shard_map_of_the_rows": mapped(lambda y: y, in_specs=P("data"), out_specs=P("data")),
    "shard_map_of_rows_that_do_not_divide": mapped(
        lambda y: y, in_specs=P(("data", "replica", "model")), out_specs=P()
    ),
    "shard_map_over_another_mesh": mapped(lambda y: y, mesh=mesh_of(model=8)),
    "constraint_to_another_mesh": of_rows(
        lambda y: jax.lax.with_sharding_constraint(y, NamedSharding(mesh_of(model=2), P("model")))
    ),
    "derivative_over_the_rows": lambda params, rows: jnp.mean(averaged_back(params["b"]) * rows["y"]),
    "callback": of_rows(called_back),
    "explicit_sharding": of_rows(lambda y: jax.sharding.reshard(y, P("model"))),
    "put_on_explicit_axes": of_rows(lambda y: 2 * jax.device_put(y, NamedSharding(EXPLICIT, P("model")))),
    "mesh_is_set": of_rows(under_a_mesh),
    "axes_of_the_rows_made_automatic": of_rows(jax.sharding.auto_axes(lambda y: y, out_sharding=P())),
}


def repeated(batch: Any) -> None:
    step = sc.compile(sc.repeat(4) @ sc.update(tx) @ sc.grad(loss))
    step(step.init(probe_params()), batch)


turn = sc.update(tx) @ sc.grad(loss)


def turns_of_microbatches(batch: Any) -> None:
    one, two = (sc.update(tx) @ sc.accumulate(k) @ dp @ sc.grad(loss) for k in (K, 3))
    step = sc.compile(sc.alternate(d=one, g=two), mesh=mesh_of(data=N))
    step(step.init(probe_params()), batch)


def turns_with_other_rules() -> None:
    def stateful(params: Any, rows: Any, model_state: Any) -> Any:
        return loss(params, rows), model_state

    one, two = (sc.update(tx) @ sc.grad(stateful, model_state={"**": rule}) for rule in ("rows", "constant"))
    sc.compile(sc.alternate(d=one, g=two)).init(probe_params(), model_state={"h": np.zeros((4, 2), np.float32)})


def rollout(batch: Any) -> None:
    pipeline = sc.epochs(4, minibatches=2) @ sc.update(tx) @ sc.accumulate(K) @ dp @ sc.grad(loss)
    step = sc.compile(pipeline, mesh=mesh_of(data=N))
    step(step.init(probe_params()), batch)


def epochs_of_hidden_states() -> None:
    grad = sc.grad(recurrent, model_state=RECURRENT)
    step = sc.compile(sc.epochs(4, minibatches=2) @ sc.update(tx) @ grad)
    step.init(probe_params(), model_state=probe_model_state(grad, 4))


def state_of_another_step() -> None:
    other = sc.compile(sc.update(optax.adam(1e-3)) @ sc.grad(loss))
    step_on()(other.init(probe_params()), probe_batch(64))


def donated_state() -> None:
    step = step_on()
    state = step.init(probe_params())
    step(state, probe_batch(64))
    step(state, probe_batch(64))


def shared_state(*, donated: bool) -> None:
    step = step_on({"data": 1})
    state, other = step.init(probe_params()), step.init(probe_params())
    other = replace(other, params=state.params, model_state=None if donated else state.params["w"])
    if donated:
        step(state, probe_batch(64))
    step(other, probe_batch(64))


def called_under_jit() -> None:
    step = step_on()
    jax.jit(step)(step.init(probe_params()), probe_batch(64))


def called_in_a_jit(name: str) -> None:
    step = step_on()
    given = (step.init(probe_params()), *(() if name == "shardings" else (probe_batch(64),)))
    jax.jit(lambda *given: getattr(step, name)(*given))(*given)


def donated_batch() -> None:
    batch = jax.tree.map(jnp.asarray, probe_batch(64))
    jax.block_until_ready(jax.jit(jnp.negative, donate_argnums=0)(batch["x"]))
    call(batch)


def state_in_the_batch() -> None:
    step = step_on({"data": 1})
    state = step.init({**probe_params(), "w": np.ones((64, 3), np.float32)})
    step(state, {"x": state.params["w"], "y": probe_batch(64)["y"]})


def names_an_axis(params: Any, rows: Any) -> jax.Array:
    return jax.lax.pmean(jnp.mean(rows["y"]), "data")


unstable = optax.GradientTransformation(
    lambda params: jnp.zeros((), jnp.int32), lambda grads, state, params=None: (grads, state + 0.5)
)


def one_axis_more(grads: Any, state: Any, params: Any = None) -> Any:
    return {**grads, "b": jnp.reshape(grads["b"], (1,))}, state


of_one_axis = optax.GradientTransformation(lambda params: (), one_axis_more)


def unstable_state() -> None:
    step = sc.compile(sc.update(unstable) @ sc.grad(loss))
    step(step.init(probe_params()), probe_batch(8))


def trained_by(optimizer: Any, params: Any = None) -> None:
    step = sc.compile(sc.update(optimizer) @ sc.grad(loss))
    step(step.init(params or probe_params()), probe_batch(8))


def update_by_loss(grads: Any, state: Any, params: Any, *, loss: Any, value: Any) -> Any:
    return grads, state


curious = optax.GradientTransformationExtraArgs(lambda params: (), update_by_loss)
differentially_private = optax.contrib.differentially_private_aggregate(1.0, 1.0, key=0)


class Momentum:
    def init(self, params: Any) -> Any:
        return params

    def update(self, grads: Any, state: Any, params: Any) -> Any:
        return grads, state


def schedule(count: Any) -> Any:
    return 0.1 / (1 + count)


def teaching(params: Any, rows: Any, *, ema: Any, step: Any, weight: float = 1.0) -> jax.Array:
    return loss(params, rows) + weight * step * loss(ema, rows)


def norm(tree: Any) -> jax.Array:
    return optax.tree.norm(tree)


def adversary() -> optax.GradientTransformation:
    return optax.chain(optax.contrib.normalize(), optax.sgd(0.05))


def compiled_by_hand(budget: sc.Budget) -> None:
    """Four all-reduces in a scan, written by hand, so that the table depends on no lowering of ours."""
    mesh = Mesh(np.array(jax.devices()[:N]), ("data",))

    def summed(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.sin(jax.lax.psum(c, "data")), None), x, length=K)[0]

    program = jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False))
    compiled = program.lower(jax.ShapeDtypeStruct((8 * N, 4), jnp.float32)).compile()
    known = {"gradient_reductions": reductions_of(sc.inspect.collectives(compiled), axes=("data",), elements=32)}
    sc.inspect.check(budget, compiled, known=known)


def toml(text: str) -> Path:
    path = Path(tempfile.mkdtemp()) / "budget.toml"
    path.write_text(text)
    return path


def without(module: str, mistake: Callable[[], object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, None)  # Python's own way to say: not installed
        mistake()


class OneWay:
    """Data that can be gone through once."""

    def __repr__(self) -> str:
        return "OneWay()"

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise StopIteration


def run_on(batch: Any) -> None:
    step = step_on()
    sc.run(step, step.init(probe_params()), [batch])


class OneArgument:
    """A logger that takes no step."""

    def log(self, metrics: Any) -> None: ...

    def __repr__(self) -> str:
        return "OneArgument()"


def run_donated_state() -> None:
    step = step_on()
    state = step.init(probe_params())
    step(state, probe_batch(64))
    sc.run(step, state, [])


def dies() -> Iterator[Any]:
    yield probe_batch(64)
    raise OSError("the disk is gone")


def run_nan() -> None:
    batch = probe_batch(64)
    batch["y"][3] = np.nan
    run_on(batch)


def run_late() -> None:
    def call(state: Any, batch: Any) -> Any:
        state, metrics = step_on()(state, batch)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    sc.run(call, step_on().init(probe_params()), [probe_batch(64)])


COMPOSING: dict[str, tuple[type, Callable[[], object]]] = {
    "wrong_order": (sc.PipelineTypeError, lambda: sc.accumulate(4) @ sc.update(adamw)),
    "wrong_order_complete": (sc.PipelineTypeError, lambda: sc.accumulate(4) @ (sc.update(adamw) @ sc.grad(loss))),
    "wrong_order_deep": (sc.PipelineTypeError, lambda: sc.clip(1.0) @ (sc.update(adamw) @ sc.accumulate(2) @ dp)),
    "two_updates": (sc.PipelineTypeError, lambda: sc.update(adamw) @ sc.update(adamw) @ sc.grad(loss)),
    "right_of_grad": (sc.PipelineTypeError, lambda: sc.grad(loss) @ sc.clip(1.0)),
    "two_grads": (sc.PipelineTypeError, lambda: sc.grad(loss) @ sc.grad(loss)),
    "plain_loss": (sc.PipelineTypeError, lambda: sc.update(adamw) @ sc.clip(1.0) @ loss),
    "called_on_plain_loss": (sc.PipelineTypeError, lambda: sc.clip(1.0)(loss)),
    "loss_on_the_left": (sc.PipelineTypeError, lambda: loss @ sc.clip(1.0)),
    "number": (sc.PipelineTypeError, lambda: sc.clip(1.0) @ 3),
    "cast_of_a_gradient": (sc.PipelineTypeError, lambda: sc.cast(jnp.bfloat16) @ sc.grad(loss)),
    "cast_outside_of_grad": (sc.PipelineTypeError, lambda: sc.accumulate(4) @ (sc.cast(jnp.bfloat16) @ loss)),
    "ema_of_a_gradient": (sc.PipelineTypeError, lambda: sc.ema(0.9) @ sc.clip(1.0)),
    "skip_inside": (sc.PipelineTypeError, lambda: sc.update(tx) @ sc.skip_nonfinite() @ sc.grad(loss)),
    "optimizer_itself": (sc.PipelineTypeError, lambda: tx @ sc.clip(1.0)),
    "clip_of_a_scaled_gradient": (
        sc.PipelineTypeError,
        lambda: sc.update(tx) @ sc.loss_scale() @ sc.clip(10.0) @ sc.grad(loss),
    ),
    "pipe": (sc.PipelineTypeError, lambda: sc.grad(loss) | sc.clip(1.0)),
    "shift": (sc.PipelineTypeError, lambda: sc.grad(loss) >> sc.clip(1.0) >> sc.update(tx)),
    "times": (sc.PipelineTypeError, lambda: sc.update(tx) * sc.grad(loss)),
    "plus": (sc.PipelineTypeError, lambda: sc.clip(1.0) + sc.noise(0.1)),
    "pipeline_called": (sc.PipelineTypeError, lambda: (sc.update(tx) @ sc.grad(loss))(probe_params(), probe_batch(8))),
    "transform_not_called": (sc.PipelineTypeError, lambda: sc.clip(1.0) @ sc.rows @ sc.grad(loss)),
    "maps_of_a_scaled_gradient": (
        sc.PipelineTypeError,
        lambda: sc.loss_scale() @ (sc.noise(0.1) @ sc.accumulate(4) @ dp @ sc.rows() @ sc.clip(1.0) @ sc.grad(loss)),
    ),
    "cast_of_head_and_encoder": (
        sc.PipelineTypeError,
        lambda: sc.grad(sc.cast(jnp.bfloat16) @ sc.remat() @ sc.across(over_pairs) @ encoding),
    ),
    "head_of_a_head": (sc.PipelineTypeError, lambda: sc.across(over_pairs) @ (sc.across(over_pairs) @ encoding)),
    "head_of_single_rows": (
        sc.PipelineTypeError,
        lambda: sc.accumulate(4) @ (sc.rows() @ sc.clip(1.0) @ sc.grad(sc.across(over_pairs) @ encoding)),
    ),
    "head_of_a_gradient": (sc.PipelineTypeError, lambda: sc.across(over_pairs) @ sc.grad(loss)),
}
FIELDS: dict[str, tuple[type, Callable[[], object]]] = {
    "k_zero": (sc.FieldValueError, lambda: sc.accumulate(0)),
    "k_negative": (sc.FieldValueError, lambda: sc.accumulate(-3)),
    "k_fraction": (sc.FieldTypeError, lambda: sc.accumulate(2.5)),
    "k_bool": (sc.FieldTypeError, lambda: sc.accumulate(True)),
    "k_array": (sc.FieldTypeError, lambda: sc.accumulate(np.int32(4))),
    "accumulate_neither": (sc.FieldTypeError, lambda: sc.accumulate()),
    "accumulate_both": (sc.FieldTypeError, lambda: sc.accumulate(4, memory="12GiB")),
    "accumulate_memory_text": (sc.FieldValueError, lambda: sc.accumulate(memory="a lot")),
    "accumulate_memory_fraction": (sc.FieldTypeError, lambda: sc.accumulate(memory=0.5)),
    "max_norm_zero": (sc.FieldValueError, lambda: sc.clip(0)),
    "max_norm_negative": (sc.FieldValueError, lambda: sc.clip(-1.0)),
    "max_norm_nan": (sc.FieldValueError, lambda: sc.clip(float("nan"))),
    "max_norm_inf": (sc.FieldValueError, lambda: sc.clip(float("inf"))),
    "max_norm_text": (sc.FieldTypeError, lambda: sc.clip("1.0")),
    "nonfinite_unknown": (sc.FieldValueError, lambda: sc.clip(1.0, nonfinite="skip")),
    "scale_nan": (sc.FieldValueError, lambda: sc.scale(float("nan"))),
    "max_norm_array": (sc.FieldTypeError, lambda: sc.clip(jnp.float32(1.0))),
    "rng_claim": (sc.FieldTypeError, lambda: sc.grad(loss, rng=True)),
    "scale_none": (sc.FieldTypeError, lambda: sc.scale(None)),
    "shard_axis": (sc.FieldTypeError, lambda: sc.shard("data")),
    "shard_mesh": (sc.FieldTypeError, lambda: sc.shard(3)),
    "dp_number": (sc.FieldTypeError, lambda: sc.dp(0)),
    "dp_empty": (sc.FieldValueError, lambda: sc.dp("")),
    "not_an_optimizer": (sc.FieldTypeError, lambda: sc.update(optax.adam)),
    "optimizer_of_another_library": (sc.FieldTypeError, lambda: sc.update({"lr": 0.1})),
    "optimizer_class": (sc.FieldTypeError, lambda: sc.update(Momentum)),
    "optimizer_that_accumulates": (sc.FieldTypeError, lambda: sc.update(optax.MultiSteps(tx, 4))),
    "optimizer_that_asks_for_more": (sc.FieldTypeError, lambda: sc.update(curious)),
    "schedule": (sc.FieldTypeError, lambda: sc.update(optax.cosine_decay_schedule(0.1, 100))),
    "schedule_of_your_own": (sc.FieldTypeError, lambda: sc.update(schedule)),
    "schedule_as_lambda": (sc.FieldTypeError, lambda: sc.update(lambda count: 0.1 / (1 + count))),
    "not_a_loss": (sc.FieldTypeError, lambda: sc.grad(3)),
    "loss_is_a_word": (sc.FieldTypeError, lambda: sc.grad(sc.clip(1.0))),
    "loss_words_alone": (sc.FieldTypeError, lambda: sc.grad(sc.cast(jnp.bfloat16) @ sc.remat())),
    "model_state_rule": (sc.FieldValueError, lambda: sc.grad(loss, model_state={"hidden": "row"})),
    "model_state_text": (sc.FieldTypeError, lambda: sc.grad(loss, model_state="rows")),  # pyright: ignore[reportArgumentType]
    "model_state_pattern": (sc.FieldTypeError, lambda: sc.grad(loss, model_state={3: "rows"})),  # pyright: ignore[reportArgumentType]
    "rng_unknown": (sc.FieldValueError, lambda: sc.grad(loss, rng="row")),
    "wrt_number": (sc.FieldTypeError, lambda: sc.grad(loss, wrt=("w", 3))),
    "wrt_empty": (sc.FieldValueError, lambda: sc.grad(loss, wrt=())),
    "head_is_a_number": (sc.FieldTypeError, lambda: sc.across(3)),
    "head_without_an_encoder": (sc.FieldTypeError, lambda: sc.grad(sc.across(over_pairs))),
    "has_aux_number": (sc.FieldTypeError, lambda: sc.grad(loss, has_aux=1)),
    "accumulate_dtype": (sc.FieldValueError, lambda: sc.accumulate(4, dtype=jnp.int32)),
    "accumulate_dtype_float16": (sc.FieldValueError, lambda: sc.accumulate(4, dtype=jnp.float16)),
    "cast_nothing": (sc.FieldTypeError, lambda: sc.cast("narrow")),
    "remat_policy": (sc.FieldValueError, lambda: sc.remat("dot_saveable")),
    "remat_no_names": (sc.FieldValueError, lambda: sc.remat("save_and_offload_only_these_names")),
    "remat_names_untaken": (sc.FieldValueError, lambda: sc.remat("save_only_these_names", offload=("mlp",))),
    "remat_names_without_policy": (sc.FieldValueError, lambda: sc.remat(save=("mlp",))),
    "remat_one_name": (sc.FieldTypeError, lambda: sc.remat("save_only_these_names", save="mlp")),
    "remat_name_of_nothing": (
        sc.LossError,
        lambda: trained_with(sc.remat("save_and_offload_only_these_names", offload=("mlp", "atn")) @ attending),
    ),
    "dp_zero_axes": (sc.FieldValueError, lambda: sc.dp(("replica", "data"), zero=3, zero_axes=("data", "replica"))),
    "dp_zero_axes_without_zero": (sc.FieldValueError, lambda: sc.dp(("replica", "data"), zero_axes="data")),
    "dp_offload": (sc.FieldValueError, lambda: sc.dp("data", offload="params")),
    "memory_of_the_host": (
        sc.ConfigError,
        lambda: step_on().init({**probe_params(), "w": jax.device_put(np.ones(3, np.float32), UNPINNED)}),
    ),
    "remat_function": (sc.FieldTypeError, lambda: sc.remat(jax.checkpoint_policies.dots_saveable)),
    "noise_zero": (sc.FieldValueError, lambda: sc.noise(0.0)),
    "ema_one": (sc.FieldValueError, lambda: sc.ema(1.0)),
    "skip_nonfinite_limit": (sc.FieldValueError, lambda: sc.skip_nonfinite(limit=0)),
    "epochs_minibatches": (sc.FieldValueError, lambda: sc.epochs(4, minibatches=0)),
    "alternate_every": (sc.FieldValueError, lambda: sc.alternate(d=turn, g=turn, every={"gg": 5})),
    "alternate_every_fraction": (sc.FieldTypeError, lambda: sc.alternate(d=turn, g=turn, every={"g": 0.5})),
    "alternate_every_number": (sc.FieldTypeError, lambda: sc.alternate(d=turn, g=turn, every=5)),
    "alternate_nothing": (sc.FieldValueError, lambda: sc.alternate()),
    "alternate_loss": (sc.FieldTypeError, lambda: sc.alternate(d=turn, g=loss)),
    "alternate_gradient": (sc.FieldTypeError, lambda: sc.alternate(d=turn, g=sc.grad(loss))),
    "alternate_partial": (sc.FieldTypeError, lambda: sc.alternate(d=turn, g=sc.update(tx) @ sc.clip(1.0))),
    "alternate_skip_inside": (sc.FieldTypeError, lambda: sc.alternate(d=turn, g=sc.skip_nonfinite() @ turn)),
    "alternate_twice": (sc.FieldTypeError, lambda: sc.alternate(d=turn, g=sc.alternate(a=turn, b=turn))),
    "alternate_memory": (
        sc.FieldTypeError,
        lambda: sc.alternate(d=turn, g=sc.update(tx) @ sc.accumulate(memory="1GiB") @ sc.grad(loss)),
    ),
    "repeat_fraction": (sc.FieldTypeError, lambda: sc.repeat(0.5)),
    "loss_scale_initial": (sc.FieldValueError, lambda: sc.loss_scale(initial=-1.0)),
    "loss_scale_claim": (sc.FieldTypeError, lambda: sc.loss_scale("dynamic")),
}
COMPILING: dict[str, tuple[type, Callable[[], object]]] = {
    "recipe": (sc.ConfigError, lambda: sc.compile(sc.update(tx) @ sc.clip(1.0))),
    "recipe_reference": (sc.ConfigError, lambda: sc.reference(sc.update(tx) @ sc.clip(1.0))),
    "no_update": (sc.ConfigError, lambda: sc.compile(sc.clip(1.0) @ sc.grad(loss))),
    "not_a_pipeline": (sc.FieldTypeError, lambda: sc.compile(loss)),
    "not_a_pipeline_but_a_number": (sc.FieldTypeError, lambda: sc.compile(5)),
    "positional_mesh": (sc.FieldTypeError, lambda: sc.compile(sc.update(tx) @ sc.grad(loss), mesh_of(data=2))),
    "compiler_options_are_text": (
        sc.FieldTypeError,
        lambda: sc.compile(sc.update(tx) @ sc.grad(loss), compiler_options="--xla_cpu_enable_fast_math=true"),
    ),
    "compiler_options_are_none": (
        sc.FieldTypeError,
        lambda: sc.compile(sc.update(tx) @ sc.grad(loss), compiler_options={"xla_flag": None, 3: True}),
    ),
    "params_are_a_number": (sc.FieldTypeError, lambda: step_on().init(5)),
    "params_are_an_nnx_module": (sc.FieldTypeError, lambda: step_on().init(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))),
    "params_are_an_equinox_module": (
        sc.ConfigError,
        lambda: step_on().init(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))),
    ),
    "not_a_mesh": (sc.FieldTypeError, lambda: sc.compile(sc.update(tx) @ sc.grad(loss), mesh=8)),
    "unknown_axis": (sc.ShardingError, lambda: step_on({"dta": 8})),
    "no_mesh": (sc.ShardingError, lambda: sc.compile(sc.update(tx) @ dp @ sc.grad(loss))),
    "axis_twice_and_unknown": (
        sc.ShardingError,
        lambda: sc.compile(
            sc.update(tx) @ dp @ sc.shard(sc.dp("rows")) @ sc.accumulate(2) @ dp @ sc.grad(loss),
            mesh=mesh_of(data=8),
        ),
    ),
    "reference_without_axes": (sc.ShardingError, lambda: sc.reference(sc.update(tx) @ dp @ sc.grad(loss))),
    "dp_no_axis": (sc.FieldValueError, lambda: sc.dp(())),
    "dp_axis_twice": (sc.FieldValueError, lambda: sc.dp(("data", "data"))),
    "dp_zero": (sc.FieldValueError, lambda: sc.dp("data", zero=4)),
    "dp_gather": (sc.FieldValueError, lambda: sc.dp("data", zero=3, gather="turn")),
    "dp_gather_without_parts": (sc.FieldValueError, lambda: sc.dp("data", zero=1, gather="microbatch")),
    "dp_gather_pair": (sc.FieldValueError, lambda: sc.dp("data", zero=3, gather=("step", "layer"))),
    "dp_gather_list": (sc.FieldTypeError, lambda: sc.dp("data", zero=3, gather=["layer", "step"])),
    "dp_gather_pair_without_zero": (sc.FieldValueError, lambda: sc.dp("data", zero=1, gather=("layer", "step"))),
    "dp_dtype": (sc.FieldValueError, lambda: sc.dp("data", reduce_dtype=jnp.int8)),
    "dp_list": (sc.FieldTypeError, lambda: sc.dp(["data", "replica"])),
    "dp_zero_text": (sc.FieldTypeError, lambda: sc.dp("data", zero="3")),
    "seed_numpy": (sc.FieldTypeError, lambda: step_on().init(probe_params(), seed=np.int64(3))),
    "seed_old_key": (sc.FieldTypeError, lambda: step_on().init(probe_params(), seed=jax.random.PRNGKey(0))),
    "params_are_a_state": (sc.FieldTypeError, lambda: step_on().init(step_on().init(SHAPES))),
    "dp_dtype_float8": (sc.FieldValueError, lambda: sc.dp("data", reduce_dtype=jnp.float8_e4m3fn)),
    "dp_batch": (sc.FieldTypeError, lambda: sc.dp("data", batch={"tokens": "seq"})),
    "tp_no_rules": (sc.FieldValueError, lambda: sc.tp({})),
    "tp_no_table": (sc.FieldTypeError, lambda: sc.tp([("w", P("model"))])),
    "tp_two_tables": (sc.FieldValueError, lambda: sc.tp({"w": P("model")}, {"b": P()})),
    "logical_no_table": (sc.FieldTypeError, lambda: sc.tp(sc.logical([("embed", None), ("mlp", "model")]))),
    "logical_no_rules": (sc.FieldValueError, lambda: sc.logical({})),
    "logical_no_name": (sc.FieldTypeError, lambda: sc.logical({0: "model"})),
    "logical_no_axis": (sc.FieldTypeError, lambda: sc.logical({"mlp": P("model")})),
    "logical_no_spec": (sc.FieldTypeError, lambda: sc.logical({"mlp": "model"}, names={"w": ("embed", "mlp")})),
    "tp_no_pattern": (sc.FieldTypeError, lambda: sc.tp({0: P("model")})),
    "tp_no_spec": (sc.FieldTypeError, lambda: sc.tp({"w": "model"})),
    "tp_pad": (sc.FieldTypeError, lambda: sc.tp({"w": P("model")}, pad=1)),
    "tp_axis": (sc.FieldTypeError, lambda: sc.tp({"w": P(3)})),
    "shard_nothing": (sc.FieldTypeError, lambda: sc.shard()),
    "shard_two_of_a_kind": (sc.FieldValueError, lambda: sc.shard(sc.dp("data"), sc.dp("replica"))),
    "shard_mode": (sc.FieldValueError, lambda: sc.shard(sc.dp("data"), mode="automatic")),
    "shard_mode_without_dp": (sc.FieldValueError, lambda: sc.shard(sc.tp({"w": P("data")}), mode="auto")),
    "shard_mode_and_reduce_dtype": (
        sc.FieldValueError,
        lambda: sc.shard(sc.dp("data", zero=1, reduce_dtype=jnp.bfloat16), mode="auto"),
    ),
    "rules_of_two_words": (
        sc.ShardingError,
        lambda: laid_by(
            sc.shard(sc.dp("data", zero=1, reduce_dtype=jnp.bfloat16))
            @ sc.shard(sc.dp("replica", zero=3, reduce_dtype=jnp.float32))
        ),
    ),
    "rules_by_hand_and_automatic": (
        sc.ShardingError,
        lambda: laid_by(sc.shard(sc.dp("data")) @ sc.shard(sc.dp("replica"), mode="auto")),
    ),
    "rules_and_axes": (
        sc.ShardingError,
        lambda: laid_by(
            sc.shard(
                sc.dp("data", batch={"x": P("data", "modl")}),
                sc.tp({"**/w": P("data", None, "modle"), "out": P(("model", "model"))}, default=P("model")),
            )
        ),
    ),
    "rules_and_parameters": (
        sc.ShardingError,
        lambda: laid_by(
            sc.shard(
                sc.dp("data"),
                sc.tp({"deep/v": P("model"), "deep/*": P(None, "model"), "**/w": P(), "b": P("model")}),
            )
        ),
    ),
    "rules_that_do_not_divide": (
        sc.ShardingError,
        lambda: laid_by(sc.shard(sc.dp("data"), sc.tp({"deep/w": P(None, "model")}, default=P()))),
    ),
    "padding_and_debug_nans": (sc.ConfigError, lambda: padded_where_jax_looks_for_nan()),
    "rules_of_two_paddings": (
        sc.ShardingError,
        lambda: laid_by(
            sc.shard(sc.dp("data"), sc.tp({"deep/w": P(None, "model")}, pad=True))
            @ sc.shard(sc.tp({"out": P("model")}))
        ),
    ),
    "rules_by_name_and_axes": (
        sc.ShardingError,
        lambda: laid_by(
            sc.shard(sc.dp("data"), sc.tp(sc.logical({"embed": "modle", "mlp": "data"}))),
        ),
    ),
    "rules_by_name_twice": (
        sc.ShardingError,
        lambda: laid_by(
            sc.shard(sc.dp("data"), sc.tp(sc.logical({"mlp": "model"}))) @ sc.shard(sc.tp(sc.logical({"embed": None})))
        ),
    ),
    "rules_by_name_and_parameters": (
        sc.ShardingError,
        lambda: laid_by(sc.shard(sc.dp("data"), sc.tp(sc.logical({"embed": "model", "mpl": "model"}, names=NAMED)))),
    ),
    "rules_and_batch": (
        sc.ShardingError,
        lambda: laid_by(sc.shard(sc.dp("data", batch={"x": P("model", "model"), "z": P("data")}))),
    ),
    "batch_rule_that_swaps_the_rows": (
        sc.ShardingError,
        lambda: laid_by(sc.shard(sc.dp("data", batch={"x": P("model", "data"), "y": P("replica")}))),
    ),
    "rows_that_do_not_divide_automatically": (
        sc.ShardingError,
        lambda: laid_by(sc.shard(sc.dp(("data", "replica")), mode="auto"), num_rows=6),
    ),
    "constraint_on_an_axis_of_rows": (sc.ShardingError, lambda: laid_by(sc.shard(sc.dp("data")), loss=constraining)),
    **{
        name: (sc.ShardingError, partial(laid_by, sc.shard(sc.dp("data")), loss=one, num_rows=4))
        for name, one in LOSSES.items()
    },
    "mesh_is_not_given": (sc.ShardingError, lambda: trained_with(mapped(lambda y: y))),
    "integer_parameters": (
        sc.ConfigError,
        lambda: step_on().init({"w": np.ones(3, np.int32), "list": ["a", None], "ok": np.ones(3, np.float32)}),
    ),
    "no_parameters": (sc.ConfigError, lambda: step_on().init({})),
    "wrt_matches_nothing": (
        sc.ConfigError,
        lambda: sc.compile(sc.update(tx) @ sc.grad(loss, wrt=("w", "lora/bias"))).init(
            {**probe_params(), "lora": {"bia": np.ones(2, np.float32)}, "text": "frozen"}
        ),
    ),
    "wrt_matches_deeper": (
        sc.ConfigError,
        lambda: sc.compile(sc.update(tx) @ sc.grad(loss, wrt=("layer/lora", "layer/*"))).init(
            {"net": {"layer": {"w": probe_params(), "lora": {"down": np.ones(2, np.float32)}}}}
        ),
    ),
    "like_and_seed": (
        sc.ConfigError,
        lambda: step_on().init(probe_params(), seed=1, like=step_on().init(probe_params())),
    ),
    "like_of_another_optimizer": (
        sc.ConfigError,
        lambda: step_on().init(
            probe_params(), like=sc.compile(sc.update(optax.adam(1e-3)) @ sc.grad(loss)).init(probe_params())
        ),
    ),
    "like_parameters": (sc.FieldTypeError, lambda: step_on().init(probe_params(), like=probe_params())),
    "repeat_inside": (sc.ConfigError, lambda: sc.compile(sc.ema(0.9) @ sc.repeat(4) @ sc.update(tx) @ sc.grad(loss))),
    "epochs_inside": (
        sc.ConfigError,
        lambda: sc.compile(sc.skip_nonfinite() @ sc.epochs(4, minibatches=2) @ sc.update(tx) @ sc.grad(loss)),
    ),
    "epochs_of_repeat": (
        sc.ConfigError,
        lambda: sc.compile(sc.repeat(8) @ sc.epochs(4, minibatches=2) @ sc.update(tx) @ sc.grad(loss)),
    ),
    "alternate_sharding": (
        sc.ShardingError,
        lambda: sc.compile(
            sc.alternate(
                d=sc.update(tx) @ dp @ sc.grad(loss),
                e=sc.update(tx) @ sc.shard(sc.dp("data", zero=1)) @ sc.grad(loss),
                g=turn,
            ),
            mesh=mesh_of(data=N),
        ),
    ),
    "alternate_reads": (
        sc.ConfigError,
        lambda: sc.compile(sc.alternate(d=sc.ema(0.9) @ turn, g=sc.update(tx) @ sc.grad(loss, reads="ema"))),
    ),
    "alternate_pattern": (
        sc.ConfigError,
        lambda: sc.compile(sc.alternate(d=turn, g=sc.update(tx) @ sc.grad(loss, wrt="g/**"))).init(probe_params()),
    ),
    "alternate_model_state": (sc.ConfigError, turns_with_other_rules),
    "alternate_then": (sc.PipelineTypeError, lambda: sc.alternate(d=turn, g=turn) @ sc.grad(loss)),
    "epochs_model_state_by_rows": (sc.ConfigError, epochs_of_hidden_states),
    "skip_twice": (
        sc.ConfigError,
        lambda: sc.compile(sc.skip_nonfinite() @ sc.ema(0.9) @ sc.skip_nonfinite() @ sc.update(tx) @ sc.grad(loss)),
    ),
    "rows_split_again": (
        sc.ConfigError,
        lambda: sc.compile(sc.update(tx) @ sc.rows() @ sc.clip(1.0) @ sc.accumulate(2) @ sc.grad(loss)),
    ),
    "two_memories": (
        sc.ConfigError,
        lambda: sc.compile(
            sc.update(tx) @ sc.accumulate(memory="2GiB") @ sc.clip(1.0) @ sc.accumulate(memory=2**20) @ sc.grad(loss)
        ),
    ),
    "memory_of_single_rows": (
        sc.ConfigError,
        lambda: sc.compile(sc.update(tx) @ sc.rows() @ sc.clip(1.0) @ sc.accumulate(memory="2GiB") @ sc.grad(loss)),
    ),
    "memory_recipe": (sc.ConfigError, lambda: sc.compile(sc.update(tx) @ sc.accumulate(memory="2GiB"))),
    "memory_reference": (
        sc.ConfigError,
        lambda: sc.reference(sc.update(tx) @ sc.accumulate(memory="2GiB") @ sc.grad(loss)),
    ),
    "memory_no_mesh": (
        sc.ShardingError,
        lambda: sc.compile(sc.update(tx) @ sc.accumulate(memory="2GiB") @ dp @ sc.grad(loss)),
    ),
    "gradients_of_an_encoder_as_model_state": (
        sc.ConfigError,
        lambda: fresh_with(
            sc.grad(sc.across(over_pairs) @ encoding, model_state=True),
            {"_overwrite_with_gradient": {"scale": np.float32(1.0)}},
        ),
    ),
    "carry_missing": (sc.ConfigError, lambda: fresh_with(sc.grad(loss, model_state=True), None)),
    "carry_not_asked_for": (sc.ConfigError, lambda: fresh_with(sc.grad(loss), {"mean": np.zeros(3)})),
    "carry_of_text": (
        sc.ConfigError,
        lambda: fresh_with(sc.grad(loss, model_state=True), {"a": "b", "c": 1.0, "d": np.array(1j)}),
    ),
    "model_state_rules_that_do_not_fit": (
        sc.ConfigError,
        lambda: fresh_with(
            sc.grad(
                loss,
                model_state={
                    "mean": "average",
                    "on": "sum",
                    "key": "max",
                    "raw": "key",
                    "scale": "rows",
                    "hiden": "rows",
                },
            ),
            {
                "mean": np.arange(3),
                "on": np.array(True),
                "key": jax.random.key(0),
                "raw": np.zeros(2, np.uint32),
                "scale": np.float32(1),
                "hidden": np.zeros((8, 2)),
            },
        ),
    ),
    "model_state_rows_on_a_mesh": (
        sc.ConfigError,
        lambda: sc.compile(sc.update(tx) @ dp @ sc.grad(loss, model_state={"h": "rows"}), mesh=mesh_of(data=N)).init(
            probe_params(), model_state={"h": np.zeros((12, 2))}
        ),
    ),
    "optimizer_of_rows": (sc.ConfigError, lambda: trained_by(differentially_private)),
    "optimizer_of_pairs": (sc.ConfigError, lambda: trained_by(optax.lookahead(tx, 5, 0.5))),
    "optimizer_opaque": (sc.ConfigError, lambda: trained_by(optax.contrib.sam(tx, adversary(), opaque_mode=True))),
    "optimizer_of_traced_integers": (
        sc.ConfigError,
        lambda: trained_by(optax.inject_hyperparams(optax.adafactor)(0.1), {"w": np.ones((4, 4), np.float32)}),
    ),
    "seed_fraction": (sc.FieldTypeError, lambda: step_on().init(probe_params(), seed=0.5)),
}
CALLING: dict[str, tuple[type, Callable[[], object]]] = {
    "compiler_option_unknown": (sc.ConfigError, lambda: with_options({"xla_no_such_flag": True})),
    "compiler_option_with_dashes": (sc.ConfigError, lambda: with_options({"--xla_cpu_enable_fast_math": True})),
    "compiler_option_not_bool": (sc.ConfigError, lambda: with_options({"xla_cpu_enable_fast_math": "true"})),
    "compiler_option_not_int": (sc.ConfigError, lambda: with_options({"xla_backend_optimization_level": 1.5})),
    "rows_do_not_divide": (sc.BatchError, lambda: call(probe_batch(100))),
    "rows_too_few": (sc.BatchError, lambda: call(probe_batch(8))),
    "ragged": (sc.BatchError, lambda: call({"x": np.ones((64, 3), np.float32), "y": np.ones(32, np.float32)})),
    "scalar_leaf": (sc.BatchError, lambda: call({**probe_batch(64), "temperature": np.float32(1.0)})),
    "zero_dimensional": (sc.BatchError, lambda: call({**probe_batch(64), "t": jnp.ones(())})),
    "key_without_rows": (sc.BatchError, lambda: call({**probe_batch(64), "key": jax.random.key(0)})),
    "several": (sc.BatchError, lambda: call({"x": np.ones((0, 3)), "y": 1, "z": "text", "t": np.array(["a"])})),
    "empty": (sc.BatchError, lambda: call({})),
    "none": (sc.BatchError, lambda: call(None)),
    "zero_rows": (sc.BatchError, lambda: call(probe_batch(0))),
    "lists": (sc.BatchError, lambda: call({"x": [1.0, 2.0]})),
    "objects": (sc.BatchError, lambda: call({"x": object()})),
    "memory_rows": (sc.BatchError, lambda: asking("2GiB", probe_batch(100))),
    "memory_lists": (sc.BatchError, lambda: asking("2GiB", {"x": [1.0, 2.0]})),
    "reference_rows": (sc.BatchError, lambda: step_on().reference(step_on().init(probe_params()), probe_batch(100))),
    "lower_rows": (sc.BatchError, lambda: step_on().lower(step_on().init(probe_params()), probe_batch(100))),
    "not_a_state": (sc.FieldTypeError, lambda: step_on()(probe_params(), probe_batch(64))),
    "result_of_a_step": (sc.FieldTypeError, lambda: step_on()((step_on().init(SHAPES), {}), probe_batch(64))),
    "batch_is_a_state": (sc.BatchError, lambda: step_on().lower(step_on().init(SHAPES), step_on().init(SHAPES))),
    "reference_of_parameters": (sc.FieldTypeError, lambda: step_on().reference(probe_params(), probe_batch(64))),
    "another_state": (sc.ConfigError, state_of_another_step),
    "donated_state": (sc.ConfigError, donated_state),
    "state_that_trains_others": (
        sc.ConfigError,
        lambda: step_on()(sc.compile(sc.update(tx) @ sc.grad(loss, wrt="w")).init(probe_params()), probe_batch(64)),
    ),
    "donated_leaves": (sc.ConfigError, lambda: shared_state(donated=True)),
    "array_twice": (sc.ConfigError, lambda: shared_state(donated=False)),
    "called_under_jit": (sc.ConfigError, called_under_jit),
    "init_under_eval_shape": (sc.ConfigError, lambda: jax.eval_shape(step_on().init, probe_params())),
    "init_under_vmap_of_a_seed": (
        sc.ConfigError,
        lambda: jax.vmap(lambda seed: step_on().init(probe_params(), seed=seed))(jnp.arange(2)),
    ),
    **{
        f"{name}_under_jit": (sc.ConfigError, partial(called_in_a_jit, name))
        for name in ("lower", "shardings", "reference")
    },
    "donated_batch": (sc.BatchError, donated_batch),
    "array_of_the_state": (sc.BatchError, state_in_the_batch),
    "shapes_of_a_state": (sc.ConfigError, lambda: step_on()(step_on().init(SHAPES), probe_batch(64))),
    "shapes_of_a_batch": (
        sc.BatchError,
        lambda: step_on()(
            step_on().init(probe_params()), jax.eval_shape(lambda: jax.tree.map(jnp.asarray, probe_batch(64)))
        ),
    ),
    "unstable_state": (sc.ConfigError, unstable_state),
    "optimizer_state_grows": (sc.ConfigError, lambda: trained_by(optax.chain(tx, optax.monitor({"norm": norm})))),
    "updates_of_another_tree": (sc.ConfigError, lambda: trained_by(optax.measure_with_ema(norm, 0.9))),
    "updates_of_another_shape": (sc.ConfigError, lambda: trained_by(of_one_axis)),
    "vector_loss": (sc.LossError, lambda: trained_with(lambda p, b: jnp.matmul(b["x"], p["w"]))),
    "integer_loss": (sc.LossError, lambda: trained_with(lambda p, b: jnp.sum(b["y"]).astype(jnp.int32))),
    "tuple_loss": (sc.LossError, lambda: trained_with(lambda p, b: (jnp.mean(b["y"]), {"a": 1}))),
    "none_loss": (sc.LossError, lambda: trained_with(lambda p, b: None)),
    "count_depends_on_parameters": (
        sc.LossError,
        lambda: trained_with(lambda p, b: sc.Mean(jnp.sum(b["y"]), jnp.sum(p["w"])) + jnp.sum(p["b"])),
    ),
    "parameters_not_reached": (
        sc.LossError,
        lambda: trained_with(
            lambda p, b: loss(p, b) * jax.lax.stop_gradient(p["layers"][0]["mean"]),
            params={**probe_params(), "layers": [{"mean": np.ones((), np.float32)}] * 3},
        ),
    ),
    "mean_of_vectors": (sc.LossError, lambda: trained_with(lambda p, b: sc.Mean(b["x"] @ p["w"], 3))),
    "head_of_parts_with_counts": (
        sc.ConfigError,
        lambda: step_of(sc.update(Evaluating()) @ sc.accumulate(2) @ sc.clip(1.0) @ WHOLE["whole_terms"]),
    ),
    "encoder_without_rows": (
        sc.LossError,
        lambda: encoded(
            over_pairs,
            lambda p, b: {"a": jnp.sum(p["w"]), "x": b["x"].T, "max": sc.Max(b["y"]), "y": "y", "n": sc.Sum("n")},
        ),
    ),
    "encoder_of_nothing": (sc.LossError, lambda: encoded(over_pairs, lambda p, b: {})),
    "encoder_of_one_number": (sc.LossError, lambda: encoded(over_pairs, lambda p, b: jnp.sum(p["w"]))),
    "encoder_without_keys": (sc.LossError, lambda: encoded(over_pairs, encoding, rng="example")),
    "encoder_without_model_state": (
        sc.LossError,
        lambda: encoded(over_pairs, lambda p, b, c: encoding(p, b), given={"m": np.zeros(())}, model_state=True),
    ),
    "head_that_takes_rows": (sc.LossError, lambda: encoded(lambda params, z, rows: over_pairs(params, z), encoding)),
    "head_of_a_vector": (sc.LossError, lambda: encoded(lambda p, z: z["a"], encoding)),
    "head_without_metrics": (sc.LossError, lambda: encoded(over_pairs, encoding, has_aux=True)),
    "count_of_a_head_depends_on_parameters": (
        sc.LossError,
        lambda: encoded(lambda p, z: sc.Mean(jnp.sum(z["a"]), jnp.sum(z["a"] > 0)), encoding),
    ),
    "head_that_no_gradient_leaves": (
        sc.LossError,
        lambda: encoded(lambda p, z: jnp.mean(z["a"]), lambda p, b: {"a": jnp.matmul(b["x"], p["w"])}),
    ),
    "count_of_vectors": (sc.LossError, lambda: trained_with(lambda p, b: sc.Mean(jnp.sum(p["w"]), b["y"] > 0))),
    "loss_with_a_third_argument": (sc.LossError, lambda: trained_with(drawing)),
    "loss_that_reads_unasked": (sc.LossError, lambda: trained_with(teaching)),
    "metrics_and_model_state": (
        sc.LossError,
        lambda: trained_with(
            lambda p, b, c: (loss(p, b), {"norm": norm(p)}, c), given={"m": np.zeros(())}, model_state=True
        ),
    ),
    "loss_without_keys": (sc.LossError, lambda: trained_with(loss, rng="example")),
    "aux_missing": (sc.LossError, lambda: trained_with(loss, has_aux=True)),
    "aux_not_a_dict": (sc.LossError, lambda: trained_with(lambda p, b: (loss(p, b), [1.0]), has_aux=True)),
    "aux_faults": (
        sc.LossError,
        lambda: trained_with(
            lambda p, b: (loss(p, b), {"loss": 1.0, "y": "y", "s": sc.Mean(1.0, b["y"])}), has_aux=True
        ),
    ),
    "aux_names": (sc.LossError, lambda: trained_with(lambda p, b: (loss(p, b), {0: 1.0, "y": 2.0}), has_aux=True)),
    "keys_not_stable": (sc.LossError, lambda: trained_with(drawing, seed=jax.random.key(0, impl="rbg"), rng="example")),
    "carry_changes": (
        sc.LossError,
        lambda: trained_with(
            lambda p, b, c: (loss(p, b), {"m": c["m"] > 0}), given={"m": np.zeros(())}, model_state=True
        ),
    ),
    "model_state_of_rows": (
        sc.LossError,
        lambda: trained_on_devices(lambda p, b, c: (loss(p, b), {"h": c["h"] + b["x"]}), {"h": np.zeros((4, 3))}),
    ),
    "model_state_of_the_whole_batch": (
        sc.LossError,
        lambda: trained_on_devices(lambda p, b, c: (loss(p, b), {"h": c["h"] + b["x"]}), {"h": np.zeros((8, 3))}),
    ),
    "model_state_of_another_batch": (
        sc.LossError,
        lambda: trained_on_devices(
            lambda p, b, c: (loss(p, b), {"h": c["h"] + b["x"]}), {"h": np.zeros((16, 3))}, {"h": "rows"}
        ),
    ),
    "whole_numbers_by_rows": (
        sc.LossError,
        lambda: trained_on_devices(
            lambda p, b, c: (loss(p, b), {"n": c["n"] + jnp.sum(b["y"] > 0), "on": c["on"] | jnp.any(b["y"] > 0)}),
            {"n": np.array(0, np.int32), "on": np.array(False)},
        ),
    ),
    "rules_that_the_loss_breaks": (
        sc.LossError,
        lambda: trained_on_devices(
            lambda p, b, c: (loss(p, b), {"table": 0.5 * c["table"], "n": jnp.sum(b["y"] > 0)}),
            {"table": np.zeros(3), "n": np.array(0, np.int32)},
            {"table": "constant", "n": "sum"},
        ),
    ),
    "narrow_masters": (
        sc.ConfigError,
        lambda: trained_with(sc.cast(jnp.bfloat16) @ loss, params=jax.tree.map(jnp.bfloat16, probe_params())),
    ),
    "alternate_rows": (sc.BatchError, lambda: turns_of_microbatches(probe_batch(100))),
    "epochs_rows": (sc.BatchError, lambda: rollout(probe_batch(100))),
    "repeat_rows": (sc.BatchError, lambda: repeated(probe_batch(8))),
    "pad_too_many": (sc.BatchError, lambda: sc.pad_batch(probe_batch(8), 4)),
    "pad_faults": (sc.BatchError, lambda: sc.pad_batch({"x": np.ones((3, 2)), "y": np.ones(2), "z": 1.0}, 0)),
    "loss_names_an_axis": (sc.LossError, lambda: trained_with(names_an_axis)),
    "report_of_a_program": (
        sc.FieldTypeError,
        lambda: sc.report.write(jax.jit(jnp.sin).lower(1.0).compile(), "page.html"),  # pyright: ignore[reportArgumentType]
    ),
}
RUNNING: dict[str, tuple[type, Callable[[], object]]] = {
    "run_arguments": (
        sc.ConfigError,
        lambda: sc.run(None, None, [], steps=0, on_error="ignore", log_every=True),
    ),
    "run_data": (sc.FieldTypeError, lambda: sc.run(step_on(), step_on().init(probe_params()), 5)),
    "run_policies": (
        sc.ConfigError,
        lambda: sc.run(
            step_on(), None, [], on_error={"disk": "raise", "data": sc.Rollback(), "device": "retyr"},
            eval=(1, len, []), hooks=[len, (0, len)], profile=(2, 3, "traces"), checkpoint="runs", reject_if="loss > 9",
            watchdog=60, buffers=2, loggers=[print],
        ),
    ),
    "run_mistaken": (
        sc.FieldTypeError,
        lambda: sc.run(
            sc.update(tx) @ sc.grad(loss), None, {"x": np.ones(3), "y": 1},
            loggers=["wandb", sc.JSONL, OneArgument()],
        ),
    ),
    "run_state_first": (sc.FieldTypeError, lambda: sc.run(step_on().init(probe_params()), step_on(), [])),
    "run_tree_of_arrays": (sc.FieldTypeError, lambda: sc.run({str(i): np.ones(3) for i in range(400)}, None, [])),
    "run_one_logger": (sc.FieldTypeError, lambda: sc.run(step_on(), None, [], loggers=OneArgument())),
    "run_params": (sc.ConfigError, lambda: sc.run(step_on(), jax.tree.map(jnp.asarray, probe_params()), [])),
    "run_types": (sc.FieldTypeError, lambda: sc.run(step_on(), None, 5, steps=1.5, on_error=3, log_every=True)),
    "data": (sc.ConfigError, lambda: sc.Data([], prefetch=-1, short_batches="stretch", timeout_seconds=-1.0, place=3)),
    "data_timeout": (sc.ConfigError, lambda: sc.Data([], timeout_seconds=60)),
    "data_types": (sc.FieldTypeError, lambda: sc.Data(5, prefetch=True, short_batches=None)),
    "watchdog": (sc.ConfigError, lambda: sc.Watchdog(-1, max_recompiles=-1, compare_replicas_every=0.5)),
    "watchdog_signals": (sc.ConfigError, lambda: sc.Watchdog(signals=(signal.SIGKILL, "SIGHUP", 4000))),
    "watchdog_exit": (sc.ConfigError, lambda: sc.Watchdog(warn_seconds=60, exit_seconds=30)),
    "eval": (sc.ConfigError, lambda: sc.Eval(0, "loss", OneWay())),
    "profile": (sc.ConfigError, lambda: sc.Profile(3, 2, None)),
    "buffers": (sc.ConfigError, lambda: sc.Buffers(-1, 0, donate_state="yes")),
    "run_exact_resume": (
        sc.ConfigError,
        lambda: sc.run(
            step_on(), step_on().init(probe_params()), [],
            checkpoint=sc.Checkpoints("runs", every=1, exact_resume=True),
        ),
    ),
    "run_replay": (
        sc.ConfigError,
        lambda: sc.run(
            step_on(), step_on().init(probe_params()), [], on_error=sc.Rollback(data="replay"),
            checkpoint=sc.Checkpoints("runs", every=1),
        ),
    ),
    "run_not_a_state": (sc.ConfigError, lambda: sc.run(step_on(), {"w": 1, "b": "two"}, [])),
    "run_donated_state": (sc.ConfigError, run_donated_state),
    "run_bad_leaf": (sc.DataError, lambda: run_on({"x": [1, 2], "y": np.array(["a"]), "z": np.zeros((0, 2))})),
    "run_large_number": (sc.DataError, lambda: run_on({"x": np.array([1, 2**40])})),
    "run_dead_generator": (sc.DataError, lambda: sc.run(step_on(), step_on().init(probe_params()), dies(),
                                                        on_error="skip")),
    "run_nan": (sc.NonFiniteError, run_nan),
    "run_late": (sc.DeviceError, run_late),
    "run_not_a_table": (sc.BuildError, lambda: sc.run(lambda state, batch: (state, {"l": jnp.zeros(3)}),
                                                      step_on().init(probe_params()), [probe_batch(64)])),
    "run_loss_of_rows": (sc.BuildError, lambda: sc.run(lambda state, batch: (state, {"loss": jnp.zeros(3)}),
                                                       step_on().init(probe_params()), [probe_batch(64)])),
    "skip_limit": (sc.ConfigError, lambda: sc.Skip(limit=0)),
    "skip_ratio": (sc.ConfigError, lambda: sc.Skip(ratio=2)),
    "retry_wait": (sc.ConfigError, lambda: sc.Retry(wait_seconds=-1)),
    "rollback_data": (sc.ConfigError, lambda: sc.Rollback(data="drop")),
    "checkpoints": (sc.ConfigError, lambda: sc.Checkpoints(None, every=0, keep=1.5, every_seconds=0)),
    "processes_odd": (
        sc.ConfigError,
        lambda: sc.init_distributed("10.0.0.1", 0, -1, heartbeat_seconds=0.5, start_seconds=True),
    ),
    "processes_too_many": (sc.ConfigError, lambda: sc.init_distributed("10.0.0.1:1234", 2, 2)),
    "processes_too_late": (sc.ConfigError, lambda: sc.init_distributed("10.0.0.1:1234", 2, 1)),
    "run_no_data": (sc.DataError, lambda: sc.run(step_on(), step_on().init(probe_params()), [])),
    "run_bad_batch": (
        sc.DataError,
        lambda: sc.run(step_on(), step_on().init(probe_params()), [probe_batch(64), probe_batch(100)]),
    ),
    "equivalence": (
        sc.EquivalenceError,
        lambda: assert_equal_trees({"w": np.ones(3), "b": np.ones(2)}, {"w": np.zeros(3), "b": np.ones(3)},
                                   tolerance=0.0, of="two trees"),
    ),
    "equivalence_leaves": (
        sc.EquivalenceError, lambda: assert_equal_trees({"w": 1.0}, {"v": 1.0}, tolerance=0.0, of="two trees")
    ),
    "check_transform": (sc.EquivalenceError, lambda: check_transform(3)),
}  # fmt: skip
PROMISING: dict[str, tuple[type, Callable[[], object]]] = {
    "budget_not_a_size": (sc.FieldValueError, lambda: sc.Budget(temp_bytes="12 parsecs")),
    "budget_size_fraction": (sc.FieldTypeError, lambda: sc.Budget(temp_bytes=1.5)),
    "budget_size_negative": (sc.FieldValueError, lambda: sc.Budget(temp_bytes=-1)),
    "budget_count_text": (sc.FieldTypeError, lambda: sc.Budget(gradient_reductions="once")),
    "budget_count_negative": (sc.FieldValueError, lambda: sc.Budget(traces=-1)),
    "budget_promises_nothing": (sc.ConfigError, lambda: sc.Budget(donated=False)),
    "budget_no_file": (sc.ConfigError, lambda: sc.Budget.from_toml("no/budget.toml")),
    "budget_misspelt": (sc.ConfigError, lambda: sc.Budget.from_toml(toml("temp_byte = 1\nspeed = 2\n"))),
    "budget_not_toml": (sc.ConfigError, lambda: sc.Budget.from_toml(toml("temp_bytes: 1\n"))),
    "budget_not_measured": (sc.ConfigError, lambda: compiled_by_hand(sc.Budget(traces=1))),
    "budget_not_known_of_any": (
        sc.ConfigError,
        lambda: sc.inspect.check(
            sc.Budget(donated=True, gradient_reductions=1, flops=0), jax.jit(lambda x: x).lower(1.0).compile()
        ),
    ),
    "budget_is_not_one": (sc.FieldTypeError, lambda: sc.compile(sc.update(tx) @ sc.grad(loss), budget={"traces": 1})),
    "budget_broken": (
        sc.BudgetError,
        lambda: compiled_by_hand(
            sc.Budget(gradient_reductions=1, collectives_in_loops=0, collective_bytes="1 kB", temp_bytes="1GiB")
        ),
    ),
    "memory_nothing_fits": (sc.BudgetError, lambda: asking("128 B", probe_batch(64))),
    "budget_broken_alone": (sc.BudgetError, lambda: compiled_by_hand(sc.Budget(collective_bytes="64 B"))),
}
ABSENT: dict[str, tuple[type, Callable[[], object]]] = {
    "topology_not_a_name": (sc.ConfigError, lambda: sc.topology("v5e-256")),
    "topology_misspelt": (sc.ConfigError, lambda: without("libtpu", lambda: sc.topology("tpu:v5f:16x16"))),
    "topology_no_libtpu": (sc.ConfigError, lambda: without("libtpu", lambda: sc.topology("tpu:v5e:16x16"))),
    "topology_no_cuda": (sc.ConfigError, lambda: without("jax_plugins", lambda: sc.topology("gpu:h100:32x8"))),
}
GROUPS = {
    "composing": COMPOSING,
    "fields": FIELDS,
    "compiling": COMPILING,
    "calling": CALLING,
    "running": RUNNING,
    "promising": PROMISING,
    "absent": ABSENT,
}


@contextmanager
def no_compilation_of_a_step() -> Iterator[None]:
    """What `compile`, `init` and a call refuse, they refuse before a step is compiled."""
    compiled: list[str] = []

    def note(event: str, duration: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration") and "stepc_step" in str(about):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield
    jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in GROUPS[group]])
def test_mistake_is_refused_in_these_words(group: str, name: str, golden: Callable[[str, str, str], None]) -> None:
    kind, mistake = GROUPS[group][name]
    is_late = name in ("donated_state", "donated_leaves") or name.startswith("compiler_option_")  # XLA refuses them
    is_early = group in ("compiling", "calling") and not is_late
    with no_compilation_of_a_step() if is_early else nullcontext(), pytest.raises(sc.StepcError) as raised:
        mistake()
    assert type(raised.value) is kind
    golden(f"errors/{group}", name, f"{kind.__name__}: {without_lines(str(raised.value))}")


def without_lines(text: str) -> str:
    """The file stays, the number of the line in it goes: these tests may grow. So goes what a version of XLA needs."""
    text = re.sub(r"test_errors\.py:\d+ \(", "test_errors.py:N (", text).replace(tempfile.gettempdir(), "/tmp")
    text = re.sub(r"(temp_bytes .*  )[\d,]+ B", r"\1SOME B", text)
    text = re.sub(r"^( +\d+)  [\d,]+ B +[\d,]+ B +(too large)", r"\1  SOME B  SOME B  \2", text, flags=re.MULTILINE)
    text = text.replace("/eval_jaxpr/", "/closed_call/")  # jax 0.10 and 0.11
    text = re.sub(r"`memory=\d+`", "`memory=SOME`", text)
    text = text.replace(f"=={jax.__version__}", "==VERSION")
    text = re.sub(r"/tmp/\w+/budget", "budget", text)
    lines = text.split("(test_errors.py:")
    return "(test_errors.py:".join([lines[0], *(f"N){rest.partition(')')[2]}" for rest in lines[1:])])


# What the codes of remedies name, besides the language: the losses and optimizers of the mistakes, and a step.
NAMES = {
    **{name: getattr(sc, name) for name in sc.__all__},
    **PROBES,
    "Momentum": Momentum,
    "adamw": adamw,
    "c": 1.0,
    "count": 3,
    "decay": 0.9,
    "factory": optax.adafactor,
    "jnp": jnp,
    "jax": jax,
    "loss": loss,
    "over_pairs": over_pairs,
    "encoding": encoding,
    "optax": optax,
    "learning_rate": 0.1,
    "optimizer": tx,
    "s": 0.5,
    "schedule": schedule,
    "tx": tx,
    "P": P,
    "pipeline": sc.update(tx) @ dp @ sc.grad(loss),
    "compile": sc.compile,
    "mesh": mesh_of(data=N),
    "functools": functools,
    "seed": 3,
    "key": jax.random.PRNGKey(0),
    "eqx": eqx,
    "nnx": nnx,
    "model": eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)),
    "module": nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in ("composing", "fields", "compiling") for name in GROUPS[group]]
)
def test_code_of_a_remedy_can_be_executed(group: str, name: str) -> None:
    with pytest.raises(sc.StepcError) as raised:
        GROUPS[group][name][1]()
    names = {**NAMES, "k": 4}
    for code in re.findall("`([^`]+)`", raised.value.suggestion or ""):
        if code.startswith("step.") or "memory=" in code or re.fullmatch(r"[\w.]+", code):
            continue  # a method of the reader's own step, or a name
        if "..." in code and "nnx" not in code:
            continue  # a call with a part left out
        if " = " in code:
            exec(code, names)
            continue
        done = eval(code, names)
        if isinstance(done, sc.Pipeline) and done.takes is None and done.gives is Kind.STEP:
            sc.compile(done, mesh=mesh_of(data=N))


def test_every_golden_error_has_its_mistake() -> None:
    assert {path.stem for path in Path(GOLDEN, "errors").glob("*.txt")} == set(GROUPS)
    for group, mistakes in GROUPS.items():
        assert set(golden_texts((GOLDEN / "errors" / f"{group}.txt").read_text())) == set(mistakes)


def test_refused_batch_leaves_the_state_alive() -> None:
    step = step_on()
    state = step.init(probe_params())
    for bad in (probe_batch(100), {}, {"x": 1}):
        with pytest.raises(sc.BatchError):
            step(state, bad)
    state, _ = step(state, probe_batch(64))
    assert int(state.step) == 1


def test_exception_of_the_loss_passes_through_as_itself_with_a_note() -> None:
    class Mine(Exception):
        pass

    def raises(params: Any, rows: Any) -> jax.Array:
        raise Mine("in my own transforms")

    step = sc.compile(sc.update(tx) @ sc.accumulate(2) @ sc.grad(raises))
    state = step.init(probe_params())
    with pytest.raises(Mine, match="in my own transforms") as raised:
        step(state, probe_batch(8))
    assert raised.value.__notes__[0] == (
        "stepc: raised by the loss of `grad(raises)` while it was traced for one microbatch: "
        "x float32[4, 3], y float32[4]"
    )
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_error_of_the_loss_says_what_has_changed_since_the_last_trace() -> None:
    def product(params: Any, rows: Any) -> jax.Array:
        return (rows["x"] @ params["w"]).mean()

    step = sc.compile(sc.update(tx) @ sc.accumulate(2) @ sc.grad(product))
    state, _ = step(step.init({"w": np.ones(3, np.float32)}), {"x": np.ones((8, 3), np.float32)})
    wide, renamed = {"x": np.ones((8, 4), np.float32)}, {"z": np.ones((8, 3), np.float32)}
    widened = "`x` was float32[8, 3], and is float32[8, 4]"
    for act, error, changes in (
        (lambda: step(state, wide), TypeError, widened),
        (lambda: step.lower(state, wide), TypeError, widened),
        (lambda: sc.tune(step, state, wide), TypeError, widened),
        (lambda: step(state, renamed), KeyError, "`x` is gone, `z` is new"),
    ):
        with pytest.raises(error) as raised:
            act()
        assert raised.value.__notes__[-1] == f"stepc: since the step was last traced: in the batch, {changes}."
        assert any(frame.name == "product" for frame in raised.traceback)
    assert int(step(state, {"x": np.ones((8, 3), np.float32)})[0].step) == 2  # it was alive


def test_nnx_module_that_is_not_model_state_has_a_remedy_in_a_note() -> None:
    graphdef, params, rest = nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def of_module(module: Any, rows: Any) -> jax.Array:
        return module(rows["x"]).mean()

    def of_parameters(params: Any, rows: Any) -> jax.Array:
        return of_module(nnx.merge(graphdef, params, rest), rows)

    for written, hint in (
        (of_parameters, "stepc: what a module of Flax NNX changes while it is called, such as batch statistics"),
        (of_module, "stepc: the loss is given parameters, not a module: call `nnx.merge(graphdef, params, rest)`."),
    ):
        step = sc.compile(sc.update(tx) @ sc.grad(written))
        with pytest.raises((flax.errors.TraceContextError, TypeError)) as raised:
            step(step.init(params), probe_batch(8))
        assert raised.value.__notes__[1].startswith(hint)


def test_error_about_tracers_names_the_loss_and_no_function_of_ours() -> None:
    def branching(params: Any, rows: Any) -> jax.Array:
        value = loss(params, rows)
        return value if value > 0 else -value

    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        trained_with(branching)
    assert re.search(r"while tracing the function branching at .*test_errors\.py", str(caught.value))
    assert "layers.py" not in str(caught.value)


def test_name_error_of_the_loss_passes_through_as_itself() -> None:
    def misspelt(params: Any, rows: Any) -> jax.Array:
        return undefined_name  # noqa: F821  # pyright: ignore[reportUndefinedVariable]

    with pytest.raises(NameError, match="undefined_name") as raised:
        trained_with(misspelt)
    assert raised.value.__notes__


def leaves(name: Callable[[int], str], leaf: Any) -> dict[str, Any]:
    return {name(number): leaf for number in range(1000)}


def summed(params: Any, rows: Any) -> jax.Array:
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)) * jnp.mean(next(iter(rows.values())))


def large(name: Callable[[int], str]) -> dict[str, tuple[type, Callable[[], object]]]:
    """Mistakes in each of 1,000 leaves."""
    params = leaves(name, np.float32(1.0))
    step, plain = sc.compile(sc.update(tx) @ sc.grad(summed)), sc.compile(sc.update(optax.adam(1e-3)) @ sc.grad(summed))
    shapes = {one: jax.ShapeDtypeStruct((), jnp.float32) for one in params}
    model = sc.shard(sc.dp("data"), sc.tp({"none": P("model")}))

    def state_of(one: sc.Step) -> Any:
        return one.init(params)

    def counting(params: Any, rows: Any) -> Any:
        total = sum(jax.tree.leaves(params))
        return sc.Mean(jnp.mean(rows["x"]) * total, total)

    def growing(params: Any, rows: Any, model_state: Any) -> Any:
        return jnp.mean(rows["x"]) * params["w"], {one: leaf[None] for one, leaf in model_state.items()}

    def stateful() -> None:
        step = sc.compile(sc.update(tx) @ sc.grad(growing, model_state=True))
        step(step.init({"w": np.float32(0.0)}, model_state=params), {"x": np.ones(4, np.float32)})

    def counted() -> None:
        step = sc.compile(sc.update(tx) @ sc.grad(counting))
        step(step.init(params), {"x": np.ones(4, np.float32)})

    def on_mesh() -> None:
        sc.compile(sc.update(tx) @ model @ sc.grad(summed), mesh=mesh_of(data=2, model=2)).init(shapes)

    return {
        "numbers": (sc.BatchError, lambda: step(state_of(step), leaves(name, 1.0))),
        "lists": (sc.BatchError, lambda: step(state_of(step), {"x": np.ones((50, 40)).tolist()})),
        "ragged": (sc.BatchError, lambda: step(state_of(step), {one: np.ones(n + 1) for n, one in enumerate(params)})),
        "padding": (sc.BatchError, lambda: sc.pad_batch(leaves(name, np.ones(8)), 4)),
        "parameters": (sc.ConfigError, lambda: step.init(leaves(name, "text"))),
        "state": (sc.ConfigError, lambda: step.shardings(plain.init(shapes))),
        "rules": (sc.ShardingError, on_mesh),
        "counts": (sc.LossError, counted),
        "model state": (sc.LossError, stateful),
        "trees": (
            sc.EquivalenceError,
            lambda: assert_equal_trees(params, leaves(name, np.float32(2.0)), tolerance=0.0, of="two"),
        ),
        "leaves": (sc.EquivalenceError, lambda: assert_equal_trees(params, {}, tolerance=0.0, of="two trees")),
        "data": (sc.DataError, lambda: sc.run(step, state_of(step), [leaves(name, np.array(["a"]))])),
        "run": (sc.ConfigError, lambda: sc.run(step, params, [])),
    }


def lettered(number: int) -> str:
    return "block_" + "".join("abcdefghij"[int(digit)] for digit in str(number))


@pytest.mark.parametrize("name", ["layer_{}/w".format, lettered])
@pytest.mark.parametrize("mistake", large(lettered))
def test_message_does_not_grow_with_the_number_of_leaves(mistake: str, name: Callable[[int], str]) -> None:
    kind, fails = large(name)[mistake]
    with pytest.raises(kind) as raised:
        fails()
    text = str(raised.value)
    assert len(text) < 2000
    assert len(text.splitlines()) < 24
    assert re.search(r"[\d,]{3,} (more|leaves|faults)", text), text  # what is not shown is counted


ERRORS = [kind for kind in vars(sc).values() if isinstance(kind, type) and issubclass(kind, sc.StepcError)]


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind is not sc.BudgetError])
def test_facts_of_every_error_are_few(kind: type[sc.StepcError]) -> None:
    more = {"phase": "data", "step": 1, "state_ok": True} if issubclass(kind, sc.StepError) else {}
    for name in ("layers/{}/w".format, lettered):
        text = str(kind("what", facts=[(name(n), "as [1, 2]" * 99) for n in range(1000)], **more))
        assert len(text) < 15_000
        assert len(text.splitlines()) < 20


def of_one_array(rule: Any = None, batch: Any = None) -> None:
    """A step of parameters and a batch that are one array each."""
    sharded = sc.shard(sc.dp("data", batch=batch or {}), *([] if rule is None else [sc.tp(rule)]))
    bare = sc.grad(lambda params, rows: jnp.mean(rows) * jnp.sum(params))
    step = sc.compile(sc.update(tx) @ sharded @ bare, mesh=mesh_of(data=2, model=2))
    step(step.init(np.ones(3, np.float32)), np.ones((4, 3), np.float32))


def stacked(rows: Any) -> None:
    step = sc.compile(sc.repeat(2) @ sc.update(tx) @ sc.grad(lambda params, rows: jnp.mean(rows) * params))
    step(step.init(np.float32(1.0)), rows)


ONE_ARRAY = {
    "rank of parameters": (lambda: of_one_array({"*": P(None, "model")}), "The parameter (float32[3]) has too few"),
    "division": (lambda: of_one_array({"*": P("model")}), "The parameter (float32[3]): dimension 0"),
    "rank of a batch": (lambda: of_one_array(batch={"*": P("data", None, "model")}), "The batch (float32[4, 3]) has"),
    "batch": (lambda: of_one_array(batch={"*": P("data", "model")}), "The batch (float32[4, 3]): dimension 1"),
    "repeat": (lambda: stacked(np.ones(4, np.float32)), "The batch is float32[4]: `repeat(2)` takes"),
    "padding": (lambda: sc.pad_batch(np.ones(8), 4), "The batch has 8 rows; expected"),
    "scalar": (lambda: sc.pad_batch(np.float32(1), 4), "The batch is a scalar"),
    "difference": (
        lambda: assert_equal_trees(np.ones(2), np.zeros(2), tolerance=0.0, of="two"),
        "The array differs by 1",
    ),
}


@pytest.mark.parametrize("mistake", ONE_ARRAY)
def test_one_array_is_named_in_words(mistake: str) -> None:
    fails, expected = ONE_ARRAY[mistake]
    with pytest.raises(sc.StepcError) as raised:
        fails()
    text = str(raised.value)
    assert expected in text
    assert "``" not in text


def test_few_leaves_are_named_and_many_are_a_pattern() -> None:
    few, many = ([f"`layers/{n}/w/0` is text." for n in range(count)] for count in (3, 48))
    assert "2. `layers/1/w/0` is text." in faults_in_one(few, of="a")
    assert faults_in_one([*many, "`b` is text."], of="the parameters") == (
        "49 faults in the parameters:\n\n  1. `layers/*/w/0` is text (48 leaves).\n  2. `b` is text."
    )


def test_plan_and_table_of_many_leaves_are_short() -> None:
    params = {"layers": [{"w": np.ones(4, np.float32)} for _ in range(100)]}
    step = sc.compile(sc.update(optax.adam(1e-3)) @ sc.grad(summed))
    table = str(step.shardings(step.init(params)))
    assert len(table.splitlines()) < 10
    assert "opt_state/0/mu/layers/*/w (100 leaves)" in table


def test_every_error_is_under_stepc_error_and_resembles_a_builtin() -> None:
    classes = [value for value in vars(sc).values() if isinstance(value, type) and issubclass(value, sc.StepcError)]
    for kind in classes:
        builtins = [base for base in kind.__mro__ if base.__module__ == "builtins"]
        assert kind is sc.StepcError or set(builtins) - {Exception, BaseException, object}, kind
    assert issubclass(sc.StepcError, Exception)


def test_exits_are_not_errors() -> None:
    for exit_, builtin in ((sc.Interrupted, KeyboardInterrupt), (sc.Preempted, SystemExit)):
        assert issubclass(exit_, builtin)
        assert not issubclass(exit_, sc.StepcError)
        assert not issubclass(exit_, Exception)
