"""A run that a hook or an evaluation ends; the checkpoint with the best value."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.plan import FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, fresh, step

import stepc as sc


def test_hook_that_returns_a_stop_ends_the_run(tmp_path: Path) -> None:
    def enough(number: int, metrics: Any, snapshot: Any) -> sc.Stop | None:
        return sc.Stop("the loss no longer falls") if number == 6 else None

    logger, batches = Remembering(), FaultPlan().batches(20)
    run = sc.run(
        step(), fresh(), sc.Data(batches, prefetch=2), hooks=[(2, enough), (3, lambda *about: None)], loggers=[logger],
        checkpoint=sc.Checkpoints(tmp_path, every=100),
    )  # fmt: skip
    assert (run.ended, run.why, run.steps, batches.given) == ("stopped", "the loss no longer falls", 6, 6)
    assert digest(run.state) == digest(by_a_plain_loop([1, 2, 3, 4, 5, 6]))
    assert [(facts, at) for name, facts, at in logger.events if name == "stopped"] == [({"why": run.why}, 6)]
    assert (tmp_path / "6").is_dir() and logger.told[-1][0] == 6


def judged(values: Sequence[float]) -> Any:
    """`evaluate` that gives these numbers, one for each evaluation."""
    left = iter(values)
    return lambda state, batch: {"loss": next(left)}


def test_evaluation_that_returns_a_stop_ends_the_run() -> None:
    logger = Remembering()

    def evaluate(state: sc.State, batch: Any) -> Any:
        return sc.Stop("enough") if int(state.step) == 4 else {"loss": state.params["w"].sum()}

    run = sc.run(step(), fresh(), FaultPlan().batches(20), eval=sc.Eval(2, evaluate, [batch_of(1)]), loggers=[logger])
    assert (run.ended, run.why, run.steps) == ("stopped", "enough", 4)
    assert [at for at, metrics in logger.told if "eval/loss" in metrics] == [2]


def test_hook_sees_the_evaluation_of_its_step_and_no_older_one() -> None:
    seen: list[tuple[int, Any]] = []
    sc.run(
        step(), fresh(), FaultPlan().batches(5), eval=sc.Eval(2, judged([1.5, 2.5]), [batch_of(1)]),
        hooks=[(1, lambda number, metrics, snapshot: seen.append((number, metrics.get("eval/loss"))))],
    )  # fmt: skip
    assert seen == [(1, None), (2, 1.5), (3, None), (4, 2.5), (5, None)]


@pytest.mark.parametrize("why", ["", 3])
def test_stop_needs_a_reason(why: Any) -> None:
    with pytest.raises((sc.ConfigError, sc.FieldTypeError), match="why  expected a"):
        sc.Stop(why)


def steps_of(folder: Path) -> list[int]:
    return sorted(int(one.name) for one in folder.iterdir() if one.name.isdecimal())


NAN = float("nan")


@pytest.mark.parametrize(
    ("mode", "values", "kept"),
    [
        ("min", [3.0, 1.0, 2.0, 4.0, 5.0], [4, 10]),
        ("max", [3.0, 1.0, 2.0, 4.0, 2.0], [8, 10]),
        ("min", [NAN, 2.0, NAN, 2.0, 3.0], [4, 10]),
        ("min", [5.0, 4.0, 3.0, 2.0, 1.0], [10]),
        ("min", [NAN] * 5, [10]),
    ],
)
def test_best_checkpoint_is_kept(mode: str, values: list[float], kept: list[int], tmp_path: Path) -> None:
    logger = Remembering()
    sc.run(
        step(), fresh(), FaultPlan().batches(10), eval=sc.Eval(2, judged(values), [batch_of(1)]), loggers=[logger],
        checkpoint=sc.Checkpoints(tmp_path, every=5, keep=1, best=("eval/loss", mode)),
    )  # fmt: skip
    assert steps_of(tmp_path) == kept
    best = [at for name, facts, at in logger.events if name == "checkpoint" and "best" in facts]
    assert best[-1:] == ([] if np.isnan(values).all() else kept[:1])


def test_best_checkpoint_is_known_after_a_resume(tmp_path: Path) -> None:
    keep = sc.Checkpoints(tmp_path, every=100, keep=1, best=("eval/loss", "min"))
    for values, steps in (([1.0, 2.0], 4), ([3.0, 1.5], 8)):
        sc.run(
            step(), fresh(), FaultPlan().batches(20), steps=steps, checkpoint=keep,
            eval=sc.Eval(2, judged(values), [batch_of(1)]),
        )  # fmt: skip
    assert steps_of(tmp_path) == [2, 8]
    assert digest(sc.restore(tmp_path, like=fresh(), step=2)) == digest(by_a_plain_loop([1, 2]))


def test_metric_of_a_step_decides_among_the_checkpoints(tmp_path: Path) -> None:
    logger = Remembering()
    sc.run(
        step(), fresh(), FaultPlan().batches(12), loggers=[logger], log_every=1,
        checkpoint=sc.Checkpoints(tmp_path, every=3, keep=1, best=("loss", "max")),
    )  # fmt: skip
    losses = {at: metrics["loss"] for at, metrics in logger.told if at % 3 == 0}
    assert steps_of(tmp_path) == sorted({max(losses, key=lambda at: losses[at]), 12})


def test_metrics_of_another_step_are_not_saved(tmp_path: Path) -> None:
    def fails(metrics: Any) -> None:
        raise ValueError("no verdict")

    with pytest.raises(sc.StepError, match="`reject_if` failed at step 1"):
        sc.run(step(), fresh(), FaultPlan().batches(9), reject_if=fails, checkpoint=sc.Checkpoints(tmp_path, every=100))
    assert metrics_in(tmp_path / "3") == {}  # the steps in flight are finished, and neither judged nor logged
    run = sc.run(step(), fresh(), FaultPlan().batches(9), checkpoint=sc.Checkpoints(tmp_path, every=100))
    assert metrics_in(tmp_path / "9") == run.metrics


def metrics_in(folder: Path) -> dict[str, float]:
    return json.loads(json.loads((folder / "meta" / "metadata").read_text())["body"])["metrics"]


@pytest.mark.parametrize("best", ["eval/loss", ("eval/loss", "least"), ("loss",), (1, "min")])
def test_best_that_is_no_pair_is_refused(best: Any, tmp_path: Path) -> None:
    with pytest.raises(sc.FieldTypeError, match=r'best  expected a pair such as \("eval/loss", "min"\), or None'):
        sc.Checkpoints(tmp_path, every=1, best=best)
