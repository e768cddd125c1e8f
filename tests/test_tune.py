"""`sc.tune` and `stepc tune`: every k that divides, what is read of its program, and that nothing is chosen."""

import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from stepc.cli import main


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(rows["x"] @ params["in"]) @ params["out"]) ** 2)


PARAMS = {"in": np.full((8, 64), 0.1, np.float32), "out": np.full((64, 4), 0.1, np.float32)}
BATCH = {"x": np.ones((48, 8), np.float32)}


def step_of(*middle: Any, devices: int = 1) -> sc.Step:
    pipeline = sc.update(optax.adam(1e-3)) @ sc.clip(1.0)
    for one in middle:
        pipeline = pipeline @ one
    return sc.compile(pipeline @ sc.shard(sc.dp("data")) @ sc.grad(loss), mesh=mesh_of(data=devices))


def seconds() -> Iterator[float]:
    """A clock that a look at it moves by a second, so that every sample is one call of a second."""
    return (float(n) for n in count())


@pytest.mark.parametrize("devices", [1, 4])
def test_each_k_that_divides_is_compiled_and_measured(devices: int, caplog: pytest.LogCaptureFixture) -> None:
    step = step_of(sc.accumulate(3), devices=devices)
    state = step.init(PARAMS)
    before = jax.tree.map(np.asarray, state.params)
    tuning = sc.tune(step, state, BATCH, rounds=3, clock=seconds().__next__)
    rows = 48 // devices
    assert [one.k for one in tuning.rows] == [k for k in range(1, rows + 1) if rows % k == 0]
    assert [(one.seconds, one.low, one.high) for one in tuning.rows] == [(1.0, 1.0, 1.0)] * len(tuning.rows)
    for one in (tuning.rows[0], tuning.rows[-1]):
        compiled = step_of(sc.accumulate(one.k), devices=devices).lower(state, BATCH).compile()
        assert (one.temporaries, one.total) == (compiled.memory().temporaries, compiled.memory().total)
        assert one.collectives == sum(row.executions or 0 for row in compiled.collectives())
    jax.tree.map(np.testing.assert_array_equal, state.params, before)  # alive, and not trained
    assert not caplog.records  # nothing was compiled twice
    assert tuning.best == tuning.rows[0] and tuning.as_fast == tuple(one.k for one in tuning.rows[1:])
    assert f"\nthe fastest is k = 1; no slower within the spread: {', '.join(map(str, tuning.as_fast))}" in str(tuning)


def test_programs_take_turns() -> None:
    order: list[str] = []
    clock = seconds()

    def look() -> float:
        order.append("look")
        return next(clock)

    tuning = sc.tune(
        step_of(sc.accumulate(1)), step_of(sc.accumulate(1)).init(PARAMS), BATCH, ks=[1, 2], rounds=4, clock=look
    )
    # Twice around one call of each program to learn how long it takes, and twice around each sample.
    assert len(order) == 2 * 2 + 2 * 4 * 2 and tuning.rounds == 4


def test_what_needs_more_memory_is_not_run() -> None:
    step = step_of(sc.accumulate(1))
    state = step.init(PARAMS)
    totals = {one.k: one.total for one in sc.tune(step, state, BATCH, ks=[1, 4, 16], rounds=1).rows}
    assert totals[1] is not None and totals[4] is not None and totals[4] < totals[1]
    tuning = sc.tune(step, state, BATCH, ks=[1, 4, 16], rounds=1, memory=totals[1] - 1)
    assert [(one.k, one.fits, one.seconds is None) for one in tuning.rows] == [
        (1, False, True), (4, True, False), (16, True, False),
    ]  # fmt: skip
    assert tuning.best is not None and tuning.best.k in (4, 16)
    assert re.search("^1 +- +- .* too large$", str(tuning), flags=re.MULTILINE)
    none = sc.tune(step, state, BATCH, ks=[1], rounds=1, memory=10)
    assert none.best is None and str(none).endswith("\nno k fits within 10 B")


def test_limit_of_the_transform_is_the_limit() -> None:
    step = step_of(sc.accumulate(memory="1 kB"))
    assert sc.tune(step, step.init(PARAMS), BATCH, ks=[1], rounds=1).memory == 1000


def test_shapes_are_filled_and_measured() -> None:
    step = step_of(sc.accumulate(2), devices=2)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (PARAMS, BATCH))
    tuning = sc.tune(step, step.init(shapes[0]), shapes[1], ks=[2], rounds=1)
    assert tuning.best is not None and tuning.best.k == 2


def test_picture_is_written(tmp_path: Path) -> None:
    step = step_of(sc.accumulate(2))
    tuning = sc.tune(step, step.init(PARAMS), BATCH, ks=[1, 2, 4], rounds=2)
    path = tuning.picture(tmp_path / "new" / "k.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def plain() -> sc.Step:
    return step_of()


MISTAKES: dict[str, tuple[type[Exception], Callable[[], Any], str]] = {
    "no accumulate": (
        sc.ConfigError,
        lambda: sc.tune(plain(), plain().init(PARAMS), BATCH),
        "The pipeline has no `accumulate`, whose k `tune` varies.\n\n"
        '  update(optax.adam(1e-3)) @ clip(1.0) @ shard(dp("data")) @ grad(loss)\n\n'
        "  Write `accumulate(1)` left of `shard` and `grad`.",
    ),
    "two of them": (
        sc.ConfigError,
        lambda: sc.tune(step_of(sc.accumulate(2), sc.accumulate(3)), plain().init(PARAMS), BATCH),
        "`accumulate(2)` and `accumulate(3)` each split the batch, and `tune` varies one.\n\n"
        '  update(optax.adam(1e-3)) @ clip(1.0) @ accumulate(2) @ accumulate(3) @ shard(dp("data")) @ grad(loss)',
    ),
    "a k that does not divide": (
        sc.ConfigError,
        lambda: sc.tune(step_of(sc.accumulate(2)), plain().init(PARAMS), BATCH, ks=[2, 5, 7]),
        "These k do not divide the 48 rows of a part.\n\n  divide  1, 2, 3, 4, 6, 8, 12, 16, 24, 48\n  got     5, 7",
    ),
    "no number": (
        sc.FieldTypeError,
        lambda: sc.tune(step_of(sc.accumulate(2)), plain().init(PARAMS), BATCH, rounds=0),
        "`tune(rounds=…)` takes positive integers, got 0.",
    ),
    "a pipeline": (
        sc.FieldTypeError,
        lambda: sc.tune(sc.accumulate(2) @ sc.grad(loss), None, BATCH),  # type: ignore[arg-type]
        "`tune` measures a compiled step.\n\n"
        "  expected  a compiled step\n  got       accumulate(2) @ grad(loss)\n\n"
        "  Compile it: `sc.tune(sc.compile(pipeline), state, batch)`.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_refused_in_these_words(name: str) -> None:
    kind, mistake, text = MISTAKES[name]
    with pytest.raises(kind) as raised:
        mistake()
    assert str(raised.value) == text


TUNED = """
import jax, jax.numpy as jnp, optax
import stepc as sc

def loss(params, rows):
    return jnp.mean((rows["x"] @ params["w"]) ** 2)

def build(mesh):
    step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.accumulate(2) @ sc.shard(sc.dp("data")) @ sc.grad(loss), mesh=mesh)
    shape = jax.ShapeDtypeStruct
    return step, step.init({"w": shape((4, 2), jnp.float32)}), {"x": shape((8, 4), jnp.float32)}

jitted = jax.jit(lambda x: x)
example_args = (jnp.ones(2),)
"""


def test_command_prints_the_table_and_writes_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(jax.devices()) == 8  # jax runs already, and `--mesh` sets no number of devices
    monkeypatch.chdir(tmp_path)
    Path("tuned.py").write_text(TUNED)
    assert main("tune tuned.py:build --mesh data=2 --rounds 2 -k 1,4 -o k.png".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "accumulate(2), 2 rounds" and lines[-1] == "k.png" and Path("k.png").is_file()
    assert [line.split()[0] for line in lines[1:4]] == ["k", "1", "4"]
    assert main("tune tuned.py:build --mesh data=2 --rounds 1 -k 1 --memory 10B".split()) == 1
    assert capsys.readouterr().out.endswith("no k fits within 10 B\n")
    for words, text in (
        ("tuned.py:jitted", "`tuned.py:jitted` is a jitted function; `stepc tune` measures a step of stepc."),
        ("tuned.py:build --mesh data=2 -k two", "Invalid -k.\n\n  expected  numbers, as in 1,2,4\n  got       two"),
    ):
        assert main(["tune", *words.split()]) == 2
        assert capsys.readouterr().err == f"stepc: ConfigError: {text}\n"
