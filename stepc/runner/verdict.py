"""What a user finds bad in finite numbers, such as a loss that leaps. It must not know what is done about it."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from stepc.errors import NonFiniteError, StepError
from stepc.language.kinds import Metrics
from stepc.runner.scribe import floats_of

Bad: TypeAlias = Callable[[Mapping[str, float]], str | None]


def refuse_if_bad(bad: Bad, metrics: Metrics, *, row: int, step: int) -> None:
    """Ask about a step that has settled.

    Errors: NonFiniteError with what `bad` says, so that the same policies govern it; StepError from what it raises.
    """
    numbers = floats_of(metrics, row)
    try:
        why = bad(numbers)
    except Exception as error:  # whatever a user's function raises: it is raised from
        what = f"`bad` failed at step {step}: {type(error).__name__}: {error}"
        raise StepError(what, phase="bad", step=step, state_ok=True) from error
    if why:
        facts = [(name, f"{number:g}") for name, number in numbers.items()]
        raise NonFiniteError(f"Step {step} is bad: {why}", phase="settle", step=step, state_ok=False, facts=facts)
