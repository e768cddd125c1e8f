"""What `run` was asked for, refused before anything runs, all faults at once. It does nothing else."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from stepc.errors import ConfigError
from stepc.language.state import leaves_by_path
from stepc.runner.checkpoints import Checkpoints, is_positive
from stepc.runner.digests import digests
from stepc.runner.flight import Watched, steps_per_call_of
from stepc.runner.policies import Policy, Raise, Rollback, faults_of

NOT_ASKED = "`run` cannot do what it was asked for."


def check_arguments(asked: Mapping[str, Any]) -> None:  # Any: it is checked here
    """Refuse arguments that cannot be.

    Errors: ConfigError.
    """
    steps, place, checkpoint, data = (asked[name] for name in ("steps", "place", "checkpoint", "data"))
    faults: list[tuple[str, str, object]] = []
    if not callable(asked["step"]):
        faults.append(("step", "a compiled step", asked["step"]))
    if not isinstance(data, Iterable):
        faults.append(("data", "an iterable of batches", data))
    if steps is not None and not _is_count(steps):
        faults.append(("steps", "a positive integer or None", steps))
    if asked["compare_every"] is not None and not _is_count(asked["compare_every"]):
        faults.append(("compare_every", "a positive integer or None", asked["compare_every"]))
    faults += [
        (name, "a positive integer", asked[name])
        for name in ("log_every", "snapshot_every")
        if not _is_count(asked[name])
    ]
    faults += [
        (name, "an integer from 0", asked[name])
        for name in ("window", "prefetch")
        if not (asked[name] == 0 and type(asked[name]) is int or _is_count(asked[name]))
    ]
    if checkpoint is not None and not isinstance(checkpoint, Checkpoints):
        faults.append(("checkpoint", "sc.Checkpoints(directory, every=…) or None", checkpoint))
    faults += [*_faults_of_watching(asked), *_faults_of_short_batches(asked), *_schedules(asked)]
    if place is not None and not callable(place):
        faults.append(("place", "a function of a batch, or None", place))
    facts = [(name, f"expected {expected}, got {got!r}") for name, expected, got in faults]
    facts += faults_of(asked["on_error"])
    if facts:
        raise ConfigError(NOT_ASKED, facts=facts)
    _check_debugging(asked["step"])


def _faults_of_watching(asked: Mapping[str, Any]) -> list[tuple[str, str, object]]:  # Any: it is checked here
    faults: list[tuple[str, str, object]] = []
    if asked["bad"] is not None and not callable(asked["bad"]):
        faults.append(("bad", "a function of metrics, or None", asked["bad"]))
    most = asked["max_recompiles"]
    if most is not None and not (most == 0 and type(most) is int or _is_count(most)):
        faults.append(("max_recompiles", "an integer from 0, or None", most))
    waits = {name: asked[name] for name in ("watchdog_seconds", "exit_seconds", "data_seconds")}
    odd = [name for name, seconds in waits.items() if seconds is not None and not is_positive(seconds)]
    faults += [(name, "a positive number or None", waits[name]) for name in odd]
    watchdog, end = waits["watchdog_seconds"], waits["exit_seconds"]
    if end is not None and not {"watchdog_seconds", "exit_seconds"} & set(odd) and not (watchdog and watchdog < end):
        faults.append(("exit_seconds", f"more than watchdog_seconds={watchdog!r}, which comes first", end))
    if waits["data_seconds"] is not None and asked["prefetch"] == 0:
        faults.append(("prefetch", "1 or more with data_seconds: only a thread's read can be left", 0))
    return faults


def _faults_of_short_batches(asked: Mapping[str, Any]) -> list[tuple[str, str, object]]:  # Any: it is checked here
    faults: list[tuple[str, str, object]] = []
    if asked["short_batches"] not in ("raise", "drop", "pad"):
        faults.append(("short_batches", '"raise", "drop" or "pad"', asked["short_batches"]))
    if asked["short_batches"] == "pad" and steps_per_call_of(asked["step"]) > 1:
        faults.append(("short_batches", '"raise" or "drop" for a step that repeats', "pad"))
    return faults


def _check_debugging(step: object) -> None:
    """jax makes a step again, operation by operation, when it finds NaN; the state was donated to the first time."""
    on = [name for name in ("jax_debug_nans", "jax_debug_infs") if getattr(jax.config, name)]  # as contexts set them
    if isinstance(step, Watched) and on:
        raise ConfigError(
            f"A step that its state is donated to cannot run with {' and '.join(on)}.",
            facts=(("expected", "off"), ("got", "on")),
            suggestion="Switch them off: `run` names the step, microbatch and leaf. Or run `step.meaning`.",
        )


def _schedules(asked: Mapping[str, Any]) -> list[tuple[str, str, object]]:
    faults: list[tuple[str, str, object]] = []
    match asked["eval"]:
        case None:
            pass
        case (every, judge, data) if _is_count(every) and callable(judge) and isinstance(data, Iterable):
            if iter(data) is data:
                faults.append(("eval", "data that can be gone through again, such as a list", data))
        case other:
            faults.append(("eval", "(every, judge, data)", other))
    match asked["profile"]:
        case None:
            pass
        case (start, stop, _) if _is_count(start) and _is_count(stop) and start <= stop:
            pass
        case other:
            faults.append(("profile", "(start, stop, directory)", other))
    for hook in asked["hooks"]:
        match hook:
            case (every, function) if _is_count(every) and callable(function):
                pass
            case other:
                faults.append(("hooks", "pairs (every, function)", other))
    return faults


def check_state(state: object) -> None:
    """Refuse a state that holds anything but living arrays.

    Errors: ConfigError with each path.
    """
    odd, dead = [], []
    for path, leaf in leaves_by_path(state):
        if not isinstance(leaf, jax.Array):
            odd.append((path or "state", f"expected a jax array, got {type(leaf).__name__}"))
        elif leaf.is_deleted():
            dead.append((path, "deleted"))
    if odd or not jax.tree.leaves(state):
        facts = odd or [("state", "expected arrays, got none")]
        raise ConfigError("This is not a state.", facts=facts, suggestion="`step.init(params)` makes one.")
    if dead:
        raise ConfigError(
            "This state was donated to an earlier step or run: its arrays are deleted.",
            facts=dead[:5],
            suggestion="Use the state that was returned: `run = sc.run(…)`, then `run.state`.",
        )


def told_of(asked: Mapping[str, Any], policies: Mapping[str, Policy]) -> dict[str, str]:  # Any: as above
    """What must be the same on all processes of a run, each in a line."""
    same = ("step", "steps", "checkpoint", "window", "snapshot_every", "compare_every", "watchdog_seconds")
    every = [None if asked["eval"] is None else asked["eval"][0], [hook[0] for hook in asked["hooks"]]]
    return {name: repr(asked[name]) for name in same} | {"on_error": repr(policies), "eval and hooks": repr(every)}


def told_of_state(state: Any, number: int) -> dict[str, str]:  # Any: a state
    """The same of a state, with the digest of each leaf that is whole on every device."""
    found = digests(state)
    return {"step": str(number)} | {
        path: f"{leaf.dtype}{list(leaf.shape)} digest {found.get(path, 'none')}" for path, leaf in leaves_by_path(state)
    }


def check_replay(policies: Mapping[str, Policy], checkpoint: Checkpoints | None, *, is_positioned: bool) -> None:
    """Refuse a promise to give batches again that the data cannot keep.

    Errors: ConfigError.
    """
    if checkpoint is None or is_positioned:
        return
    remedy = "Give an iterator with `get_state()` and `set_state(state)`"
    if checkpoint.exact_resume:
        facts = [("exact_resume", "a run that goes on begins where the data stood, and this data cannot say that")]
        raise ConfigError(NOT_ASKED, facts=facts, suggestion=f"{remedy}, such as those of Grain.")
    facts = [
        (f"on_error[{kind!r}]", f"{policy!r} returns to a checkpoint, and the data cannot")
        for kind, policy in policies.items()
        if isinstance(policy, Rollback) and policy.data == "replay"
    ]
    if facts:
        raise ConfigError(NOT_ASKED, facts=facts, suggestion=f'{remedy}, or say Rollback(data="skip").')


def goes_back(policies: Mapping[str, Policy]) -> bool:
    """Whether a policy promises to go on from a failure that takes the state."""
    return any(not isinstance(policy, Raise) for kind, policy in policies.items() if kind in ("nonfinite", "device"))


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1
