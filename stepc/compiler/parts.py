"""The order of work where things lie in parts along a mesh axis: what is scattered, what is gathered, and when.

It rewrites a schedule that has everything whole on every device. The sum is the same; who holds which part is not.
"""

from dataclasses import replace
from math import prod

from stepc.compiler.instructions import (
    Again,
    Apply,
    CountFirst,
    Gather,
    Instruction,
    Loop,
    Optimize,
    Reduce,
    Scatter,
    Schedule,
    everything,
)
from stepc.compiler.layout import Laid


def divided(schedule: Schedule, laid: Laid) -> Schedule:
    """The same work with the gradient, the optimizer and the parameters in parts, as the layout says."""
    match schedule:
        case (Again(node, body),):
            return (Again(node, divided(body, laid)),)
        case _:
            pass
    schedule = tuple(_in_dtype(one, laid.layout.reduce_dtype) for one in schedule)
    if laid.axis is None or not laid.layout.zero:
        return schedule
    schedule = _scattered(schedule, laid, laid.axis)
    if laid.layout.zero < 3:
        gather = Gather(laid.axis, laid.num_parts, "each device makes its own part of the new parameters")
        return tuple(replace(one, gather=gather) if isinstance(one, Optimize) else one for one in schedule)
    if laid.layout.gather == "step":
        return (Gather(laid.axis, laid.num_parts, "the loss needs whole parameters: once a step"), *schedule)
    return _before_every_cell(schedule, Gather(laid.axis, laid.num_parts, "the loss needs whole parameters"))


def is_scattered(schedule: Schedule) -> bool:
    """Whether the gradient that leaves the devices lies in parts."""
    return any(isinstance(one, Scatter) for one in everything(schedule))


def whole_because(schedule: Schedule, laid: Laid) -> str | None:
    """Why the gradient is whole on every device although the optimizer's state lies in parts; None if it is not."""
    if not laid.layout.zero or is_scattered(schedule):
        return None
    return next(one.reason for one in everything(schedule) if isinstance(one, Reduce) and laid.axis in one.axes)


def accumulates_parts(schedule: Schedule) -> bool:
    """Whether what a loop adds up lies in parts."""
    return any(isinstance(one, Loop) and is_scattered(one.body) for one in everything(schedule))


def notes(schedule: Schedule, laid: Laid, gradient_bytes: int) -> tuple[str, ...]:
    """What the layout costs, where that is not what one would expect.

    Args:
      gradient_bytes: of the whole gradient, as far as a device of the automatic axes has it.
    """
    loops = prod(one.size for one in everything(schedule) if isinstance(one, Loop))
    size, part = f"{gradient_bytes:,} B", f"{gradient_bytes // laid.num_parts:,} B"
    if laid.layout.automatic:
        times = "once a step" if loops == 1 else f"once a microbatch, {loops} times a step"
        return (
            f"XLA partitions the loss and sums the gradient of {size} over {', '.join(laid.rows)} at least {times}",
        )
    found: list[str] = []
    if (why := whole_because(schedule, laid)) is not None:
        found.append(f"the accumulator is whole on every device: {why}")
    elif loops > 1 and (laid.layout.zero == 2 or laid.layout.gather == "microbatch"):
        found.append(
            f"the accumulator takes {part} instead of {size}, for {loops} reduce-scatters of {size} instead of 1"
        )
    if laid.layout.gather == "microbatch" and laid.axis is not None:
        found.append(
            f"whole parameters are kept for a microbatch, not for the step, for {loops} all-gathers instead of 1"
        )
    return tuple(found)


def _in_dtype(one: Instruction, dtype: str | None) -> Instruction:
    match one:
        case Reduce():
            return replace(one, dtype=dtype)
        case Loop():
            return replace(one, body=tuple(_in_dtype(inner, dtype) for inner in one.body))
        case _:
            return one


def _scattered(schedule: Schedule, laid: Laid, axis: str) -> Schedule:
    """The reduction over `axis` in parts, if nothing on the devices needs its whole result."""
    place = max((n for n, one in enumerate(schedule) if isinstance(one, Reduce)), default=-1)
    reduce = schedule[place] if place >= 0 else None
    if not isinstance(reduce, Reduce) or axis not in reduce.axes:
        return schedule
    scatter = Scatter(axis, laid.num_parts, reduce.reason, reduce.dtype)
    before, after = schedule[:place], (replace(reduce, scattered=axis), *schedule[place + 1 :])
    if laid.layout.zero == 2 or laid.layout.gather == "microbatch":
        return (*_early(before, scatter), *after)
    return (*before, scatter, *after)


def _early(schedule: Schedule, scatter: Scatter) -> Schedule:
    """In the innermost loop after which no word needs the whole gradient; where there is none, at the end."""
    for place, one in enumerate(schedule):
        if isinstance(one, Loop) and not any(isinstance(later, Apply) for later in schedule[place:]):
            scatter = replace(scatter, reason="the accumulator lies in parts: once a microbatch")
            return (*schedule[:place], replace(one, body=_early(one.body, scatter)), *schedule[place + 1 :])
    return (*schedule, scatter)


def _before_every_cell(schedule: Schedule, gather: Gather) -> Schedule:
    """At the beginning of the innermost loop, or where there is none; and where cells are counted."""
    loops = any(isinstance(one, Loop) for one in schedule)
    inner = tuple(
        replace(one, body=_before_every_cell(one.body, gather)) if isinstance(one, Loop | CountFirst) else one
        for one in schedule
    )
    return inner if loops else (gather, *inner)
