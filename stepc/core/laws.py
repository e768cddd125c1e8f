"""The laws: equations between core programs, one row each. They belong to no word, so they stand here.

A law looks at one node or at two neighbours and says what may stand in their place. It must hold for every
loss, also one that depends on which rows share a cell; the ladder in `tests/test_laws.py` holds it to that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from stepc.core.nodes import Lanes, Mean, Node, Scale, Space, Time


@dataclass(frozen=True)
class Law:
    """One equation, read from left to right.

    Args:
      name: kebab-case, as it is printed in plans.
      formula: the equation; t is a mean over time, s and r are means over mesh axes, l over lanes, c a constant.
      condition: what must be true of the nodes for the law to hold.
      reason: why one wants the right-hand side.
      width: how many neighbouring nodes it looks at.
      keeps_order: whether the cells come in the same order after it. Model state that passes through the cells one
        after another depends on that, so other laws do not apply to a loss that carries.
      rewrite: the nodes it looked at, outermost first, to their replacement; None where it does not apply.
    """

    name: str
    formula: str
    condition: str
    reason: str
    width: int
    rewrite: Callable[..., tuple[Node, ...] | None]
    keeps_order: bool = True


def _drop_unit_mean(node: Node) -> tuple[Node, ...] | None:
    match node:
        case Mean(Time(1)) | Mean(Space(size=1)):
            return ()
        case _:
            return None


def _drop_unit_scale(node: Node) -> tuple[Node, ...] | None:
    match node:
        case Scale(1.0):
            return ()
        case _:
            return None


def _merge_time(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # Part r of the outer mean is the rows i = r (mod a); its part q is those with i // a = q (mod b).
        # Together: one residue of i mod a b, each residue once.
        case Mean(Time(a), one), Mean(Time(b), other) if one == other:
            return (Mean(Time(a * b), one, written=f"{outer.written} @ {inner.written}"),)
        case _:
            return None


def _merge_space(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # Contiguous parts of contiguous parts are contiguous parts. No bound program names an axis twice.
        case Mean(Space(a)), Mean(Space(b)):
            place = Space((*a, *b), prod((outer.size, inner.size)))
            return (Mean(place, written=f"{outer.written} @ {inner.written}"),)
        case _:
            return None


def _defer_reduce(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # Row i lies in part i // (B/n) of space and in part i mod k of time. B/n is a multiple of k, so
        # the local row number has the same residue: either order gives the same k n cells.
        case Mean(Time()), Mean(Space()):
            return (inner, outer)
        case _:
            return None


def _merge_lanes(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # A row is one row: it has no parts but itself.
        case Mean(Lanes()), Mean(Lanes()):
            return (outer,)
        case _:
            return None


def _scale_past_mean(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        case Mean(), Scale():
            return (inner, outer)
        case _:
            return None


def _merge_scale(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        case Scale(a), Scale(b):
            return (Scale(a * b, written=f"{outer.written} @ {inner.written}"),)
        case _:
            return None


LAWS: tuple[Law, ...] = (
    Law(
        "drop-unit-mean", "mean[1] = id", "a mean of one part",
        "a loop of one turn or an axis of one device is nothing", 1, _drop_unit_mean,
    ),
    Law("drop-unit-scale", "1 g = g", "a factor of 1", "no multiplication", 1, _drop_unit_scale),
    Law(
        "merge-time", "t(a) . t(b) = t(a b)", "strided parts that add up in one type, and no carry",
        "one loop instead of a loop in a loop", 2, _merge_time, keeps_order=False,
    ),
    Law("merge-lanes", "l . l = l", "single rows", "one row has no parts", 2, _merge_lanes),
    Law(
        "merge-space", "s . r = (s r)", "different axes, contiguous parts", "one reduction over both axes",
        2, _merge_space,
    ),
    Law(
        "defer-reduce", "t . s = s . t", "equal parts, strided in time and contiguous in space, and no carry",
        "the reduction leaves the loop: once a step instead of once a microbatch",
        2, _defer_reduce, keeps_order=False,
    ),
    Law("scale-past-mean", "t . c = c . t", "any mean: it is linear", "one multiplication a step", 2, _scale_past_mean),
    Law("merge-scale", "a (b g) = (a b) g", "two constants", "one multiplication", 2, _merge_scale),
)  # fmt: skip
