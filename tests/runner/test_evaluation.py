"""Evaluation: the numbers are those of the whole set, whatever its batches and the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import stepc as sc

VALUES = np.array([3, 3, 3, 3, 3, 3, 3, 3, 0, 21], np.float32)  # batches of 8 and 2 rows: means 3 and 10.5
UNEVEN = [{"x": VALUES[:8]}, {"x": VALUES[8:]}]


class Logged(list[tuple[int, dict[str, float]]]):
    def log(self, metrics: Any, step: int) -> None:
        if any(name.startswith("eval/") for name in metrics):
            self.append((step, dict(metrics)))


def loss(params: Any, batch: Any) -> Any:
    return sc.Mean(((params - batch["x"]) ** 2).sum(), batch["x"].size)


def step_on(mesh: Mesh | None) -> sc.Step:
    pipeline = sc.update(optax.sgd(0.0)) @ sc.grad(loss)
    return sc.compile(
        pipeline if mesh is None else sc.update(optax.sgd(0.0)) @ sc.shard(sc.dp("data")) @ sc.grad(loss), mesh=mesh
    )


MESHES = [None, 2, 8]


def mesh_of(devices: int | None) -> Mesh | None:
    return None if devices is None else jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])


def evaluated(evaluate: Any, data: Any = UNEVEN, devices: int | None = None) -> dict[str, float]:
    step, logged = step_on(mesh_of(devices)), Logged()
    batch = {"x": np.zeros(8, np.float32)}
    sc.run(step, step.init(jnp.float32(0.0)), [batch] * 2, loggers=[logged], eval=sc.Eval(2, evaluate, data))
    ((at, metrics),) = logged
    assert at == 2
    return metrics


@pytest.mark.parametrize("devices", MESHES)
def test_scalar_is_weighed_by_the_rows_of_its_batch(devices: int | None) -> None:
    assert evaluated(lambda state, batch: {"loss": batch["x"].mean()}, devices=devices) == {"eval/loss": 4.5}


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("is_jitted", [False, True])
def test_terms_are_added_up_over_the_whole_set(devices: int | None, is_jitted: bool) -> None:
    def judge(state: sc.State, batch: Any) -> dict[str, Any]:
        x = jnp.asarray(batch["x"])
        return {
            "loss": sc.Mean((x + state.params).sum(), x.size),
            "two": sc.Mean(x.sum(), x.size) + 2.0 * sc.Mean((x > 10).sum(dtype=jnp.float32), 1),
            "sum": sc.Sum(x.sum()),
            "max": sc.Max(x.max()),
            "min": sc.Min(x.min()),
            "last": sc.Last(x[-1]),
            "none": sc.Mean(jnp.float32(0), 0),
        }

    assert evaluated(jax.jit(judge) if is_jitted else judge, devices=devices) == {
        "eval/loss": 4.5, "eval/two": 4.5 + 2 * 1 / 2, "eval/sum": 45.0, "eval/max": 21.0, "eval/min": 0.0,
        "eval/last": 21.0, "eval/none": 0.0,
    }  # fmt: skip


def test_mean_over_tokens_weighs_tokens_and_not_rows() -> None:
    data = [{"x": np.ones((2, 3), np.float32), "mask": np.array([[1, 1, 1], [1, 0, 0]], np.float32)}] + [
        {"x": np.full((2, 3), 6, np.float32), "mask": np.array([[1, 0, 0], [0, 0, 0]], np.float32)}
    ]
    by_tokens = evaluated(lambda s, b: {"loss": sc.Mean((b["x"] * b["mask"]).sum(), b["mask"].sum())}, data)
    assert by_tokens == {"eval/loss": 2.0}  # (4 * 1 + 1 * 6) / 5


def test_counts_beyond_float32_stay_exact() -> None:
    large = 2**24
    data = [{"x": np.zeros(1)}] * 3
    found = evaluated(lambda s, b: {"n": sc.Sum(large + 1), "m": sc.Max(large + 1)}, data)
    assert found == {"eval/n": 3.0 * (large + 1), "eval/m": large + 1.0}


@pytest.mark.parametrize("devices", MESHES)
def test_short_batch_of_a_step_is_padded_by_its_mask(devices: int | None) -> None:
    def masked(params: Any, batch: Any) -> Any:
        return sc.Mean(((params - batch["x"]) * -batch["mask"]).sum(), batch["mask"].sum())

    pipeline: Any = sc.grad(masked) if devices is None else sc.shard(sc.dp("data")) @ sc.grad(masked)
    judge = sc.compile(sc.update(optax.sgd(0.0)) @ pipeline, mesh=mesh_of(devices))
    data = [{**batch, "mask": np.ones(len(batch["x"]), np.float32)} for batch in UNEVEN]
    logged = Logged()
    sc.run(judge, judge.init(jnp.float32(0.0)), data[:1], loggers=[logged], eval=sc.Eval(1, judge, data))
    assert (logged[0][1]["eval/loss"], judge.traces) == (4.5, 1)


def test_scalar_of_rows_that_are_not_known_is_refused() -> None:
    def graph(nodes: int, edges: int) -> Any:
        return {"nodes": np.ones(nodes, np.float32), "edges": np.ones(edges, np.float32)}

    def mean(state: sc.State, batch: Any) -> Any:
        return {"n": batch["nodes"].sum()}

    assert evaluated(mean, [graph(3, 6)] * 2) == {"eval/n": 3.0}  # batches that are alike weigh the same
    with pytest.raises(sc.StepError) as raised:
        evaluated(mean, [graph(3, 6), graph(1, 2)])
    assert str(raised.value) == (
        "The eval at step 2 failed: ConfigError: The rows by which `n` is weighed are not known: the leaves of the "
        "batch have 2, 1 rows. Return `sc.Mean(total, count)`.\n\n"
        "  step   2\n  phase  eval\n  state  alive, unchanged by the failed step"
    )


class Once:
    """Data that can be read a single time, and does not look like that."""

    def __init__(self, *batches: Any) -> None:
        self.rest = iter(batches)

    def __iter__(self) -> Any:
        return self.rest


def test_empty_evaluation_is_an_error() -> None:
    with pytest.raises(sc.ConfigError, match=r"data  expected at least one batch, got \[\]"):
        sc.Eval(2, lambda state, batch: {}, [])
    step = step_on(None)
    with pytest.raises(sc.StepError, match="The eval at step 4 failed: ConfigError: Its data gave no batch") as raised:
        sc.run(
            step, step.init(jnp.float32(0.0)), [{"x": np.zeros(8, np.float32)}] * 4,
            eval=sc.Eval(2, lambda state, batch: {"x": batch["x"].mean()}, Once(*UNEVEN)),
        )  # fmt: skip
    assert (raised.value.phase, raised.value.step, raised.value.state_ok) == ("eval", 4, True)


@pytest.mark.parametrize(
    ("returned", "got"), [(1.0, "float"), (sc.Mean(1.0, 1), "Mean"), ((1.0, {"accuracy": 1.0}), "tuple of 2")]
)
def test_evaluation_that_returns_no_metrics_is_refused(returned: Any, got: str) -> None:
    with pytest.raises(sc.StepError, match=f"must return a dict of metrics, .* got {got}"):
        evaluated(lambda state, batch: returned)


def test_evaluation_does_not_share_a_name_with_the_step() -> None:
    def own(state: Any, batch: Any) -> Any:
        return state, {"loss": batch["x"].mean(), "eval/loss": batch["x"].max()}

    with pytest.raises(sc.StepError, match="The step has metrics of the same name: 'eval/loss'. Rename one of each."):
        sc.run(own, {"w": jnp.zeros(2)}, UNEVEN[:1], eval=sc.Eval(1, lambda s, b: {"loss": b["x"].mean()}, UNEVEN))


# `sc.evaluate`: the same sums without a run.

ROWS = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
WEIGHTS = {"w": np.float32([1.0, -2.0, 0.5, 3.0])}


def judged(params: Any, batch: Any) -> dict[str, Any]:
    y = batch["x"] @ params["w"]
    return {"mean": y.mean(), "rows": y, "over": sc.Mean(y.sum(), (y > 0).sum()), "max": sc.Max(y.max())}


def in_batches(sizes: list[int]) -> list[dict[str, np.ndarray]]:
    ends = np.cumsum([0, *sizes])
    return [{"x": ROWS[start:end]} for start, end in zip(ends[:-1], ends[1:], strict=True)]


@pytest.mark.parametrize("sizes", [[24], [8, 8, 8], [16, 8], [9, 9, 6], [7, 16, 1]])
@pytest.mark.parametrize("devices", MESHES)
def test_evaluate_gives_the_numbers_of_all_rows(sizes: list[int], devices: int | None) -> None:
    found = sc.evaluate(judged, WEIGHTS, in_batches(sizes), mesh=mesh_of(devices))
    y = ROWS.astype(np.float64) @ WEIGHTS["w"].astype(np.float64)
    expected = {"mean": y.mean(), "rows": y.mean(), "over": y.sum() / (y > 0).sum(), "max": y.max()}
    assert found == pytest.approx(expected, rel=1e-5)  # the products are in float32


def test_evaluate_splits_rows_over_the_axes_that_no_parameter_is_sharded_over() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    sharded = jax.device_put(WEIGHTS["w"], NamedSharding(mesh, PartitionSpec("model")))
    seen: list[Any] = []

    def judge(params: Any, batch: Any) -> Any:
        jax.debug.inspect_array_sharding(batch["x"], callback=lambda sharding: seen.append(sharding))
        return {"mean": (batch["x"] @ params["w"]).mean()}

    found = sc.evaluate(judge, {"w": sharded}, in_batches([16, 8]), mesh=mesh)
    assert found == pytest.approx({"mean": (ROWS @ WEIGHTS["w"]).mean(dtype=np.float64)}, rel=1e-5)
    assert [sharding.shard_shape(shape) for sharding, shape in zip(seen, [(16, 4), (8, 4)], strict=True)] == [
        (4, 4), (2, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda params, batch: batch["x"].mean(), {"loss": 4.5}),
        (lambda params, batch: sc.Mean(batch["x"].sum(), batch["x"].size), {"loss": 4.5}),
        (lambda params, batch: (batch["x"].mean(), {"most": sc.Max(batch["x"].max())}), {"loss": 4.5, "most": 21.0}),
    ],
)
def test_evaluate_takes_a_loss(fn: Any, expected: dict[str, float]) -> None:
    assert sc.evaluate(fn, {}, iter(UNEVEN)) == expected


def test_evaluate_compiles_once_for_each_number_of_rows() -> None:
    traces: list[int] = []

    def judge(params: Any, batch: Any) -> Any:
        traces.append(batch["x"].shape[0])
        return {"mean": batch["x"].mean()}

    for _ in range(2):
        sc.evaluate(judge, WEIGHTS, in_batches([8, 8, 8]))
    sc.evaluate(judge, WEIGHTS, in_batches([8, 8, 6]))
    assert traces == [8, 6]


def test_what_the_function_of_evaluate_raises_passes_through_with_a_note_for_a_state() -> None:
    step = step_on(None)
    with pytest.raises(TypeError) as raised:
        sc.evaluate(judged, step.init(WEIGHTS), in_batches([24]))
    assert any("`sc.evaluate(fn, state.params, data)` gives its parameters." in note for note in raised.value.__notes__)


EVALUATE_MISTAKES: dict[str, tuple[type[Exception], Any, str]] = {
    "arguments": (
        sc.FieldTypeError,
        lambda: sc.evaluate(3, {"w": 1.0, "act": [abs]}, UNEVEN[0], mesh=8),  # type: ignore[arg-type]
        "Invalid arguments to `evaluate`.\n\n"
        "  fn            expected a function of parameters and a batch, got 3\n"
        "  params act/0  expected an array, got <built-in function abs>\n"
        "  data          expected an iterable of batches, got one batch: a dict\n"
        "  mesh          expected a jax.sharding.Mesh or None, got 8\n\n  Put it in a list: `[batch]`.",
    ),
    "a step": (
        sc.FieldTypeError,
        lambda: sc.evaluate(step_on(None), {}, UNEVEN),
        "Invalid arguments to `evaluate`.\n\n  fn  expected a function of parameters and a batch, "
        "got compile(update(optax.sgd(0.0)) @ grad(loss))\n\n"
        "  In a run, `sc.Eval(every, step, data)` evaluates by a step. Here, give the loss.",
    ),
    "no batch": (sc.ConfigError, lambda: sc.evaluate(judged, WEIGHTS, []), "The data of `evaluate` gave no batch."),
    "rows that are not known": (
        sc.ConfigError,
        lambda: sc.evaluate(lambda p, rows: rows["x"].mean(), {}, [{"x": np.ones(2), "y": np.ones(n)} for n in (3, 4)]),
        "The rows by which `loss` is weighed are not known: the leaves of the batch have 2, 4 rows. "
        "Return `sc.Mean(total, count)`.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATE_MISTAKES)
def test_mistake_in_evaluate_is_refused_in_these_words(name: str) -> None:
    kind, mistake, text = EVALUATE_MISTAKES[name]
    with pytest.raises(kind) as raised:
        mistake()
    assert str(raised.value) == text
