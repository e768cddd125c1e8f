"""One run under way: steps are dispatched, settled in order, and brought back when a policy says so."""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

import jax

from stepc.errors import DataError, DeviceError, NonFiniteError, StepError
from stepc.runner.agenda import Agenda, passes
from stepc.runner.anchor import Anchor, copy
from stepc.runner.checkpoints import Keeper
from stepc.runner.feed import Broken, End, Feed, Item, data_failure
from stepc.runner.flight import (
    Call,
    Flying,
    Landed,
    changes_of_names,
    check_metrics,
    deleted_leaves,
    failed,
    land,
    not_finite,
)
from stepc.runner.peers import Peers
from stepc.runner.policies import Ledger, Raise, Retry, Rollback, Skip
from stepc.runner.programs import Programs
from stepc.runner.result import Run
from stepc.runner.sameness import seen
from stepc.runner.scribe import Scribe
from stepc.runner.signals import Leave, Signals
from stepc.runner.verdict import Bad, refuse_if_bad
from stepc.runner.watchdog import Watchdog, watchdog_told

KINDS = {DataError: "data", NonFiniteError: "nonfinite", DeviceError: "device"}
EXHAUSTED = "the policy is to raise"


@dataclass
class Training:
    """What `run` puts together: each part has a file of its own, and this is where they meet."""

    call: Call
    run: Run
    feed: Feed
    ledger: Ledger
    scribe: Scribe
    signals: Signals
    agenda: Agenda
    keeper: Keeper | None
    watchdog: Watchdog
    peers: Peers
    steps: int | None
    window: int
    steps_per_call: int
    skip_limit: int | None
    bad: Bad | None
    programs: Programs
    snapshot_every: int | None
    compare_every: int | None
    number: int = 0
    position: Any = None  # Any: where the data stands after the last settled step
    last: Item | None = None  # what that step was given
    flight: deque[Flying] = field(default_factory=deque)
    anchor: Anchor | None = None
    last_checked: Any = None  # Any: the names of the metrics of the last call

    def loop(self) -> None:
        """Until the steps are made, the data ends or a signal came: take a batch, make a step, settle an older one."""
        self.drop_anchor()
        while True:
            found: Item | Broken | End = End()
            try:
                self.peers.at("data", self.number)
                if not self.is_over():
                    found = self.feed.read()
                found = self.peers.agreed(found, self.number, self.feed.source.spec, self.signals)
                match found:
                    case End():
                        self.settle(0)
                        return
                    case Broken():
                        self.settle(0)
                        raise data_failure(found, self.number + 1) from found.error
                    case Item():
                        self.dispatch(found)
                        self.settle(self.window)
                        self.between()
            except Leave:
                continue  # a signal, while a batch was waited for
            except StepError as failure:
                self.recover(failure, found)

    def is_over(self) -> bool:
        """Whether no further step is to be made."""
        return self.signals.is_over() or (self.steps is not None and self.number >= self.steps)

    def dispatch(self, item: Item) -> None:
        """Give a batch to the step. What fails here is this step's, once the older ones have settled."""
        first = self.number + 1
        self.watchdog.beat(self.number)
        watchdog_told(self.watchdog, self.scribe)
        if self.anchor is not None:
            self.anchor.kept.append(item)
        if not item.is_hole:
            try:
                self.programs.prepare(self.number, self.run.state, item.batch)
                state, metrics, watch = self.call(self.run.state, item.batch)
            except Exception as error:  # whatever the step raises: its class says little, its phase says much
                self.settle(0)
                is_alive = not deleted_leaves(self.run.state)
                is_device = self.programs.is_built and isinstance(error, jax.errors.JaxRuntimeError)
                phase = "build" if is_alive and not is_device else "dispatch"
                raise failed(error, phase, first, state_ok=is_alive) from error
            if not isinstance(metrics, dict) or metrics.keys() != self.last_checked:
                check_metrics(metrics, step=first, num_steps=self.steps_per_call)
                if self.last_checked is None:
                    self.programs.note_first(self.run.state, state)
                else:
                    self.scribe.event("metrics_changed", first, names=changes_of_names(self.last_checked, metrics))
                self.last_checked = metrics.keys()
            self.run.state = state
            self.flight.append(Flying(first, item, metrics, watch))
        self.number += self.steps_per_call
        self.programs.note(first)

    def settle(self, most: int) -> None:
        """Wait for the oldest calls until at most `most` are in flight."""
        while len(self.flight) > most:
            flying = self.flight[0]
            landed = land(flying)
            for row in range(self.steps_per_call if landed is not None or self.bad is not None else 0):
                self.judge(flying, landed, row)
            self.flight.popleft()
            self.position, self.last = flying.item.after, flying.item
            self.run.steps = flying.first + self.steps_per_call - 1
            for row in range(self.steps_per_call):
                self.scribe.settled(flying.first + row, flying.metrics, row=row)

    def drain(self) -> None:
        """Wait for what is in flight and tell nobody, up to a step that is not finite and was not skipped."""
        while self.flight:
            landed = land(flying := self.flight[0])
            if landed is not None and not (landed.is_finite | landed.is_skipped).all():
                return
            self.flight.popleft()
            self.position, self.last = flying.item.after, flying.item
            self.run.steps = flying.first + self.steps_per_call - 1

    def judge(self, flying: Flying, landed: Landed | None, row: int) -> None:
        """Refuse a step that is not finite; count one that left the state as it was."""
        step = flying.first + row
        skips = self.ledger.skipped.setdefault("in the program", set())
        if landed is not None and landed.is_skipped[row]:
            if step not in skips:
                skips.add(step)
                self.scribe.event("skipped", step, why="not finite; the state is as it was")
            limit = self.skip_limit
            if limit is not None and all(step - back in skips for back in range(limit)):
                why = f", and so were the {limit - 1} before it: skip_nonfinite allows fewer than {limit} in a row"
                raise not_finite(flying, step, row, state_ok=True, why=why if limit > 1 else "")
        elif landed is not None and not landed.is_finite[row]:
            raise not_finite(flying, step, row, state_ok=False)
        elif self.bad is not None:
            refuse_if_bad(self.bad, flying.metrics, row=row, step=step)

    def between(self) -> None:
        """Do what is due after this step, with everything settled."""
        per = self.steps_per_call
        self.peers.at("between steps", self.number)
        saves = False
        compares = passes(self.compare_every, self.number, per)
        copies = self.anchor is not None and self.number - self.anchor.number >= (self.snapshot_every or 1)
        if self.keeper is not None:
            self.keeper.poll()
            saves = self.keeper.is_due(self.number, steps_per_call=per)
        if saves or copies or compares or self.agenda.is_due(self.number, per):
            self.settle(0)
            if compares:
                self.peers.compare(self.run.state, self.number)
            if copies:
                self.drop_anchor()
            # Before the save: what a run goes on from, has been judged; a process that dies between would lose that.
            self.agenda.act(self.number, per, self.run.state, self.scribe)
            if saves:
                self.save()

    def save(self) -> None:
        """Begin a checkpoint of the settled state, if there is none of this step."""
        spec = self.feed.source.spec
        if self.keeper is not None and self.number > self.keeper.saved:
            rows = {} if spec is None else spec.rows()
            self.keeper.save(
                self.number, self.run.state, self.position, rows, None if self.peers.are_many else seen(self.last)
            )

    def recover(self, failure: StepError, found: Item | Broken | End) -> None:
        """Log a failure; then raise it, or bring back what the policy promised."""
        kind = KINDS.get(type(failure))
        place = failure.step
        if isinstance(found, Broken) and kind == "data":
            # To skip goes on to another read; to read again begins with as many batches given.
            place = found.given if isinstance(self.ledger.policies[kind], Retry) else found.place
        refusal = self.refusal(kind, failure, found, place)
        what = str(failure).partition("\n")[0]
        policy = self.ledger.policies.get(kind or "", Raise())
        self.scribe.event(
            "failure", failure.step, level=logging.ERROR, what=what, phase=failure.phase, policy=policy
        )  # fmt: skip
        if refusal is not None or kind is None:
            if refusal not in (None, EXHAUSTED):
                failure.add_note(f"stepc: {refusal}")
            raise self.peers.raised(failure)
        match policy:
            case Retry():
                wait = float(policy.wait_seconds) * 2 ** (self.ledger.attempts[kind, place] - 1)
                self.signals.wait(wait)
                self.feed.retry(found) if kind == "data" else self.rewind(leave_out=None)
            case Skip():
                self.feed.skip() if kind == "data" else self.rewind(leave_out=failure.step)
            case Rollback():
                self.roll_back(policy, failure.step)
            case Raise():
                raise failure
            case _:
                assert_never(policy)

    def refusal(self, kind: str | None, failure: StepError, found: object, place: int) -> str | None:
        """Why a failure is raised; None if the run goes on."""
        if kind is None:
            self.ledger.failures[failure.phase] += 1
            return EXHAUSTED
        why = self.ledger.refusal(kind, place)
        policy = self.ledger.policies[kind]
        if why is None and kind == "device" and self.peers.are_many:
            return "the other processes are at the same step, and cannot be brought back"
        if why is None and isinstance(found, Broken) and kind == "data":
            why = found.refusal(is_retry=isinstance(policy, Retry))
        if why is None and kind == "nonfinite" and failure.state_ok and isinstance(policy, Skip):
            return "skip_nonfinite has skipped as often as it may"
        return why

    def drop_anchor(self) -> None:
        """Copy the settled state, if a policy needs it, to come back to."""
        if self.snapshot_every is not None:
            first = self.anchor is None
            self.anchor = Anchor(copy(self.run.state), self.number, self.position, self.steps_per_call)
            if first:
                self.scribe.event("snapshots", self.number, level=logging.INFO, price=self.anchor.price())

    def rewind(self, *, leave_out: int | None) -> None:
        """Go back to the anchor, and give again what was given since, but for the step `leave_out`."""
        anchor = self._anchor()
        self._give_again(anchor.replay(leave_out))
        self._stand_at(anchor.state, anchor.number, anchor.after)

    def roll_back(self, policy: Rollback, failed_at: int) -> None:
        """Return to the last checkpoint, or to the anchor, and go on as the policy says."""
        anchor = self._anchor()
        later = anchor.kept[anchor.place_of(failed_at) + 1 :]
        restored = None if self.keeper is None else self.keeper.restore(anchor.state)
        if restored is None:
            self._give_again(later if policy.data == "skip" else anchor.replay(None))
            state, number, after = anchor.state, anchor.number, anchor.after
        else:
            state, number, after = restored.state, restored.number, restored.position
            if policy.data == "skip":
                self._give_again(later)
            else:
                self.feed.go_to(after)
        self.scribe.trim(number)
        self.scribe.event("rollback", failed_at, to=number, data=policy.data)
        self.agenda.go_back(number)
        self.ledger.forget_skips_after(number)
        self._stand_at(state, number, after)

    def _anchor(self) -> Anchor:
        if self.anchor is None:
            raise RuntimeError("a policy that goes on has an anchor")
        return self.anchor

    def _give_again(self, items: Sequence[Item]) -> None:
        """Put these before what is read next."""
        self.feed.again.extendleft(reversed(items))

    def _stand_at(self, state: Any, number: int, after: Any) -> None:  # Any: a state, and where the data stands
        self.flight.clear()
        self.run.state, self.number, self.position, self.last = copy(state), number, after, None
        self.run.steps = number
        self.anchor = Anchor(state, number, after, self.steps_per_call)
