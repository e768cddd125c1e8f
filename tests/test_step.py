"""The compiled step as a program: one trace, donation, one reduction, nothing left of what is not needed."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params
from conftest import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

import stepc as sc
from stepc._language.reference import complete_transforms
from stepc.testing import assert_equal_trees, assert_equivalent

try:
    import resource
except ImportError:  # Windows
    resource = None

LOSS = PROBES["over_rows"]
ADAM = sc.update(optax.adam(1e-3))
DATA = sc.shard(sc.dp("data"))


def standard(k: int) -> sc.Pipeline:
    return ADAM @ sc.clip(1.0) @ sc.accumulate(k) @ DATA @ sc.grad(LOSS)


def compiled(pipeline: sc.Pipeline, mesh: jax.sharding.Mesh | None, num_rows: int = 256) -> sc.Compiled:
    step = sc.compile(pipeline, mesh=mesh)
    return step.lower(step.init(probe_params()), probe_batch(num_rows)).compile()


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    events: list[str] = []

    def note(event: str, duration: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(str(about))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield events
    jax.monitoring.unregister_event_duration_listener(note)


def test_ten_steps_are_one_trace_and_one_compilation() -> None:
    step = sc.compile(standard(4), mesh=mesh_of(data=8))
    state, batch = step.init(probe_params()), probe_batch(64)
    with counted_compilations() as compilations:
        for _ in range(10):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
    assert step.traces == 1
    assert len(compilations) == 1
    assert int(state.step) == 10


@pytest.mark.skipif(resource is None, reason="this system does not count page faults")
def test_no_call_in_a_trace_maps_memory_for_its_frame() -> None:
    faults: list[int] = []

    def page_faults() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def call() -> None: ...

    call.__code__ = call.__code__.replace(co_stacksize=100)  # the first frame that does not fit at the end of a chunk

    def call_at_every_depth(depth: int) -> None:
        before = page_faults()
        for _ in range(500):
            call()
        faults.append(page_faults() - before)
        if depth:
            call_at_every_depth(depth - 1)

    def loss(params: Any, rows: Any) -> jax.Array:
        call_at_every_depth(400)
        return jnp.mean((rows["x"] @ params["w"]) ** 2)

    step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(loss))
    step.lower(step.init({"w": np.ones((4, 1), np.float32)}), {"x": np.ones((8, 4), np.float32)})
    assert max(faults) < 500


@pytest.mark.parametrize("k", [sc.accumulate(4), sc.accumulate(memory="1 GB")], ids=["k", "memory"])
def test_compiler_options_are_given_to_xla_and_printed(k: sc.Transform) -> None:
    pipeline = sc.update(optax.sgd(0.5)) @ k @ sc.grad(LOSS)
    step = sc.compile(pipeline, compiler_options={"xla_no_such_flag": True})
    assert repr(step) == f"compile({pipeline!r}, compiler_options={{'xla_no_such_flag': True}})"
    state, batch = step.init(probe_params()), probe_batch(64)
    for attempt in (lambda: step.lower(state, batch).compile(), lambda: step(state, batch)):
        with pytest.raises(sc.ConfigError, match="XLA has no flag 'xla_no_such_flag'"):
            attempt()


def test_parameters_of_python_numbers_are_one_trace() -> None:
    params = {"w": jnp.full((3,), 0.5), "b": jnp.asarray(0.0)}  # of weak types, unlike what a step returns
    step = sc.compile(standard(4), mesh=mesh_of(data=8))
    state = step.init(params)
    for _ in range(2):
        state, _ = step(state, probe_batch(64))
    assert step.traces == 1


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_lowering_and_running_share_one_trace_and_one_compilation(kind: Callable[..., Any]) -> None:
    step = sc.compile(standard(4), mesh=mesh_of(data=8))
    state, batch = step.init(probe_params()), jax.tree.map(kind, probe_batch(64))
    with counted_compilations() as compilations:
        step.lower(state, batch).compile()
        step(state, batch)
    assert step.traces == 1
    assert sum("stepc_step" in name for name in compilations) == 1, compilations


def run_it(step: sc.Step, state: sc.State, batch: Any) -> None:
    step(jax.tree.map(jnp.copy, state), batch)


def lower_it(step: sc.Step, state: sc.State, batch: Any) -> None:
    assert step.lower(state, batch).plan.loop_length == 4


def compile_it(step: sc.Step, state: sc.State, batch: Any) -> None:
    step.lower(state, batch).compile()


@pytest.mark.parametrize(
    "uses",
    [(run_it,), (lower_it,), (run_it, lower_it), (lower_it, run_it), (lower_it, compile_it, run_it, lower_it, run_it)],
    ids=lambda uses: "_then_".join(use.__name__ for use in uses),
)
@pytest.mark.parametrize("devices", [None, 8])
def test_loss_is_called_by_the_first_trace_alone(uses: tuple[Callable[..., None], ...], devices: int | None) -> None:
    calls = []

    def loss(params: Any, rows: Any) -> jax.Array:
        calls.append(rows)
        return LOSS(params, rows)

    pipeline = ADAM @ sc.clip(1.0) @ sc.accumulate(4) @ (DATA @ sc.grad(loss) if devices else sc.grad(loss))
    step = sc.compile(pipeline, mesh=devices and mesh_of(data=devices))
    state, batch = step.init(probe_params()), probe_batch(64)
    assert not calls
    for use in uses:
        use(step, state, batch)
    assert step.traces == 1
    assert len(calls) == 1


def test_complete_pipeline_is_checked_once_in_a_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def complete(pipeline: Any) -> tuple[sc.Transform, ...]:
        checked.append(pipeline)
        return complete_transforms(pipeline)

    monkeypatch.setattr("stepc._compiler.step.complete_transforms", complete)
    monkeypatch.setattr("stepc._language.reference.complete_transforms", complete)
    step = sc.compile(standard(4), mesh=mesh_of(data=8))
    step(step.init(probe_params()), probe_batch(64))
    assert checked == [standard(4)]


def test_reference_of_a_step_is_one_value_that_inits_and_steps() -> None:
    step = sc.compile(standard(2), mesh=mesh_of(data=4))
    state, batch = step.init(probe_params(), seed=3), probe_batch(16)
    fresh = step.reference.init(probe_params(), seed=3)
    assert_equal_trees(state, fresh, tolerance=0.0, of="two inits")
    assert_equal_trees(step.reference(state, batch), step.reference(fresh, batch), tolerance=0.0, of="two steps")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: sc.compile(standard(2), mesh=8),  # pyright: ignore[reportArgumentType]
        lambda: sc.compile(standard(2), mesh=mesh_of(data=2), budget=3),  # pyright: ignore[reportArgumentType]
        lambda: sc.compile(ADAM @ sc.grad(LOSS)).init(probe_params(), seed="seven"),
        lambda: sc.compile(ADAM @ sc.grad(LOSS))(None, probe_batch(8)),  # pyright: ignore[reportArgumentType]
    ],
    ids=["mesh", "budget", "seed", "state"],
)
def test_argument_of_a_wrong_type_is_a_type_error(wrong: Callable[[], Any]) -> None:
    with pytest.raises(TypeError) as caught:
        wrong()
    assert isinstance(caught.value, sc.StepcError)


def test_another_batch_size_is_another_trace_and_never_a_silent_one(caplog: pytest.LogCaptureFixture) -> None:
    step = sc.compile(standard(2), mesh=mesh_of(data=2))
    state, _ = step(step.init(probe_params()), probe_batch(8))
    state, _ = step(state, probe_batch(8))
    assert not caplog.messages
    step(state, probe_batch(16))
    assert step.traces == 2
    (told,) = caplog.messages
    assert "in the batch, `x` was float32[8, 3], and is float32[16, 3], `y` was float32[8], and is float32[16]." in told
    assert "`pad_batch`" in told


def rate_of(state: sc.State, rate: Any) -> sc.State:
    hyperparams = {**state.opt_state.hyperparams, "learning_rate": rate}
    return replace(state, opt_state=state.opt_state._replace(hyperparams=hyperparams))


@pytest.mark.parametrize(
    ("devices", "rate", "change"),
    [
        (None, 0.5, "was float32[], and is float."),
        (2, 0.5, "was float32[], and is float."),
    ],
)
def test_retrace_that_the_state_caused_names_the_leaf_of_the_state(
    devices: int | None, rate: Any, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = sc.update(optax.inject_hyperparams(optax.sgd)(learning_rate=0.25))
    step = sc.compile(
        optimizer @ DATA @ sc.grad(LOSS) if devices else optimizer @ sc.grad(LOSS),
        mesh=devices and mesh_of(data=devices),
    )
    state, _ = step(step.init(probe_params()), probe_batch(8))
    expected, _ = step.reference(rate_of(state, jnp.float32(0.5)), probe_batch(8))
    state, _ = step(rate_of(state, rate), probe_batch(8))
    (told,) = caplog.messages
    assert f"2 times now: in the state, `opt_state/hyperparams/learning_rate` {change}" in told
    assert "jax.device_put(value.astype(old.dtype), old.sharding)" in told
    assert "batch" not in told.partition("times now")[2]
    assert_equal_trees(state.params, expected.params, tolerance=1e-6, of="a rate of another type")  # another order
    state, _ = step(state, probe_batch(8))
    assert step.traces == 2
    written = rate_of(state, jax.device_put(np.float32(0.5), state.opt_state.hyperparams["learning_rate"].sharding))
    step(written, probe_batch(8))
    assert step.traces == 2


def test_retrace_is_explained_by_the_most_similar_call(caplog: pytest.LogCaptureFixture) -> None:
    step = sc.compile(ADAM @ sc.grad(LOSS))
    state = step.init(probe_params())
    for rows in (8, 16):
        state, _ = step(state, probe_batch(rows))
    caplog.clear()
    step(state, {**probe_batch(8), "y": np.ones(8, np.int32)})
    (told,) = caplog.messages
    assert "in the batch, `y` was float32[8], and is int32[8]." in told
    assert "`x`" not in told


def test_leaf_in_another_memory_is_named_where_the_step_is_traced_again(caplog: pytest.LogCaptureFixture) -> None:
    step = sc.compile(ADAM @ DATA @ sc.grad(LOSS), mesh=mesh_of(data=2))
    state, _ = step(step.init(probe_params()), probe_batch(8))
    w = state.params["w"]
    moved = replace(state, params={**state.params, "w": jax.device_put(w, w.sharding.with_memory_kind("pinned_host"))})
    step(moved, probe_batch(8))
    (told,) = caplog.messages
    assert "`params/w` was float32[3] sharded as P(), and is sharded as P() in the memory 'pinned_host'" in told


@pytest.mark.parametrize("mesh", [None, {"data": 1}, {"data": 8}, {"data": 4, "model": 2}])
def test_every_leaf_of_the_state_is_donated_and_aliased(mesh: dict[str, int] | None) -> None:
    pipeline = ADAM @ sc.clip(1.0) @ sc.accumulate(4) @ (DATA @ sc.grad(LOSS) if mesh else sc.grad(LOSS))
    rows = compiled(pipeline, mesh and mesh_of(**mesh)).donated()
    assert [row.path for row in rows] == [
        "params/b", "params/w", "opt_state/0/count", "opt_state/0/mu/b", "opt_state/0/mu/w",
        "opt_state/0/nu/b", "opt_state/0/nu/w", "step", "rng",
    ]  # fmt: skip
    assert all(row.donated and row.aliased for row in rows)


def test_leaf_of_the_state_that_is_only_written_is_donated_and_aliased() -> None:
    solver = sc.update(optax.lbfgs()) @ sc.grad(LOSS)  # its line search keeps the last gradient, and never reads it
    program = compiled(solver, None)
    assert [row.path for row in program.donated() if not (row.donated and row.aliased)] == []
    program.check(sc.Budget(donated=True))


@pytest.mark.parametrize("k", [1, 2, 8, 32])
def test_gradient_is_reduced_once_a_step_whatever_k(k: int) -> None:
    (row,) = compiled(standard(k), mesh_of(data=8)).collectives()
    assert (row.kind, row.axes, row.executions, row.in_loop) == ("all-reduce", ("data",), 1, False)
    assert row.bytes == 4 * (3 + 1 + 1)  # w, b and the loss, in float32, in one fused sum


@pytest.mark.parametrize("k", [2, 8, 32])
def test_clip_inside_accumulate_reduces_once_a_microbatch(k: int) -> None:
    pipeline = ADAM @ sc.accumulate(k) @ sc.clip(1.0) @ DATA @ sc.grad(LOSS)
    program = compiled(pipeline, mesh_of(data=8))
    (row,) = program.collectives()
    assert (row.kind, row.executions, row.in_loop) == ("all-reduce", k, True)
    (planned,) = program.plan.collectives
    assert (planned.executions, planned.in_loop) == (k, True)
    assert planned.reason == (
        f"`clip(1.0)` is not linear: it needs the reduced gradient, and it stands inside `accumulate({k})`: "
        "once a microbatch"
    )


def test_shard_outside_clip_reduces_once_after_it() -> None:
    pipeline = ADAM @ DATA @ sc.clip(1.0) @ sc.accumulate(4) @ sc.grad(LOSS)
    (row,) = compiled(pipeline, mesh_of(data=8)).collectives()
    assert (row.executions, row.in_loop) == (1, False)


def test_means_over_two_axes_are_one_reduction() -> None:
    pipeline = ADAM @ sc.shard(sc.dp("replica")) @ sc.accumulate(4) @ DATA @ sc.grad(LOSS)
    (row,) = compiled(pipeline, mesh_of(replica=2, data=4)).collectives()
    assert set(row.axes) == {"replica", "data"}
    assert (row.executions, row.in_loop) == (1, False)


def test_one_microbatch_leaves_no_loop() -> None:
    text = compiled(standard(1), mesh_of(data=8)).hlo()
    assert " while(" not in text
    assert " while(" in compiled(standard(2), mesh_of(data=8)).hlo()


def test_nested_accumulations_are_one_loop() -> None:
    pipeline = ADAM @ sc.accumulate(2) @ DATA @ sc.accumulate(4) @ sc.grad(LOSS)
    assert compiled(pipeline, mesh_of(data=8)).hlo().count(" while(") == 1


def operations(text: str) -> list[str]:
    """What every instruction does and to what shape, without names and annotations."""
    return re.findall(r" = (\(?[^%=]*? [\w-]+)\(", text)


def test_axis_of_one_device_leaves_nothing() -> None:
    on_mesh = step_text(sc.compile(standard(4), mesh=mesh_of(data=1)))
    alone = step_text(sc.compile(ADAM @ sc.clip(1.0) @ sc.accumulate(4) @ sc.grad(LOSS)))
    assert "all-reduce" not in on_mesh
    assert operations(on_mesh) == operations(alone)


def test_axis_of_one_device_beside_another_leaves_nothing() -> None:
    pipeline = ADAM @ sc.accumulate(4) @ sc.shard(sc.dp("replica")) @ DATA @ sc.grad(LOSS)
    both = compiled(pipeline, mesh_of(replica=1, data=8))
    assert both.plan.rows == ("data",)
    assert [row.axes for row in both.collectives()] == [("data",)]


def step_text(step: sc.Step) -> str:
    return step.lower(step.init(probe_params()), probe_batch(256)).compile().hlo()


def test_program_does_not_grow_with_k() -> None:
    sizes = {k: len(operations(compiled(standard(k), mesh_of(data=8), 2048).hlo())) for k in (2, 8, 32)}
    assert max(sizes.values()) <= 1.1 * min(sizes.values()), sizes


def two_layers(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean(jnp.square(jnp.matmul(jnp.tanh(jnp.matmul(rows["x"], params["in"])), params["out"])))


def model_sharded(mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    lying = {"in": PartitionSpec(None, "model"), "out": PartitionSpec("model", None)}
    values = {"in": random.normal(size=(16, 32)), "out": random.normal(size=(32, 16))}
    return {
        name: jax.device_put(values[name].astype(np.float32), NamedSharding(mesh, spec)) for name, spec in lying.items()
    }


@pytest.mark.parametrize(
    "optimizer", [optax.adam(1e-3), optax.sgd(0.1), optax.adafactor(1e-3, min_dim_size_to_factor=8)]
)
def test_model_sharded_parameters_are_never_gathered(optimizer: optax.GradientTransformation) -> None:
    mesh = mesh_of(data=4, model=2)
    pipeline = sc.update(optimizer) @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ sc.grad(two_layers)
    step = sc.compile(pipeline, mesh=mesh)
    params, batch = model_sharded(mesh), {"x": np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)}
    state = step.init(params)
    program = step.lower(state, batch).compile()
    # The optimizer may gather factors of its own over `model`; nothing over `data` does.
    (over_data,) = program.collectives().over("data")
    assert (over_data.kind, over_data.axes) == ("all-reduce", ("data",))
    assert over_data.bytes == 4 * (2 * 16 * 32 // 2 + 1)  # both halves that a device holds, and the loss
    assert not over_data.in_loop
    assert_equivalent(step, state, batch)
    before = [leaf.sharding for leaf in jax.tree.leaves(state)]
    with counted_compilations() as compilations:
        after, _ = step(state, batch)
        after, _ = step(after, batch)
    assert not [name for name in compilations if "stepc_step" in name]
    assert [leaf.sharding for leaf in jax.tree.leaves(after)] == before
    assert after.params["in"].sharding.spec == PartitionSpec(None, "model")
    for leaf in jax.tree.leaves(after.opt_state):
        # Factors of the second moment mirror no parameter: they are whole.
        assert leaf.shape not in ((16, 32), (32, 16)) or "model" in leaf.sharding.spec


def test_bfloat16_sums_beside_a_model_axis_do_not_abort() -> None:
    mesh = mesh_of(data=4, model=2)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model_sharded(mesh))
    step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.accumulate(2) @ DATA @ sc.grad(two_layers), mesh=mesh)
    _, metrics = step(step.init(params), {"x": np.ones((16, 16), jnp.bfloat16)})
    assert np.isfinite(float(metrics["loss"]))


def test_model_axis_of_size_one_compiles_and_runs() -> None:
    mesh = mesh_of(data=1, model=2)
    step = sc.compile(ADAM @ DATA @ sc.grad(two_layers), mesh=mesh)
    _, metrics = step(step.init(model_sharded(mesh)), {"x": np.ones((4, 16), np.float32)})
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_mesh_of_any_axis_type_works_also_as_the_ambient_mesh(kind: jax.sharding.AxisType) -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    step = sc.compile(ADAM @ sc.clip(1.0) @ sc.accumulate(2) @ DATA @ sc.grad(LOSS), mesh=mesh)
    batch = jax.device_put(probe_batch(16), NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        inside = step(step.init(probe_params()), batch)
    outside = step(step.init(probe_params()), probe_batch(16))
    assert_equal_trees(inside, outside, tolerance=0.0, of="an ambient mesh and none")


def lstm(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> jax.Array:
    """Ordinary code that a strict manual region refuses: a literal zero carry, a constant branch, a callback."""

    def iteration(carry: jax.Array, column: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(carry + jnp.outer(column, params["w"]).sum(axis=1)), None

    carry, _ = jax.lax.scan(iteration, jnp.zeros(rows["x"].shape[0]), rows["x"].T)
    jax.debug.callback(lambda _: None, carry[0])
    total = jax.lax.cond(carry.sum() > 0, lambda: carry, lambda: jnp.ones_like(carry))
    return jnp.mean(total) + 0.0 * params["b"]


def test_ordinary_loss_works_in_the_manual_region() -> None:
    step = sc.compile(ADAM @ sc.accumulate(2) @ DATA @ sc.grad(lstm), mesh=mesh_of(data=4))
    assert_equivalent(step, step.init(probe_params()), probe_batch(16))


def test_init_neither_deletes_nor_aliases_the_arrays_of_the_caller() -> None:
    given = {"w": jax.device_put(jnp.ones(3), jax.devices()[0]), "b": np.ones((), np.float32)}
    for mesh in (None, mesh_of(data=1), mesh_of(data=2)):
        step = sc.compile(standard(1) if mesh else ADAM @ sc.grad(LOSS), mesh=mesh)
        state = step.init(given)
        given["b"][...] = 5.0
        state, _ = step(state, probe_batch(8))
        jax.block_until_ready(state)
        assert not given["w"].is_deleted()
        assert np.array_equal(given["w"], np.ones(3))
        assert abs(float(state.params["b"]) - 1.0) < 0.1
        given["b"][...] = 1.0


@pytest.mark.parametrize("devices", [None, 4])
def test_step_runs_operation_by_operation_with_jit_disabled(devices: int | None) -> None:
    mean = sc.accumulate(2) if devices is None else sc.accumulate(2) @ sc.shard(sc.dp("data", zero=3))
    pipeline = ADAM @ mean @ sc.grad(lambda params, rows, key: LOSS(params, rows), rng="microbatch")
    step = sc.compile(pipeline, mesh=None if devices is None else mesh_of(data=devices))
    expected, batch = step.init(probe_params()), probe_batch(16)
    with jax.disable_jit():
        state = step.init(probe_params())
        made = [(type(leaf), leaf.sharding) for leaf in jax.tree.leaves(state)]
        assert made == [(type(leaf), leaf.sharding) for leaf in jax.tree.leaves(expected)]
        state, _ = step(state, batch)
    expected, _ = step(expected, batch)
    assert_equal_trees(state, expected, tolerance=1e-6, of="a step with jit disabled")
    state, _ = step(state, batch)
    expected, _ = step(expected, batch)
    assert_equal_trees(state, expected, tolerance=1e-6, of="the step after it")


def test_init_separates_tied_leaves_and_parameters_kept_by_the_optimizer() -> None:
    tied = jnp.ones(3)

    def loss(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean(jnp.matmul(rows["x"], params["one"] + params["two"]))

    step = sc.compile(ADAM @ sc.grad(loss))
    step(step.init({"one": tied, "two": tied}), probe_batch(8))
    kept = optax.GradientTransformation(lambda params: params, lambda grads, state, params: (grads, params))
    step = sc.compile(sc.update(kept) @ sc.grad(loss))
    step(step.init({"one": tied, "two": tied}), probe_batch(8))
    assert not tied.is_deleted()


def test_init_of_shapes_is_the_state_of_shapes() -> None:
    mesh = mesh_of(data=4, model=2)
    step = sc.compile(ADAM @ sc.accumulate(2) @ DATA @ sc.grad(two_layers), mesh=mesh)
    real = step.init(model_sharded(mesh))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), model_sharded(mesh)
    )
    abstract = step.init(shapes)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    batch = {"x": jax.ShapeDtypeStruct((16, 16), jnp.float32)}
    assert (
        step.lower(abstract, batch).compile().hlo()
        == step.lower(real, {"x": np.ones((16, 16), np.float32)}).compile().hlo()
    )


def test_seed_is_the_key_of_the_state() -> None:
    step = sc.compile(ADAM @ sc.grad(LOSS))
    assert step.init(probe_params(), seed=7).rng == jax.random.key(7)


def test_batches_of_any_host_or_device_kind_give_the_same_step() -> None:
    mesh = mesh_of(data=4)
    step = sc.compile(standard(2), mesh=mesh)
    host = probe_batch(16)
    kinds = [
        host,
        jax.tree.map(jnp.asarray, host),
        jax.device_put(host, jax.devices()[3]),
        jax.device_put(host, NamedSharding(mesh, PartitionSpec())),
        jax.device_put(host, NamedSharding(mesh, PartitionSpec("data"))),
    ]
    results = [step(step.init(probe_params()), batch) for batch in kinds]
    for result in results[1:]:
        assert_equal_trees(result, results[0], tolerance=0.0, of="two kinds of batch")
    assert step.traces == 2  # jax traces host arrays and device arrays apart, wherever the latter lie


@pytest.mark.parametrize("devices", [1, 4])
def test_reference_keeps_the_state_alive_and_outlives_it(devices: int) -> None:
    step = sc.compile(standard(2), mesh=mesh_of(data=devices))
    state = step.init(probe_params())
    expected, _ = step.reference(state, probe_batch(16))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    got, _ = step(state, probe_batch(16))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(expected))
    assert np.array_equal(jax.random.key_data(got.rng), jax.random.key_data(expected.rng))


def test_state_keeps_its_type_when_fields_are_replaced() -> None:
    step = sc.compile(standard(2), mesh=mesh_of(data=4))
    state = step.init(probe_params())
    state = replace(state, step=jnp.asarray(41, jnp.int32))
    state, _ = step(state, probe_batch(16))
    assert int(state.step) == 42


ELSEWHERE: dict[str, Callable[[Any], Any]] = {
    "host": lambda tree: jax.tree.map(np.asarray, tree),
    "no_device_in_particular": lambda tree: jax.tree.map(jnp.asarray, tree),
    "one_device": lambda tree: jax.device_put(tree, jax.devices()[3]),
    "explicit_axes": lambda tree: jax.device_put(tree, NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec())),
    "fewer_devices": lambda tree: jax.device_put(tree, NamedSharding(mesh_of(data=2), PartitionSpec())),
}


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("place", ELSEWHERE)
def test_parameters_that_the_caller_has_put_elsewhere_are_placed_on_the_mesh(place: str, zero: int) -> None:
    # A checkpoint of another library is read so. jax and XLA refused it in words of their own.
    pipeline = ADAM @ sc.accumulate(2) @ sc.shard(sc.dp("data", zero=zero)) @ sc.grad(distance)
    step = sc.compile(pipeline, mesh=mesh_of(data=8))
    params, batch = {"w": np.arange(8, dtype=np.float32)}, {"x": np.ones((16, 8), np.float32)}
    expected, _ = step(step.init(params), batch)
    read = ELSEWHERE[place](params)
    given = replace(step.init({"w": np.zeros(8, np.float32)}), params=read)
    lowered = step.lower(given, batch)
    assert str(lowered.plan) == str(step.lower(step.init(params), batch).plan)
    state, _ = step(given, batch)
    assert_equal_trees(state, expected, tolerance=0.0, of="parameters that were placed")
    assert_equal_trees(read, params, tolerance=0.0, of="the caller's own")  # neither deleted nor written to
    assert step.traces == 1


def test_state_of_another_mesh_goes_on_and_one_of_other_shapes_is_refused() -> None:
    pipeline = ADAM @ sc.shard(sc.dp("data", zero=3)) @ sc.grad(distance)
    large, small = (sc.compile(pipeline, mesh=mesh_of(data=size)) for size in (8, 4))
    params, batch = {"w": np.arange(8, dtype=np.float32)}, {"x": np.ones((16, 8), np.float32)}
    (expected, _), (state, _) = large(large.init(params), batch), small(large.init(params), batch)
    assert_equal_trees(state, expected, tolerance=1e-6, of="a step on other devices")  # another order of sums
    with pytest.raises(sc.ConfigError, match="`opt_state/0/mu/w` is float32.8., expected float32.10."):
        small(replace(state, params={"w": np.zeros(10, np.float32)}), batch)


def test_memory_cost_and_text_can_be_asked() -> None:
    step = sc.compile(standard(2), mesh=mesh_of(data=4))
    lowered = step.lower(step.init(probe_params()), probe_batch(16))
    program = lowered.compile()
    assert "stablehlo" in lowered.stablehlo()
    assert "scan" in str(lowered.jaxpr())
    assert program.memory().arguments > 0
    assert program.memory().aliased >= 4 * 3 * (3 + 1)
    assert program.cost() is not None
    assert isinstance(program.executable, jax.stages.Compiled)


def in_batch(params: Any, rows: Any) -> jax.Array:
    return jnp.mean(jnp.matmul(rows["x"], params["w"])) * jnp.mean(rows.get("teacher", 1.0)) + jnp.mean(params["h"])


# What shares arrays with another state, another leaf or the batch; the paths that the error names.
SHARING: dict[str, tuple[Callable[[sc.Step, sc.State, Any], tuple[sc.State, Any]], list[str]]] = {}


def sharing(*paths: str) -> Callable[[Any], Any]:
    def note(case: Any) -> Any:
        SHARING[case.__name__] = (case, list(paths))
        return case

    return note


@sharing("`params/h` is deleted", "`params/w` is deleted")
def field_of_a_state_that_has_stepped(step: sc.Step, state: sc.State, batch: Any) -> tuple[sc.State, Any]:
    mixed = replace(step.init(state.params, seed=2), params=state.params)
    step(state, batch)
    return mixed, batch


@sharing("`params/w` is deleted")
def leaf_that_another_program_donated(step: sc.Step, state: sc.State, batch: Any) -> tuple[sc.State, Any]:
    state, _ = step(state, batch)
    jax.block_until_ready(jax.jit(lambda w: w + 1.0, donate_argnums=0)(state.params["w"]))
    return state, batch


@sharing("`slots/ema/h` is the same array as `params/h`", "`slots/ema/w` is the same array as `params/w`")
def array_under_two_names(step: sc.Step, state: sc.State, batch: Any) -> tuple[sc.State, Any]:
    return replace(state, slots={"ema": state.params}), batch


@sharing("`slots/ema/h` is the same array as `params/h`", "`slots/ema/w` is the same array as `params/w`")
def array_put_under_two_names_of_a_returned_state(step: sc.Step, state: sc.State, batch: Any) -> tuple[sc.State, Any]:
    state, _ = step(state, batch)
    state.slots["ema"] = state.params
    return state, batch


@sharing("`slots/ema/w` is the same array as `params/w`")
def buffer_in_two_arrays(step: sc.Step, state: sc.State, batch: Any) -> tuple[sc.State, Any]:
    w = state.params["w"]
    alias = jax.make_array_from_single_device_arrays(w.shape, w.sharding, [one.data for one in w.addressable_shards])
    assert alias is not w
    return replace(state, slots={"ema": {**state.slots["ema"], "w": alias}}), batch


@sharing("`teacher` is the array `params/h` of the state")
def array_of_the_state_in_the_batch(step: sc.Step, state: sc.State, batch: Any) -> tuple[sc.State, Any]:
    state, _ = step(state, {**batch, "teacher": jnp.ones(8)})
    return state, {**batch, "teacher": state.params["h"]}


@pytest.mark.parametrize("case", SHARING)
@pytest.mark.parametrize("devices", [None, 1, 2, 4])
def test_array_that_cannot_be_donated_is_refused_by_path_before_anything_runs(case: str, devices: int | None) -> None:
    # On several devices XLA refuses none of these: the process died of a segmentation fault.
    share, paths = SHARING[case]
    shard = sc.shard(sc.dp("data", zero=3)) @ sc.grad(in_batch) if devices else sc.grad(in_batch)
    step = sc.compile(sc.ema(0.9) @ sc.update(optax.sgd(0.5)) @ shard, mesh=devices and mesh_of(data=devices))
    state = step.init({"w": np.array([1.0, 2.0, 3.0], np.float32), "h": np.ones(8, np.float32)}, seed=1)
    state, batch = share(step, state, {"x": jnp.ones((8, 3))})
    alive = [leaf for leaf in jax.tree.leaves(state) if not leaf.is_deleted()]
    with pytest.raises((sc.ConfigError, sc.BatchError)) as caught:
        step(state, batch)
    for path in paths:
        assert path in str(caught.value)
    assert not any(leaf.is_deleted() for leaf in alive)


def test_state_of_copied_leaves_steps_as_any_other() -> None:
    step = sc.compile(sc.update(optax.sgd(0.5)) @ DATA @ sc.grad(LOSS), mesh=mesh_of(data=2))
    one, two = step.init(probe_params(), seed=1), step.init(jax.tree.map(np.zeros_like, probe_params()), seed=1)
    two = replace(two, params=jax.tree.map(jnp.copy, one.params))
    results = [step(state, probe_batch(8)) for state in (one, two)]
    assert_equal_trees(*results, tolerance=0.0, of="a state and its copy")


def test_two_steps_that_hand_each_other_the_parameters_are_one_training() -> None:
    steps = [
        sc.compile(sc.update(optax.sgd(rate)) @ DATA @ sc.grad(LOSS), mesh=mesh_of(data=2)) for rate in (0.5, 0.25)
    ]
    states = [step.init(probe_params()) for step in steps]
    params = states[0].params
    expected = probe_params()
    for number in range(4):
        turn = number % 2
        states[turn], _ = steps[turn](replace(states[turn], params=params), probe_batch(8))
        params = states[turn].params
        grads = jax.grad(LOSS)(expected, probe_batch(8))
        expected = jax.tree.map(lambda leaf, grad, rate=(0.5, 0.25)[turn]: leaf - rate * grad, expected, grads)
    assert_equal_trees(params, expected, tolerance=1e-6, of="two steps and one loop")  # a sum in another order


class Exported:
    """An array of another library, as a frame of pandas: it exports itself, and is no array of numpy."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values.astype(dtype or self.values.dtype)


class Tensor:
    """A tensor, as one of torch: numpy takes it by its DLPack capsule alone, and a bfloat16 not at all."""

    def __init__(self, values: Any, *, has_gradient: bool = False) -> None:
        self.values, self.has_gradient = values, has_gradient

    def __dlpack__(self, **options: Any) -> Any:
        if self.has_gradient:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.values.__dlpack_device__()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError("Got unsupported ScalarType BFloat16")


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "big_endian": lambda leaf: leaf.astype(leaf.dtype.newbyteorder(">")),
    "little_endian": lambda leaf: leaf.astype(leaf.dtype.newbyteorder("<")),
    "array": Exported,
    "big_endian_array": lambda leaf: Exported(leaf.astype(leaf.dtype.newbyteorder(">"))),
    "dlpack": Tensor,
    "dlpack_bfloat16": lambda leaf: Tensor(jnp.asarray(leaf, jnp.bfloat16)),
    "bfloat16": lambda leaf: leaf.astype(jnp.bfloat16),
    **{dtype: lambda leaf, dtype=dtype: leaf.astype(dtype) for dtype in ("float8_e4m3fn", "float8_e5m2", "int4")},
    "dlpack_float8_e4m3fn": lambda leaf: Tensor(jnp.asarray(leaf, jnp.float8_e4m3fn)),
    "array_int4": lambda leaf: Exported(leaf.astype(jnp.int4)),
}
# Numbers that each of the dtypes has.
SMALL = {"x": (np.arange(24, dtype=np.float32).reshape(8, 3) % 5 - 2)}


def distance(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((params["w"][None] - rows["x"].astype(jnp.float32)) ** 2)


@pytest.mark.parametrize("devices", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_of_another_byte_order_dtype_or_library_is_the_same_batch(kind: str, devices: int | None) -> None:
    shared = DATA if devices else sc.clip(1e6)
    pipeline = sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ shared @ sc.grad(distance)
    step = sc.compile(pipeline, mesh=devices and mesh_of(data=devices))
    expected = {"w": 0.5 * 2 / 3 * SMALL["x"].mean(axis=0)}
    batch = {"x": KINDS[kind](SMALL["x"])}

    def fresh() -> sc.State:
        return step.init({"w": np.zeros(3, np.float32)})

    def own_data() -> Iterator[Any]:
        yield from ({"x": KINDS[kind](SMALL["x"])} for _ in range(2))

    reported: list[float] = []

    def hook(number: int, metrics: Any, snapshot: Any) -> None:
        reported.append(metrics["eval/loss"])

    run = sc.run(step, fresh(), own_data(), steps=1, eval=sc.Eval(1, step, [batch]), hooks=[(1, hook)])
    for name, state in {
        "call": step(fresh(), batch)[0],
        "put": step(fresh(), step.put(batch))[0],
        "run": run.state,
        "reference": step.reference(fresh(), batch)[0],
        "function": jax.jit(lambda state: step.function(state, batch))(fresh())[0],
    }.items():
        assert_equal_trees(state.params, expected, tolerance=1e-6, of=f"{name} and the mean by hand")
    left = expected["w"][None] - SMALL["x"]
    np.testing.assert_allclose(reported, [np.mean(left**2)], rtol=1e-6)  # sums in another order
    step.lower(fresh(), batch)
    filled, _ = sc.pad_batch(batch, 10)
    assert filled["x"].astype(np.float32).tolist() == [*SMALL["x"].tolist(), *SMALL["x"][:1].tolist() * 2]


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("devices", [1, 2])
def test_batch_that_is_on_the_mesh_already_is_no_new_program(devices: int, kind: jax.sharding.AxisType) -> None:
    """On one device each spec means the same; on a mesh of explicit axes an array has another type, and is moved."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])
    step = sc.compile(sc.update(optax.sgd(0.5)) @ DATA @ sc.grad(distance), mesh=mesh)
    batch = {"x": np.float32(SMALL["x"])}

    def params_after(batch: Any) -> Any:
        return step(step.init({"w": np.zeros(3, np.float32)}), batch)[0].params

    expected = params_after(step.put(batch))
    placed = [jax.device_put(batch, NamedSharding(mesh, spec)) for spec in (PartitionSpec("data"), PartitionSpec())]
    with counted_compilations() as compilations:
        for one in placed:
            assert_equal_trees(params_after(one), expected, tolerance=0.0, of="a batch that the user has placed")
    assert step.traces == 1
    assert not [one for one in compilations if "stepc_step" in one]


def with_extras(params: Any, rows: Any) -> jax.Array:
    return LOSS(params, {"x": rows["x"], "y": rows["y"] + rows["extras"].sum(axis=1)})


def encode_extras(params: Any, rows: Any) -> Any:
    return {"errors": jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"], "extras": rows["extras"]}


def mean_of_errors(params: Any, z: Any) -> jax.Array:
    return jnp.mean(z["errors"] ** 2) + jnp.sum(z["extras"])


@pytest.mark.parametrize("devices", [None, 2])
@pytest.mark.parametrize(
    ("outer", "source"),
    [
        (sc.accumulate(2), sc.grad(with_extras)),
        (sc.accumulate(2), sc.grad(sc.across(mean_of_errors) @ encode_extras)),
    ],
    ids=["accumulate", "across"],
)
def test_leaf_of_a_batch_without_columns_is_split_too(outer: Any, source: Any, devices: int | None) -> None:
    if devices and jax.__version_info__ >= (0, 11):
        pytest.skip("jaxlib 0.11.2 crashes where a program on several CPU devices, also one by hand, sums empty arrays")
    # Features of which a data set has none. `reshape(-1, ...)` cannot tell their number of rows.
    pipeline = ADAM @ outer @ (DATA @ source if devices else source)
    step = sc.compile(pipeline, mesh=devices and mesh_of(data=devices))
    batch = {**probe_batch(8), "extras": np.zeros((8, 0), np.float32)}
    assert_equivalent(step, step.init(probe_params()), batch)


@pytest.mark.parametrize("devices", [None, 2])
def test_key_without_rows_is_told_to_be_split(devices: int | None) -> None:
    step = sc.compile(
        ADAM @ (DATA @ sc.grad(LOSS) if devices else sc.grad(LOSS)), mesh=devices and mesh_of(data=devices)
    )
    with pytest.raises(sc.BatchError, match=re.escape("Write `jax.random.split(batch['key'], 8)`: one key per row.")):
        step(step.init(probe_params()), {**probe_batch(8), "key": jax.random.key(0)})


def test_batch_of_another_byte_order_or_library_is_no_new_program() -> None:
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.grad(distance))
    for kind in (np.asarray, KINDS["big_endian"], Exported, Tensor):
        step(step.init({"w": np.zeros(3, np.float32)}), {"x": kind(SMALL["x"])})
    assert step.traces == 1


def test_run_copies_the_tensors_of_a_loader_that_reuses_its_buffer() -> None:
    buffer = np.zeros((8, 3), np.float32)

    def reused() -> Iterator[Any]:
        for number in range(1, 5):
            buffer[:] = number
            yield {"x": Tensor(buffer)}
            buffer[:] = -1

    step = sc.compile(sc.update(optax.sgd(1.5)) @ sc.grad(distance))  # a step moves `w` to the rows
    run = sc.run(step, step.init({"w": np.zeros(3, np.float32)}), reused())
    np.testing.assert_allclose(run.state.params["w"], np.full(3, 4.0), rtol=1e-6)


def test_run_takes_what_nobody_can_write_to_as_it_is_and_copies_the_rest_once() -> None:
    table = np.zeros((1 << 14, 3), np.float32)  # large enough for a copy that jax takes as it is
    view = table[:]
    view.setflags(write=False)  # but `table` can be written to
    constant = table.copy()
    constant.setflags(write=False)
    given, taken, placed = [table, view, constant[:], constant.astype(np.float64)], [], []
    given[3].setflags(write=False)  # jax computes in float32

    def place(batch: Any) -> Any:
        taken.append(batch["x"])
        placed.append(step.put(batch))
        return placed[-1]

    step = sc.compile(sc.update(optax.sgd(1.5)) @ sc.grad(distance))
    state = step.init({"w": np.zeros(3, np.float32)})
    for one in given:
        sc.run(step, state, sc.Data([{"x": one}], place=place))
    assert [np.shares_memory(one, own) for one, own in zip(given, taken, strict=True)] == [False, False, True, False]
    for number in (0, 1, 3):
        assert taken[number].dtype == np.float32
        assert taken[number].ctypes.data == placed[number]["x"].unsafe_buffer_pointer()


RECORDS = np.zeros(8, [("a", np.int32)])


@pytest.mark.parametrize(
    ("leaf", "why", "run_why"),
    [
        (np.ma.masked_array(np.ones(8), np.arange(8) > 4), "`y` is a masked array", "numpy or jax array, got Masked"),
        (np.ones(8, np.longdouble), "`y` has dtype float128", r"numbers, got \S+\[8\]"),
        (np.array(["a"] * 8, object), "`y` has dtype object", r"numbers, got object\[8\]"),
        (Exported(np.array(["a"] * 8, object)), "`y` has dtype object", r"numbers, got object\[8\]"),
        (RECORDS, "`y` has dtype .*'a'", r"numbers, got void32\[8\]"),
        (np.zeros(8, "M8[s]"), "`y` has dtype datetime64", r"numbers, got datetime64\S*\[8\]"),
        (Tensor(np.ones(8), has_gradient=True), "`y` is a Tensor, and what it exports is no array", "got Tensor"),
    ],
)
def test_batch_that_cannot_be_converted_exactly_is_refused_by_path(leaf: Any, why: str, run_why: str) -> None:
    step = sc.compile(ADAM @ sc.grad(LOSS))
    state, batch = step.init(probe_params()), {**probe_batch(8), "y": leaf}
    for door in (step, step.reference, step.lower):
        with pytest.raises(sc.BatchError, match=why):
            door(state, batch)
    with pytest.raises(sc.DataError, match=f"y +expected .*{run_why}"):
        sc.run(step, state, [batch])
    assert step.traces == 0


def test_pad_batch_of_a_masked_array_is_refused() -> None:
    with pytest.raises(sc.BatchError, match="`y` is a masked array"):
        sc.pad_batch({"y": np.ma.masked_array(np.ones(3), [True, False, True])}, 4)
