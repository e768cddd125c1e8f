"""The last part of a gradient's way, from the sum to what the optimizer is given: elementwise but for what it measures.

It is done twice: once for what the whole gradient is needed for (norms, metrics), and once where the optimizer is, in
its branch if there is one, so that it fuses with it. Materialised before a branch it cost 6 % of a small step.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from stepc.compiler.flow import Flow, applied, opened, settled
from stepc.compiler.instructions import Apply, Schedule, Settle
from stepc.core.terms import sum_of_squares
from stepc.language.kinds import Grads, Params


class Held(NamedTuple):
    """All that the second time needs: the sum, what was measured, the keys of what draws."""

    flow: Flow
    measures: tuple[Any, ...]  # Any: what each word measured, or None
    keys: tuple[tuple[Any, ...], ...]  # Any: a typed key for each word that draws


@dataclass(frozen=True)
class Ending:
    """The last division, and the last words that keep what is finite finite."""

    settle: Settle
    applies: tuple[Apply, ...]

    def measured(self, flow: Flow, keys: tuple[tuple[Any, ...], ...], params: Params) -> tuple[Held, Flow, Any]:
        """What is held for the second time, the value with all its metrics, and the sums of squares of the first."""
        value = settled(self.settle, flow, params)
        squares = jax.tree.map(sum_of_squares, value.grads)
        measures = []
        for one, key in zip(self.applies, keys, strict=True):
            measure, told = one.node.measured(value.grads)
            value = _applied(one, opened(value.grads, told, value), measure, key, params)
            measures.append(measure)
        return Held(flow, tuple(measures), keys), value, squares

    def finished(self, held: Held, params: Params) -> Grads:
        """What the optimizer is given."""
        value = settled(self.settle, held.flow, params)
        for one, measure, key in zip(self.applies, held.measures, held.keys, strict=True):
            value = _applied(one, value, measure, key, params)
        return value.grads


def ending_of(schedule: Schedule) -> tuple[int, Ending]:
    """Where it begins, and what it is. The optimizer is the last instruction."""
    place, applies = len(schedule) - 2, []
    while place > 1:
        match schedule[place - 1 : place + 1]:
            case (Apply(node) as one, Settle("cells", 1.0, False)) if node.keeps_finite:
                applies.append(one)
                place -= 2
            case _:
                break
    settle = schedule[place]
    if not isinstance(settle, Settle):
        raise ValueError("a gradient is settled before the optimizer takes it")
    return place, Ending(settle, tuple(reversed(applies)))


def _applied(one: Apply, flow: Flow, measure: Any, key: tuple[Any, ...], params: Params) -> Flow:
    grads, told = applied(one.node, flow.grads, measure, key)
    flow = opened(grads, told, flow)
    return replace(flow, grads=jax.tree.map(lambda like, leaf: leaf.astype(like.dtype), params, flow.grads))
