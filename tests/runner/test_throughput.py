"""Speed as metrics: what is counted, what is left out, and that what is not known is not said."""

import time
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc

ROWS, LENGTH = 16, 8


def loss(params: Any, batch: Any) -> jax.Array:
    embedded = params["embed"][batch["tokens"]].mean(axis=1)
    return jnp.mean((embedded @ params["w"]) ** 2)


def batches(num: int, length: int = LENGTH) -> list[dict[str, np.ndarray]]:
    return [{"tokens": np.full((ROWS, length), n % 5, np.int32)} for n in range(num)]


PARAMS = {"embed": np.full((5, 32), 0.1, np.float32), "w": np.full((32, 4), 0.1, np.float32)}


def trained(step: Any, data: Any, meter: Any, **about: Any) -> list[tuple[int, dict[str, float]]]:
    told: list[tuple[int, dict[str, float]]] = []
    logger = SimpleNamespace(log=lambda metrics, number: told.append((number, metrics)))
    sc.run(step, step.init(PARAMS), data, loggers=[meter, logger], log_every=2, **about)
    return told


def seconds() -> Iterator[float]:
    """A clock that a look at it moves by half a second."""
    return (0.5 * n for n in count())


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("k", [1, 4])
def test_speed_is_that_between_two_logged_steps(devices: int, k: int) -> None:
    step = sc.compile(
        sc.update(optax.sgd(0.1)) @ sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss),
        mesh=mesh_of(data=devices),
    )
    meter = sc.Throughput(tokens="tokens", clock=seconds().__next__)
    told = trained(step, batches(5), meter)
    flops = step.lower(step.init(PARAMS), batches(1)[0]).compile().cost().flops
    assert flops is not None and flops > 0
    speeds = [{name: metrics.get(name) for name in meter.reserved if name in metrics} for _, metrics in told]
    once = {"steps_per_second": 2.0, "examples_per_second": 2.0 * ROWS, "tokens_per_second": 2.0 * ROWS * LENGTH}
    expected = [  # steps 1, 2, 4 and 5 are half a second apart; the CPU is in no table, and has no hfu
        {name: times * speed for name, speed in once.items()} | {"teraflops_per_second": times * 2.0 * flops / 1e12}
        for times in (1, 2, 1)
    ]
    assert speeds == [{}, *expected]


def test_steps_of_one_call_share_its_rows() -> None:
    step = sc.compile(sc.repeat(4) @ sc.update(optax.sgd(0.1)) @ sc.grad(loss))
    stacked = [{"tokens": np.zeros((4, ROWS, LENGTH), np.int32)}] * 2
    told = trained(step, stacked, sc.Throughput(tokens="tokens", clock=seconds().__next__))
    (_, last) = told[-1]
    assert last["examples_per_second"] == ROWS * last["steps_per_second"]
    assert last["tokens_per_second"] == ROWS * LENGTH * last["steps_per_second"]


class Chip(NamedTuple):
    """What is read of a device."""

    number: int
    device_kind: str = "NVIDIA H200"


def test_share_of_the_peak_is_that_of_a_known_device() -> None:
    meter = sc.Throughput(model_flops=2e12, clock=seconds().__next__)
    matmul = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    chips = frozenset(map(Chip, range(2)))
    meter.program({"x": np.ones((4, 2))}, matmul, chips, steps_per_call=1, rows_axis=0)
    assert meter.measured(1) == {}
    assert meter.measured(2) == {
        "steps_per_second": 2.0,
        "examples_per_second": 8.0,
        "teraflops_per_second": 2 * 2 * 64**3 / 1e12,
        "hfu": 2 * 2 * 64**3 / 989e12,
        "mfu": 2 * 1e12 / 989e12,
    }


def test_only_steps_are_counted_of_batches_of_several_shapes() -> None:
    step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(loss))
    data = sc.Data([*batches(2), *batches(2, length=4)], signatures="many")
    told = trained(step, data, sc.Throughput(tokens="tokens", clock=seconds().__next__))
    assert [name for name in told[-1][1] if name.endswith("_per_second")] == ["steps_per_second"]


def test_function_of_the_users_own_has_no_flops() -> None:
    def plain(state: Any, batch: Any) -> Any:
        return state, {"loss": jnp.float32(1)}

    told: list[Any] = []
    logger = SimpleNamespace(log=lambda metrics, number: told.append(metrics))
    meter = sc.Throughput(clock=seconds().__next__)
    sc.run(plain, {"w": jnp.ones(2)}, batches(2), loggers=[meter, logger], log_every=1)
    assert told[-1] == {"loss": 1.0, "steps_per_second": 2.0, "examples_per_second": 2.0 * ROWS}


def test_evaluation_does_not_count() -> None:
    def slow(state: Any, batch: Any) -> dict[str, float]:
        time.sleep(0.5)
        return {"loss": 0.0}

    step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(loss))
    told = trained(step, batches(5), sc.Throughput(), eval=sc.Eval(1, slow, batches(1)))
    # With the sleep it would be two steps in a second at most; without it they take milliseconds.
    assert all(metrics["steps_per_second"] > 4 for _, metrics in told if "steps_per_second" in metrics)
    assert sum("steps_per_second" in metrics for _, metrics in told) == 3


def mfu(grads: Any, params: Any) -> Any:
    return {"mfu": jnp.float32(1)}


def plainly() -> sc.Step:
    return sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(loss))


MISTAKES: dict[str, tuple[type[Exception], Any, str]] = {
    "arguments": (
        sc.ConfigError,
        lambda: sc.Throughput(tokens=512, model_flops=-1, clock=3),  # type: ignore[arg-type]
        "Invalid arguments to `Throughput`.\n\n"
        "  tokens       expected the path of a leaf of a batch, or None, got 512\n"
        "  model_flops  expected a positive number or None, got -1\n"
        "  clock        expected a function that gives the time in seconds, got 3",
    ),
    "leaf": (
        sc.BuildError,
        lambda: trained(plainly(), batches(2), sc.Throughput(tokens="token")),
        "Step 1 could not be built: ConfigError: `Throughput(tokens='token')`: the batch has no such leaf.\n\n"
        "  leaves  tokens\n\n  Did you mean 'tokens'?\n\n"
        "  step   1\n  phase  build\n  state  alive, unchanged by the failed step",
    ),
    "metric of the same name": (
        sc.BuildError,
        lambda: trained(
            sc.compile(sc.update(optax.sgd(0.1)) @ sc.measure(mfu) @ sc.grad(loss)), batches(2), sc.Throughput()
        ),
        "Step 1 returns a metric under a name that a logger uses itself.\n\n"
        "  step          1\n  phase         build\n  state         alive, unchanged by the failed step\n"
        "  metric 'mfu'  Throughput writes something else under this name",
    ),
    "the class": (
        sc.FieldTypeError,
        lambda: trained(plainly(), batches(2), sc.Throughput),
        "Invalid arguments to `run`.\n\n  loggers[0]  expected an object with a method log(metrics, step), "
        "got <class 'stepc._runner.throughput.Throughput'>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_refused_in_these_words(name: str) -> None:
    kind, mistake, text = MISTAKES[name]
    with pytest.raises(kind) as raised:
        mistake()
    assert str(raised.value) == text
