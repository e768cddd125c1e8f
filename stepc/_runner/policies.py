"""What `run` does about a failure: policies as values, and the counts that bound them. It knows no step and no data."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias, assert_never

from stepc._runner.arguments import ArgumentFaults

RATIO_OVER = 100  # `Skip.ratio` looks at so many of the last steps
EXHAUSTED = "the policy is to raise"


@dataclass(frozen=True)
class Raise:
    """Log the failure, then raise it.

    Meaning: nothing is kept, so nothing is paid; a failure inside the program leaves no state.
    Example:
      >>> Raise()
      Raise()
    """


@dataclass(frozen=True)
class Skip:
    """Leave out what failed, restore the state from before it, and go on.

    Meaning: the run ends with the state of a run without that batch, bit for bit.
    Why: one bad record, or one bad batch, is rarely worth a night of training.

    Args:
      limit: how many failures in a row are skipped; the next one is raised.
      ratio: the largest part of the last 100 steps that may be skipped, between 0 and 1; None for any.
    Errors: ConfigError for a value out of range, FieldTypeError for a wrong type.
    A batch on which the step failed keeps its number; a batch that the data failed to give never had one.
    Example:
      >>> Skip(limit=2, ratio=0.05)
      Skip(limit=2, ratio=0.05)
    """

    limit: int = 10
    ratio: float | None = None

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Skip")
        faults.count("limit", self.limit)
        faults.number("ratio", self.ratio, "a number between 0 and 1, or None", lambda one: 0 < one < 1, optional=True)
        faults.refuse()


@dataclass(frozen=True)
class Retry:
    """Repeat what failed: the read at the same place, or the step from the same state.

    Args:
      times: how often for one failure; then it is raised.
      wait_seconds: the wait before the first retry; it doubles with each further one.
    Errors: ConfigError for a value out of range, FieldTypeError for a wrong type.
    Example:
      >>> Retry(times=2)
      Retry(times=2, wait_seconds=1.0)
    """

    times: int = 3
    wait_seconds: float = 1.0

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Retry")
        faults.count("times", self.times)
        faults.number("wait_seconds", self.wait_seconds, "a non-negative number", lambda one: 0 <= one < math.inf)
        faults.refuse()

    def wait_before(self, attempt: int) -> float:
        """The seconds before an attempt, counted from 1. They double 60 times: a float ends at 2**1024."""
        return self.wait_seconds * 2.0 ** min(attempt - 1, 60)


@dataclass(frozen=True)
class Rollback:
    """Return to the last checkpoint, or without checkpoints to the last snapshot, and go on from there.

    Args:
      limit: how often in one run; then the failure is raised.
      data: "skip" goes on with the batch after the one that failed; "replay" gives the same batches again.
    Errors: ConfigError for a value out of range, FieldTypeError for a wrong type.
    A replay that is not finite at the same step again is raised: it would fail for ever.
    Example:
      >>> Rollback(limit=1)
      Rollback(limit=1, data='skip')
    """

    limit: int = 3
    data: str = "skip"

    def __post_init__(self) -> None:
        faults = ArgumentFaults("Rollback")
        faults.count("limit", self.limit)
        faults.choice("data", self.data, ("skip", "replay"))
        faults.refuse()


Policy: TypeAlias = Raise | Skip | Retry | Rollback
BY_NAME: Mapping[str, Callable[[], Policy]] = {"raise": Raise, "skip": Skip, "retry": Retry, "rollback": Rollback}
# What can be done about each kind of failure. A step that is not finite would be so again if it were repeated; going
# back does not repair a disk; a logger that fails is left alone unless it is to raise.
ALLOWED: Mapping[str, tuple[type, ...]] = {
    "data": (Raise, Skip, Retry),
    "nonfinite": (Raise, Skip, Rollback),
    "device": (Raise, Skip, Retry, Rollback),
    "save": (Raise, Skip),
    "log": (Raise,),
}
GENERAL = ("data", "nonfinite", "device")  # the kinds that a policy without a name governs


def policies_of(on_error: object) -> dict[str, Policy]:
    """A policy for each kind of failure but "log". A policy without a name governs the kinds it can do something about.

    "log" has one only where it is named: without it, a logger that fails does not stop the run.
    """
    match on_error:
        case Mapping():
            named = {kind: _policy_of(wanted) for kind, wanted in on_error.items()}
            return {kind: named.get(kind) or Raise() for kind in ALLOWED if kind != "log" or kind in named}
        case _:
            policy = _policy_of(on_error)
            return {
                kind: policy if policy and kind in GENERAL and isinstance(policy, allowed) else Raise()
                for kind, allowed in ALLOWED.items()
                if kind != "log"
            }


def check_policies(on_error: object, faults: ArgumentFaults) -> None:
    """Add what is wrong with `on_error` to the faults."""
    match on_error:
        case Mapping():
            for kind, wanted in on_error.items():
                _check_policy(kind, wanted, faults)
        case _ if _policy_of(on_error) is None:
            _refuse_policy("on_error", on_error, faults)
        case _:
            pass


def _check_policy(kind: object, wanted: object, faults: ArgumentFaults) -> None:
    policy, name = _policy_of(wanted), f"on_error[{kind!r}]"
    if not isinstance(kind, str) or kind not in ALLOWED:
        faults.wrong_value("on_error", f"the kinds {', '.join(map(repr, ALLOWED))}", kind)
    elif policy is None:
        _refuse_policy(name, wanted, faults)
    elif not isinstance(policy, ALLOWED[kind]):
        faults.wrong_value(name, " or ".join(allowed.__name__ for allowed in ALLOWED[kind]), policy)


def _refuse_policy(name: str, got: object, faults: ArgumentFaults) -> None:
    expected = f"{', '.join(map(repr, BY_NAME))}, or a policy such as sc.Skip(limit=3)"
    (faults.wrong_value if isinstance(got, str) else faults.wrong_type)(name, expected, got)


def _policy_of(asked: object) -> Policy | None:
    match asked:
        case str():
            return BY_NAME[asked]() if asked in BY_NAME else None
        case Raise() | Skip() | Retry() | Rollback():
            return asked
        case _:
            return None


@dataclass
class FailureCounts:
    """How many failures there were, and whether the policies allow one more."""

    policies: Mapping[str, Policy]
    failures: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, set[int]] = field(default_factory=dict)
    attempts: Counter[tuple[str, int]] = field(default_factory=Counter)
    replayed: set[int] = field(default_factory=set)
    rollbacks: int = 0

    def forget_skips_after(self, step: int) -> None:
        """The steps after `step` are made again, so none of them counts as skipped."""
        for kind in ("in the program", "nonfinite", "device"):
            self.skipped[kind] = {one for one in self.skipped.get(kind, set()) if one <= step}

    def refusal(self, kind: str, place: int) -> str | None:
        """Count a failure. Why the policy does not go on, or None if it does.

        Args:
          place: the number of the step; for data, the number of the read.
        """
        self.failures[kind] += 1
        policy = self.policies[kind]
        match policy:
            case Raise():
                return EXHAUSTED
            case Skip():
                places = self.skipped.setdefault(kind, set())
                places.add(place)
                return _excess(policy, places, place)
            case Retry():
                self.attempts[kind, place] += 1
                return f"{policy} is used up" if self.attempts[kind, place] > policy.times else None
            case Rollback():
                if kind == "nonfinite" and policy.data == "replay" and place in self.replayed:
                    return "deterministic: the same step failed twice"
                if self.rollbacks == policy.limit:
                    return f"{policy} is used up"
                self.replayed.add(place)
                self.rollbacks += 1
                return None
            case _:
                assert_never(policy)

    @property
    def num_skipped(self) -> int:
        """How many steps and reads were left out, those that the program itself skipped included."""
        return sum(len(places) for places in self.skipped.values())


def _excess(policy: Skip, places: Collection[int], place: int) -> str | None:
    """Why one more skip is too many. `places` contains `place` already."""
    in_a_row = next(back for back in count(1) if place - back not in places)
    if in_a_row > policy.limit:
        return f"{in_a_row} in a row are more than {policy} allows"
    recent = sum(place - RATIO_OVER < one <= place for one in places)
    if policy.ratio is not None and recent > policy.ratio * RATIO_OVER:
        return f"{recent} of the last {RATIO_OVER} are more than {policy} allows"
    return None
