"""The errors that stepc raises, and the form of their messages.

    Exception
    └── StepcError                    `.suggestion`; each class below is also the builtin that it resembles
        ├── PipelineTypeError         TypeError          two neighbours of `@` do not meet
        ├── FieldTypeError            TypeError          a field or an argument has the wrong type
        ├── FieldValueError           ValueError         a field of a transform has the wrong value
        ├── ConfigError               ValueError         `compile`, `init` or `run` was given arguments that cannot work
        ├── LossError                 ValueError         a loss does not return what a loss returns
        ├── BatchError                ValueError         a batch cannot be split as the pipeline asks
        ├── ShardingError             ValueError         the pipeline and the mesh do not fit
        ├── EquivalenceError          AssertionError     a compiled step and its reference differ
        ├── BudgetError               AssertionError     a program breaks its budget
        ├── StepError                 RuntimeError       a step failed in `run`
        │   ├── DataError                                the data failed
        │   ├── BuildError                               the step could not be traced or compiled
        │   ├── NonFiniteError                           the loss or the gradient is not finite
        │   ├── RejectedError                            `reject_if` refused a step
        │   └── DeviceError                              the program failed while it ran
        ├── CheckpointError           OSError            a checkpoint cannot be written or read
        ├── ResumeError               ValueError         a checkpoint does not fit the run that resumes from it
        └── PeerError                 ConnectionError    another process of the job failed or is gone

    KeyboardInterrupt
    └── Interrupted                                      Ctrl-C, at a step boundary, with a live state

    SystemExit
    └── Preempted                                        SIGTERM, at a step boundary; exit code 143

`Interrupted` and `Preempted` are exits, not errors: neither `except StepcError` nor `except Exception` catches them,
so a loop that retries after errors still ends on Ctrl-C and on SIGTERM.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from stepc._text import aligned_table, by_pattern

# A message does not grow with the batch or the model.
_MOST_SHOWN = 8  # of like faults, or items of a list
_MOST_FACTS = 12  # rows: those of a failed step, and eight
_LONGEST_LINE = 1000  # characters, such as the repr of an array

# Facts are rows of (label, value); they are printed aligned.
Facts = Sequence[tuple[str, str]]


@runtime_checkable
class RunRecord(Protocol):
    """What an error or an exit keeps of the run that it ended: a `stepc.Run`."""

    state: Any  # Any: a state, whatever it is made of; None where it is lost
    steps: int
    ended: str
    metrics: dict[str, Any]  # Any: floats, or arrays of numpy
    failures: dict[str, int]
    skipped: int
    rollbacks: int


class StepcError(Exception):
    """The root of every error that stepc raises.

    Args:
      what: what is wrong, in the user's words; one sentence.
      where: the piece of the user's source that it is about, with a caret where that helps.
      facts: aligned rows, (label, value).
      suggestion: what to write instead, only where that is certain.
    """

    def __init__(self, what: str, *, where: str = "", facts: Facts = (), suggestion: str | None = None) -> None:
        self.suggestion = suggestion
        parts = (what, _indented(where), _indented(_aligned(facts)), suggestion and _indented(suggestion))
        lines = "\n\n".join(part for part in parts if part).splitlines()
        super().__init__("\n".join(map(_shortened, lines)))


class PipelineTypeError(StepcError, TypeError):
    """Two neighbours of `@` do not meet."""


class FieldTypeError(StepcError, TypeError):
    """A field of a transform, or an argument of a function, has the wrong type."""


class FieldValueError(StepcError, ValueError):
    """A field of a transform has the right type and the wrong value."""


class ConfigError(StepcError, ValueError):
    """`compile`, `init`, a step or `run` was given arguments that cannot work."""


class LossError(StepcError, ValueError):
    """A loss does not return what a loss returns."""


class BatchError(StepcError, ValueError):
    """A batch cannot be split as the pipeline asks."""


class ShardingError(StepcError, ValueError):
    """The pipeline and the mesh do not fit: an axis is missing, named twice, or does not divide a size."""


class EquivalenceError(StepcError, AssertionError):
    """A compiled step and its reference give different results."""


class BudgetError(StepcError, AssertionError):
    """A compiled program breaks its budget. `.broken` names the limits that it breaks."""

    def __init__(self, what: str, *, where: str, broken: tuple[str, ...], suggestion: str | None = None) -> None:
        self.broken = broken
        super().__init__(what, where=where, suggestion=suggestion)


class StepError(StepcError, RuntimeError):
    """A step failed in `run`; the original exception, if there is one, is `__cause__`.

    Args:
      phase: what `run` was doing: "data", "build", "dispatch", "wait", "reject_if", "compare", "eval", "hook" or "log".
      step: the number of the step that failed, counted from 1.
      state_ok: whether the state is as it was before the step. A failure inside the program destroys the donated state.
      facts: further rows for the message.
    `.run` is the `Run` so far; its state is the last good one that exists, or None.
    """

    state_lost = "lost: it was donated to the failed step"

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
        self.run: RunRecord | None = None
        state = "alive, unchanged by the failed step" if state_ok else self.state_lost
        rows = (("step", str(step)), ("phase", phase), ("state", state), *facts)
        super().__init__(what, facts=rows, suggestion=suggestion)


class DataError(StepError):
    """The data raised an error, gave a batch that does not fit, or gave no batch at all."""


class BuildError(StepError):
    """The step could not be traced or compiled, or does not return what a step returns."""


class NonFiniteError(StepError):
    """The loss or the gradient of a step is not finite."""

    state_lost = "overwritten by the failed step"


class RejectedError(StepError):
    """A step is finite, and the user's own `reject_if` refused it."""

    state_lost = "overwritten by the rejected step"


class DeviceError(StepError):
    """The program failed while it ran."""


class CheckpointError(StepcError, OSError):
    """A checkpoint cannot be written, or the one that was asked for cannot be read.

    Args:
      step: the step of that checkpoint; None before the first.
    """

    def __init__(self, what: str, *, step: int | None = None, facts: Facts = (), suggestion: str | None = None) -> None:
        self.phase = "save"
        self.step = step
        self.state_ok = True
        self.run: RunRecord | None = None
        super().__init__(what, facts=facts, suggestion=suggestion)


class ResumeError(StepcError, ValueError):
    """A checkpoint does not fit the run that resumes from it, or none can be read."""

    def __init__(self, what: str, *, facts: Facts = (), suggestion: str | None = None) -> None:
        self.phase = "restore"
        self.state_ok = True
        super().__init__(what, facts=facts, suggestion=suggestion)


class PeerError(StepcError, ConnectionError):
    """Another process of the job failed, is gone or disagrees; the job cannot go on without it.

    Args:
      process: its number, if known.
      step: the step it was at, counted from 1.
      phase: what it was doing.
    `.run` is the `Run` so far; its state is None where a failed collective destroyed it.
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
        self.run: RunRecord | None = None
        rows = (
            ("process", "unknown" if process is None else str(process)),
            ("step", "unknown" if step is None else str(step)),
            ("phase", phase),
        )
        super().__init__(what, facts=(*rows, *facts), suggestion=suggestion)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: `run` ended at a step boundary. `.run` is the finished part, with a live state."""

    def __init__(self, what: str, *, run: RunRecord) -> None:
        self.run = run
        super().__init__(what)


class Preempted(SystemExit):
    """SIGTERM: `run` ended at a step boundary. `.run` is the finished part; the exit code is 143.

    A signal in `sc.Watchdog(signals=…)` ends a run the same way. The exit code is 128 plus the number of the signal.
    """

    def __init__(self, what: str, *, run: RunRecord, signal: int = 15) -> None:
        self.run = run
        super().__init__(what)
        self.code = 128 + signal  # as a shell reports it


def faults_in_one(faults: Sequence[str], *, of: str) -> str:
    """One sentence for one fault, a numbered list for several: at most eight, like ones as one, the rest counted."""
    shown, num_left = by_pattern(faults, most=_MOST_SHOWN)
    sentences = [_counted(fault.removesuffix("."), times, end="." * fault.endswith(".")) for fault, times in shown]
    if len(sentences) == 1:
        return sentences[0]
    lines = [f"  {number}. {fault}" for number, fault in enumerate(sentences, start=1)]
    lines += [f"  and {num_left:,} more."] if num_left else []
    return f"{len(faults):,} faults in {of}:\n\n" + "\n".join(lines)


def leaf_text(path: str, whole: str) -> str:
    """A leaf of a tree as a message names it: by its path, or `whole` for a tree that is one array."""
    return f"`{path}`" if path else whole


def listed(items: Iterable[str], *, separator: str = ", ") -> str:
    """Items in one line, each with a path at its start: at most eight, like ones as one, the rest counted."""
    shown, num_left = by_pattern(list(items), most=_MOST_SHOWN)
    texts = [_counted(item, times) for item, times in shown]
    return separator.join(texts) + (f" and {num_left:,} more" if num_left else "")


def _counted(text: str, times: int, *, end: str = "") -> str:
    return f"{text} ({times:,} leaves){end}" if times > 1 else f"{text}{end}"


def _shortened(line: str) -> str:
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}… ({len(line):,} characters)"


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A question that names the known name closest to `name`, if one is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else None


def misspelt_axes(unknown: Iterable[str], sizes: Iterable[str]) -> str | None:
    """What to write where a pipeline names axes that the mesh lacks, if some are close to one that it has.

    The mesh may be the one that is misspelt, unless the pipeline has two spellings for one of its axes.
    """
    names = list(sizes)
    spellings: dict[str, list[str]] = {}
    for axis in unknown:
        for close in difflib.get_close_matches(axis, names, n=1):
            spellings.setdefault(close, []).append(axis)
    hints = [
        f"Either write {close!r} in the pipeline, or name that axis of the mesh {axes[0]!r}."
        if len(axes) == 1
        else f"Did you mean {close!r}?"
        for close, axes in spellings.items()
    ]
    return " ".join(hints) or None


def caret(code: str, marked: str, site: str) -> str:
    """`code` with carets under the first `marked`, and the file and line at the end."""
    start = code.index(marked)
    under = " " * start + "^" * len(marked)
    return f"{code}\n{under.ljust(len(code))}    ({site})"


def _aligned(facts: Facts) -> str:
    texts = [f"`{label}`\0{value}" for label, value in facts]
    shown, num_left = by_pattern(texts, most=_MOST_FACTS)
    rows = [_counted(text, times)[1:].split("`\0", maxsplit=1) for text, times in shown]
    rows += [["and", f"{num_left:,} more"]] if num_left else []
    return "\n".join(aligned_table(rows))


def _indented(text: str | None) -> str:
    return "\n".join(f"  {line}".rstrip() for line in (text or "").splitlines())
