"""A run that a hook, an evaluation or early stopping ends; the checkpoint with the best value."""

import json
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.plan import FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, fresh, step
from rich.console import Console as Terminal

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


def test_what_is_deleted_and_kept_is_said(tmp_path: Path) -> None:
    logger = Remembering()
    sc.run(
        step(), fresh(), FaultPlan().batches(8), loggers=[logger],
        eval=sc.Eval(2, judged([3.0, 1.0, 2.0, 2.0]), [batch_of(1)]),
        checkpoint=sc.Checkpoints(tmp_path, every=2, keep=1, best=("eval/loss", "min")),
    )  # fmt: skip
    assert [(at, facts) for name, facts, at in logger.events if name == "checkpoint"] == [
        (2, {"best": "3.0"}),
        (4, {"best": "1.0", "deleted": "2", "kept": "4"}),
        (6, {}),
        (8, {"deleted": "6", "kept": "4, 8"}),
    ]


def early(values: Sequence[float], patience: int, mode: str = "min", **about: Any) -> sc.Eval:
    return sc.Eval(
        2, judged(values), [batch_of(1)], stop=sc.EarlyStopping("eval/loss", mode, patience=patience, **about)
    )


@pytest.mark.parametrize(
    ("values", "mode", "patience", "min_delta", "steps", "best"),
    [
        ([3.0, 2.0, 2.0, 2.5], "min", 2, 0.0, 8, (4, 2.0)),
        ([3.0, 2.0, 2.5, 1.0, 1.5, 1.5], "min", 2, 0.0, 12, (8, 1.0)),
        ([3.0, 4.0, 2.0, 1.0, 4.0], "max", 3, 0.0, 10, (4, 4.0)),
        ([3.0, 2.9, 2.8], "min", 2, 0.5, 6, (2, 3.0)),
        ([NAN, 3.0, NAN, NAN], "min", 2, 0.0, 8, (4, 3.0)),
    ],
)
def test_early_stopping_counts_evaluations_that_are_no_better(
    values: list[float], mode: str, patience: int, min_delta: float, steps: int, best: tuple[int, float]
) -> None:
    evaluation = early(values, patience, mode, min_delta=min_delta)
    run = sc.run(step(), fresh(), FaultPlan().batches(30), eval=evaluation)
    assert (run.ended, run.steps, run.best) == ("stopped", steps, {"eval/loss": best})
    assert run.why == f"eval/loss is no better for {patience} evaluations: best {best[1]:g} at step {best[0]}"


def test_early_stopping_without_a_finite_evaluation_ends_too() -> None:
    run = sc.run(step(), fresh(), FaultPlan().batches(30), eval=early([NAN, NAN], 2))
    assert (run.steps, run.best) == (4, {})
    assert run.why == "eval/loss is no better for 2 evaluations: no evaluation was finite"


def test_early_stopping_goes_on_counting_in_a_run_that_resumes(tmp_path: Path) -> None:
    keep = sc.Checkpoints(tmp_path, every=100)

    def trained(values: Sequence[float], patience: int, steps: int | None = None) -> sc.Run[Any]:
        return sc.run(
            step(), fresh(), FaultPlan().batches(30), steps=steps, checkpoint=keep, eval=early(values, patience)
        )

    assert trained([1.0, 2.0], 3, steps=4).ended == "steps"
    run = trained([2.0, 1.5], 3)
    assert (run.ended, run.steps, run.best) == ("stopped", 8, {"eval/loss": (2, 1.0)})
    again = trained([], 3)  # the same command makes no further step
    assert (again.ended, again.steps, again.why) == ("stopped", 8, run.why)
    more = trained([0.5, 2.0, 2.0, 2.0, 2.0], 4)  # with more patience it goes on
    assert (more.ended, more.steps, more.best) == ("stopped", 18, {"eval/loss": (10, 0.5)})


def test_early_stopping_forgets_what_a_rollback_evaluates_again() -> None:
    plan = FaultPlan({5: "flip"})  # after the evaluations of steps 2 and 4; it goes back to step 0
    run = sc.run(
        plan, fresh(), plan.batches(8), on_error=sc.Rollback(data="replay"),
        eval=early([1.0, 2.0, 3.0, 2.5, 2.0, 1.5], 2),
    )  # fmt: skip
    assert (run.rollbacks, run.ended, run.best) == (1, "data", {"eval/loss": (8, 1.5)})


def test_console_shows_the_evaluation_and_the_best() -> None:
    text = StringIO()
    console = sc.Console(terminal=Terminal(file=text, width=200))
    sc.run(step(), fresh(), FaultPlan().batches(6), loggers=[console], eval=early([2.0, 1.0, 3.0], 2))
    lines = [line for line in text.getvalue().splitlines() if "eval/loss" in line]
    assert lines == [
        "step 2  eval/loss 2.0000 (best)",
        "step 4  eval/loss 1.0000 (best)",
        "step 6  eval/loss 3.0000 (best 1.0000 at step 4)",
    ]


def run_with(**about: Any) -> sc.Run[Any]:
    return sc.run(step(), fresh(), FaultPlan().batches(9), **about)


def stopping(*words: Any, **about: Any) -> sc.Eval:
    return sc.Eval(2, judged([1.0, 2.0]), [batch_of(1)], stop=sc.EarlyStopping(*words, **about))


MISTAKES: dict[str, tuple[type[Exception], Callable[[Path], Any], str]] = {
    "fields": (
        sc.ConfigError,
        lambda folder: sc.EarlyStopping("loss", "least", patience=0, min_delta=-1),
        "Invalid arguments to `EarlyStopping`.\n\n"
        '  mode       expected "min" or "max", got \'least\'\n'
        "  patience   expected a positive integer, got 0\n"
        "  min_delta  expected a number that is not negative, got -1",
    ),
    "stop of another kind": (
        sc.FieldTypeError,
        lambda folder: sc.Eval(2, judged([]), [batch_of(1)], stop=3),  # type: ignore[arg-type]
        "Invalid arguments to `Eval`.\n\n  stop  expected sc.EarlyStopping(metric, mode, …) or None, got 3",
    ),
    "as a hook": (
        sc.FieldTypeError,
        lambda folder: run_with(hooks=[sc.EarlyStopping("eval/loss", "min", patience=2)]),
        "Invalid arguments to `run`.\n\n  hooks[0]  expected a pair (every, hook), "
        "got EarlyStopping(metric='eval/loss', mode='min', patience=2, min_delta=0.0)\n\n"
        "  Write `eval=sc.Eval(every, evaluate, data, stop=sc.EarlyStopping(…))`.",
    ),
    "metric that the evaluation has not": (
        sc.StepError,
        lambda folder: run_with(eval=stopping("loss", "min", patience=2)),
        "The eval at step 2 failed: ConfigError: There is no metric 'loss', by which `EarlyStopping` decides.\n\n"
        "  given  'eval/loss'\n\n  Did you mean 'eval/loss'?\n\n"
        "  step   2\n  phase  eval\n  state  alive, unchanged by the failed step",
    ),
    "best of an evaluation that there is not": (
        sc.ConfigError,
        lambda folder: run_with(checkpoint=sc.Checkpoints(folder, every=3, best=("eval/loss", "min"))),
        "Invalid arguments to `run`.\n\n"
        "  eval  expected an evaluation, by which `Checkpoints(best=('eval/loss', 'min'))` decides, got None",
    ),
    "best of a metric that no step has": (
        sc.BuildError,
        lambda folder: run_with(checkpoint=sc.Checkpoints(folder, every=3, best=("lss", "min"))),
        "Step 1 returns no metric 'lss', by which `Checkpoints(best=…)` decides.\n\n"
        "  step     1\n  phase    build\n  state    alive, unchanged by the failed step\n  metrics  grad_norm, loss\n\n"
        "  Did you mean 'loss'?",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_refused_in_these_words(name: str, tmp_path: Path) -> None:
    kind, mistake, text = MISTAKES[name]
    with pytest.raises(kind) as raised:
        mistake(tmp_path)
    assert str(raised.value) == text
