"""What `run` does about a failure: policies as values, and the counts that bound them. It knows no step and no data."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias, assert_never

from stepc.errors import ConfigError

RATIO_OVER = 100  # a ratio is taken over so many steps


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
    """Leave out what failed, with the state as it was before, and go on.

    Meaning: the run ends with the state of a run without that batch, to the last bit.
    Why: one bad record, or one bad batch, is rarely worth a night of training.

    Args:
      limit: how many in a row; one more is raised.
      ratio: how many of the last 100, as a part of them; None for any.
    Errors: ConfigError for a limit that is not a positive integer, or a ratio that is not between 0 and 1.
    A batch that the step failed on keeps its number; a batch that the data failed to give never had one.
    Example:
      >>> Skip(limit=2, ratio=0.05)
      Skip(limit=2, ratio=0.05)
    """

    limit: int = 10
    ratio: float | None = None

    def __post_init__(self) -> None:
        _check_count("Skip", "limit", self.limit)
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio < 1):
            raise _refusal("Skip", "ratio", "a number between 0 and 1, or None", self.ratio)


@dataclass(frozen=True)
class Retry:
    """Do again what failed: read at the same place, or make the same step from the same state.

    Args:
      times: how often for one failure; then it is raised.
      wait_seconds: before the first time; twice as long before each further one.
    Errors: ConfigError for times that are not a positive integer, or a wait that is not a number from 0.
    Example:
      >>> Retry(times=2)
      Retry(times=2, wait_seconds=1.0)
    """

    times: int = 3
    wait_seconds: float = 1.0

    def __post_init__(self) -> None:
        _check_count("Retry", "times", self.times)
        if not (_is_number(self.wait_seconds) and 0 <= self.wait_seconds < math.inf):
            raise _refusal("Retry", "wait_seconds", "a number from 0", self.wait_seconds)


@dataclass(frozen=True)
class Rollback:
    """Return to the last checkpoint, or without checkpoints to the last snapshot, and go on from there.

    Args:
      limit: how often in one run; then the failure is raised.
      data: "skip" goes on with the batch after the one that failed; "replay" gives the same batches again.
    Errors: ConfigError for a limit that is not a positive integer, or data that is neither.
    A replay that fails again at the same step with a number that is not finite is raised: it would fail for ever.
    Example:
      >>> Rollback(limit=1)
      Rollback(limit=1, data='skip')
    """

    limit: int = 3
    data: str = "skip"

    def __post_init__(self) -> None:
        _check_count("Rollback", "limit", self.limit)
        if self.data not in ("skip", "replay"):
            raise _refusal("Rollback", "data", '"skip" or "replay"', self.data)


Policy: TypeAlias = Raise | Skip | Retry | Rollback
BY_NAME: Mapping[str, Callable[[], Policy]] = {"raise": Raise, "skip": Skip, "retry": Retry, "rollback": Rollback}
# What can be done about each kind of failure. A number that is not finite comes again when the step is made again, and
# to go back does not mend a disk.
ALLOWED: Mapping[str, tuple[type, ...]] = {
    "data": (Raise, Skip, Retry),
    "nonfinite": (Raise, Skip, Rollback),
    "device": (Raise, Skip, Retry, Rollback),
    "save": (Raise, Skip),
}
GENERAL = ("data", "nonfinite", "device")  # what a policy without a name governs


def policies_of(on_error: object) -> dict[str, Policy]:
    """A policy for each kind of failure. A plain policy governs those it can do something about."""
    match on_error:
        case Mapping():
            named = {kind: _policy_of(wanted) for kind, wanted in on_error.items()}
            return {kind: named.get(kind) or Raise() for kind in ALLOWED}
        case _:
            plain = _policy_of(on_error)
            return {
                kind: plain if plain and kind in GENERAL and isinstance(plain, can) else Raise()
                for kind, can in ALLOWED.items()
            }


def faults_of(on_error: object) -> list[tuple[str, str]]:
    """What is wrong with what was asked for, as rows of (argument, expected and got)."""
    match on_error:
        case Mapping():
            return [fault for kind, wanted in on_error.items() for fault in _faults(kind, wanted)]
        case _:
            return [] if _policy_of(on_error) else [_fault("on_error", on_error)]


def _faults(kind: object, wanted: object) -> list[tuple[str, str]]:
    policy, name = _policy_of(wanted), f"on_error[{kind!r}]"
    if not isinstance(kind, str) or kind not in ALLOWED:
        return [("on_error", f"expected the kinds {', '.join(map(repr, ALLOWED))}, got {kind!r}")]
    if policy is None:
        return [_fault(name, wanted)]
    if not isinstance(policy, ALLOWED[kind]):
        can = " or ".join(one.__name__ for one in ALLOWED[kind])
        return [(name, f"expected {can}, got {policy!r}")]
    return []


def _policy_of(asked: object) -> Policy | None:
    match asked:
        case str():
            return BY_NAME[asked]() if asked in BY_NAME else None
        case Raise() | Skip() | Retry() | Rollback():
            return asked
        case _:
            return None


def _fault(name: str, got: object) -> tuple[str, str]:
    return name, f"expected {', '.join(map(repr, BY_NAME))}, or a policy such as sc.Skip(limit=3), got {got!r}"


@dataclass
class FailureCounts:
    """How often what happened, and whether a policy allows one more."""

    policies: Mapping[str, Policy]
    failures: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, set[int]] = field(default_factory=dict)
    attempts: Counter[tuple[str, int]] = field(default_factory=Counter)
    replayed: set[int] = field(default_factory=set)
    rollbacks: int = 0

    def forget_skips_after(self, number: int) -> None:
        """Of steps that are made again nothing was skipped yet."""
        for kind in ("in the program", "nonfinite", "device"):
            self.skipped[kind] = {step for step in self.skipped.get(kind, set()) if step <= number}

    def refusal(self, kind: str, place: int) -> str | None:
        """Count a failure; why the policy does not go on, or None if it does.

        Args:
          place: the number of the step, or for data how often a batch was asked for.
        """
        self.failures[kind] += 1
        policy = self.policies[kind]
        match policy:
            case Raise():
                return "the policy is to raise"
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
        """How many steps and reads were left out; in-program skips among them."""
        return sum(len(places) for places in self.skipped.values())


def _excess(policy: Skip, places: Collection[int], place: int) -> str | None:
    """Why one more skip is too many. `places` holds `place` already."""
    in_a_row = next(back for back in count(1) if place - back not in places)
    if in_a_row > policy.limit:
        return f"{in_a_row} in a row are more than {policy} allows"
    recent = sum(place - RATIO_OVER < one <= place for one in places)
    if policy.ratio is not None and recent > policy.ratio * RATIO_OVER:
        return f"{recent} of the last {RATIO_OVER} are more than {policy} allows"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_count(policy: str, field_name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refusal(policy, field_name, "a positive integer", value)


def _refusal(policy: str, field_name: str, expected: str, got: object) -> ConfigError:
    return ConfigError(
        f"`{policy}` cannot have this {field_name!r}.", facts=(("expected", expected), ("got", repr(got)))
    )
