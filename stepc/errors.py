"""The errors that stepc raises, and the form of their messages.

    StepcError                    has .suggestion; each class below is also the builtin that it resembles
    ├── PipelineTypeError         TypeError          two neighbours of `@` do not meet
    ├── FieldTypeError            TypeError          a transform was given a field of the wrong type
    ├── FieldValueError           ValueError         a transform was given a field of the wrong value
    ├── ConfigError               ValueError         compile, init or run was asked for something impossible
    ├── LossError                 ValueError         a loss does not return what a loss returns
    ├── BatchError                ValueError         a batch cannot be split as the pipeline asks
    ├── ShardingError             ValueError         the pipeline and the mesh do not fit
    ├── EquivalenceError          AssertionError     a compiled step and its reference differ
    ├── BudgetError               AssertionError     a program does not keep what was promised of it
    ├── StepError                 RuntimeError       a step failed while `run` was running it
    │   ├── DataError                                the data failed
    │   ├── BuildError                               the step could not be traced or compiled
    │   ├── NonFiniteError                           a loss or a gradient is not finite
    │   └── DeviceError                              the program failed while it ran
    ├── CheckpointError           OSError            a checkpoint cannot be written, or the one asked for not read
    ├── ResumeError               ValueError         what was saved does not fit what is to go on
    ├── PeerError                 ConnectionError    another process of the same job failed, or is gone
    ├── Interrupted               KeyboardInterrupt  Ctrl-C, at a step boundary, with a live state
    └── Preempted                 SystemExit         SIGTERM, at a step boundary; exit code 143

`StepcError` itself is a `BaseException`, so that `except Exception` takes what resembles an `Exception`
and leaves `Interrupted` and `Preempted` alone, as Python does with its own.
"""

import difflib
from collections.abc import Iterable, Sequence

# Facts are rows of (label, value); they are printed aligned.
Facts = Sequence[tuple[str, str]]


class StepcError(BaseException):
    """The root of every error that stepc raises.

    Args:
      what: what is wrong, in the user's transforms; one sentence.
      where: the piece of the user's source it is about, with a caret if that helps.
      facts: aligned rows, (label, value).
      suggestion: what to write instead, only if it is certain.
    """

    def __init__(self, what: str, *, where: str = "", facts: Facts = (), suggestion: str | None = None) -> None:
        self.suggestion = suggestion
        parts = (what, _indented(where), _indented(_aligned(facts)), suggestion and _indented(suggestion))
        super().__init__("\n\n".join(part for part in parts if part))


class PipelineTypeError(StepcError, TypeError):
    """Two neighbours of `@` do not meet."""


class FieldTypeError(StepcError, TypeError):
    """A transform was given a field of the wrong type."""


class FieldValueError(StepcError, ValueError):
    """A transform was given a field of the right type and the wrong value."""


class ConfigError(StepcError, ValueError):
    """`compile`, `init`, a step or `run` was asked for something that cannot be."""


class LossError(StepcError, ValueError):
    """A loss does not return what a loss returns."""


class BatchError(StepcError, ValueError):
    """A batch cannot be split as the pipeline asks."""


class ShardingError(StepcError, ValueError):
    """The pipeline names mesh axes that the mesh does not have, or names one twice."""


class EquivalenceError(StepcError, AssertionError):
    """A compiled step and its reference give different results."""


class BudgetError(StepcError, AssertionError):
    """A compiled program does not keep what was promised of it. `.broken` names the promises."""

    def __init__(self, what: str, *, where: str, broken: tuple[str, ...], suggestion: str | None = None) -> None:
        self.broken = broken
        super().__init__(what, where=where, suggestion=suggestion)


class StepError(StepcError, RuntimeError):
    """A step failed in `run`; the original exception, if there is one, is `__cause__`.

    Args:
      phase: what the runner was doing: "data", "build", "dispatch", "settle", "bad", "eval", "hook" or "log".
      step: the number of the step that failed, counted from 1.
      state_ok: whether the state is as it was before the step: a failure inside the program destroys the donated one.
      facts: further rows for the message.
    `.run` is the `Run` so far; its state is the last good one that exists, or None.
    """

    def __init__(
        self,
        what: str,
        *,
        phase: str,
        step: int,
        state_ok: bool,
        facts: Facts = (),
        suggestion: str | None = None,
    ) -> None:
        self.phase = phase
        self.step = step
        self.state_ok = state_ok
        self.run: object = None
        alive = "alive, as it was before the step" if state_ok else self.state_lost
        rows = (("step", str(step)), ("phase", phase), ("state", alive), *facts)
        super().__init__(what, facts=rows, suggestion=suggestion)

    state_lost = "lost: it was donated to the failed step"


class DataError(StepError):
    """The data raised an error, gave a batch that does not fit, or gave no batch at all."""


class BuildError(StepError):
    """The step could not be traced or compiled, or does not return what a step returns."""


class NonFiniteError(StepError):
    """A loss or a gradient is not finite, or `run`'s `bad` does not want what is."""

    state_lost = "holds what the step made of it"


class DeviceError(StepError):
    """The program failed while it ran."""


class CheckpointError(StepcError, OSError):
    """A checkpoint cannot be written, or the one that was asked for cannot be read.

    Args:
      step: the step that is not saved, or not read; None before the first.
    """

    def __init__(self, what: str, *, step: int | None = None, facts: Facts = (), suggestion: str | None = None) -> None:
        self.phase = "save"
        self.step = step
        self.state_ok = True
        self.run: object = None
        super().__init__(what, facts=facts, suggestion=suggestion)


class ResumeError(StepcError, ValueError):
    """What was saved does not fit what is to go on, or none of it can be read."""

    def __init__(self, what: str, *, facts: Facts = (), suggestion: str | None = None) -> None:
        self.phase = "restore"
        self.state_ok = True
        super().__init__(what, facts=facts, suggestion=suggestion)


class PeerError(StepcError, ConnectionError):
    """Another process of the same job failed, went away, or does not agree; the job cannot go on without it.

    Args:
      process: its number, if it is known.
      step: the step it was at, counted from 1.
      phase: what it was doing.
    `.run` is the `Run` so far; its state is None where a failed collective took it.
    """

    def __init__(
        self,
        what: str,
        *,
        process: int | None = None,
        step: int | None = None,
        phase: str = "unknown",
        facts: Facts = (),
        suggestion: str | None = None,
    ) -> None:
        self.process = process
        self.step = step
        self.phase = phase
        self.state_ok = False
        self.run: object = None
        rows = (
            ("process", "unknown" if process is None else str(process)),
            ("step", "unknown" if step is None else str(step)),
            ("phase", phase),
        )
        super().__init__(what, facts=(*rows, *facts), suggestion=suggestion)


class Interrupted(StepcError, KeyboardInterrupt):
    """Ctrl-C: the loop left at a step boundary. `.run` is the finished part, with a live state."""

    def __init__(self, what: str, *, run: object) -> None:
        self.run = run
        super().__init__(what)


class Preempted(StepcError, SystemExit):
    """SIGTERM: the loop left at a step boundary. `.run` is the finished part; the exit code is 143."""

    def __init__(self, what: str, *, run: object) -> None:
        self.run = run
        super().__init__(what)
        self.code = 143  # 128 + SIGTERM, as a shell reports it


def faults_in_one(faults: Sequence[str], *, of: str) -> str:
    """One sentence for one fault, a numbered list for several."""
    if len(faults) == 1:
        return faults[0]
    listed = "\n".join(f"  {number}. {fault}" for number, fault in enumerate(faults, start=1))
    return f"{len(faults)} faults in {of}:\n\n{listed}"


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The known name that is closest to `name`, as a question, if one is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else None


def caret(code: str, marked: str, site: str) -> str:
    """`code` with carets under its first `marked`, and the file and line at the end."""
    start = code.index(marked)
    under = " " * start + "^" * len(marked)
    return f"{code}\n{under.ljust(len(code))}    ({site})"


def _aligned(facts: Facts) -> str:
    width = max((len(label) for label, _ in facts), default=0)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in facts)


def _indented(text: str | None) -> str:
    return "\n".join(f"  {line}".rstrip() for line in (text or "").splitlines())
