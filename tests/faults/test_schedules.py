"""Random schedules of faults against a model of the policies: which batches make up the final state."""

from dataclasses import dataclass, field

import pytest
from faults.plan import FaultPlan, by_a_plain_loop, digest, fresh
from hypothesis import given, settings
from hypothesis import strategies as st

import stepc as sc

fault = pytest.mark.fault
NUM = 10
POLICIES = {
    "nonfinite": [sc.Raise(), sc.Skip(limit=2), sc.Rollback(limit=2), sc.Rollback(limit=2, data="replay")],
    "device": [
        sc.Raise(),
        sc.Skip(limit=2),
        sc.Retry(2, wait_seconds=0.0),
        sc.Rollback(limit=2),
        sc.Rollback(limit=2, data="replay"),
    ],
    "data": [sc.Raise(), sc.Skip(limit=2), sc.Retry(2, wait_seconds=0.0)],
}
KIND = {
    "nan": "nonfinite",
    **dict.fromkeys(("device", "device_always", "callback", "callback_always"), "device"),
    **dict.fromkeys(("read", "read_always"), "data"),
}
ON_DEVICE = ("nan", *(kind for kind in KIND if KIND[kind] == "device"))


@dataclass
class Model:
    """What `run` promises, with no arrays: numbers of batches go in, and those that were trained on come out."""

    faults: dict[int, str]
    policies: dict[str, object]
    every: int
    happened: dict[int, int] = field(default_factory=dict)
    rollbacks: int = 0
    skips: dict[str, set[int]] = field(default_factory=dict)
    tries: dict[tuple[str, int], int] = field(default_factory=dict)
    replayed: set[int] = field(default_factory=set)

    def run(self) -> tuple[list[int], str | None]:
        """The batches in the final state, and the kind of failure that was raised, if one was."""
        done: list[int] = []
        snapshot, kept, queue, number, reads = (0, []), [], list(range(1, NUM + 1)), 0, 0
        fresh_from, given_count = 1, 0
        while queue:
            batch = queue[0]
            is_fresh = batch >= fresh_from
            reads += is_fresh
            if is_fresh and self.fails(batch, ("read", "read_always")):
                if self.refuses("data", given_count if isinstance(self.policies["data"], sc.Retry) else reads):
                    return done, "data"
                continue
            given_count += is_fresh
            fresh_from = max(fresh_from, batch + 1)
            queue.pop(0)
            kept.append(batch)
            number += 1
            kind = None if batch < 0 else self.kind_of(batch)
            if kind is None:
                done = done if batch < 0 else [*done, batch]
                if number - snapshot[0] >= self.every:
                    snapshot, kept = (number, done), []
                continue
            if self.refuses(kind, number):
                return done, kind
            match self.policies[kind]:
                case sc.Skip():
                    queue = [*kept[:-1], -batch, *queue]
                case sc.Rollback(data="skip"):
                    self.skips = {name: {n for n in at if n <= snapshot[0]} if name != "data" else at
                                  for name, at in self.skips.items()}  # fmt: skip
                case _:
                    queue = [*kept, *queue]
            (number, done), kept = snapshot, []
        return done, None

    def fails(self, batch: int, kinds: tuple[str, ...]) -> bool:
        kind = self.faults.get(batch)
        if kind not in kinds:
            return False
        self.happened[batch] = self.happened.get(batch, 0) + 1
        return kind.endswith("always") or kind == "nan" or self.happened[batch] == 1

    def kind_of(self, batch: int) -> str | None:
        return KIND[self.faults[batch]] if self.fails(batch, ON_DEVICE) else None

    def refuses(self, kind: str, place: int) -> bool:
        match self.policies[kind]:
            case sc.Skip(limit=limit):
                at = self.skips.setdefault(kind, set())
                at.add(place)
                return all(place - back in at for back in range(limit + 1))
            case sc.Retry(times=times):
                self.tries[kind, place] = self.tries.get((kind, place), 0) + 1
                return self.tries[kind, place] > times
            case sc.Rollback(limit=limit, data=data):
                if self.rollbacks == limit or kind == "nonfinite" and data == "replay" and place in self.replayed:
                    return True
                self.replayed.add(place)
                self.rollbacks += 1
                return False
            case _:
                return True


schedules = st.dictionaries(st.integers(1, NUM), st.sampled_from(sorted(KIND)), max_size=5)
policies = st.fixed_dictionaries({kind: st.sampled_from(choices) for kind, choices in POLICIES.items()})


def agrees(faults: dict[int, str], policies: dict[str, object], window: int, every: int) -> None:
    if window:  # a fault that comes once may come to a step in flight behind another, and is then never seen
        faults = {at: f"{kind}_always" if kind in ("device", "callback") else kind for at, kind in faults.items()}
    expected, raised = Model(faults, policies, every).run()
    plan = FaultPlan(faults)
    try:
        run = sc.run(plan, fresh(), plan.batches(NUM), on_error=policies, buffers=sc.Buffers(window, every))  # pyright: ignore
        got = None
    except sc.StepError as error:
        got = {"DataError": "data", "NonFiniteError": "nonfinite", "DeviceError": "device"}[type(error).__name__]
        run = error.run
        if not error.state_ok:
            assert got == raised
            return
    assert isinstance(run, sc.Run)
    assert got == raised
    assert digest(run.state) == digest(by_a_plain_loop(expected))


@fault(
    "44",
    "60 random schedules of NaN, late faults, callbacks that raise and failed reads × policies",
    "as a pure model says, bitwise",
)
@settings(max_examples=60)
@given(schedules, policies, st.sampled_from([0, 1, 2, 5]), st.sampled_from([1, 3, 10]))
def test_random_schedule_ends_as_the_model_says(faults: dict, policies: dict, window: int, every: int) -> None:
    agrees(faults, policies, window, every)


@pytest.mark.long
@fault("44", "500 random schedules of the same", "as a pure model says, bitwise")
@settings(max_examples=500)
@given(schedules, policies, st.sampled_from([0, 1, 2, 5]), st.sampled_from([1, 3, 10]))
def test_many_random_schedules_end_as_the_model_says(faults: dict, policies: dict, window: int, every: int) -> None:
    agrees(faults, policies, window, every)
