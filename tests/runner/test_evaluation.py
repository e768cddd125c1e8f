"""Evaluation: the numbers are those of the whole set, whatever its batches and the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

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
