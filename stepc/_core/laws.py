"""The laws: equations between core programs, one row each. They belong to no transform, so they stand here.

A law looks at one node or at two neighbours and says what may stand in their place. It must hold for every
loss, also one that depends on which rows share a cell; the ladder in `tests/test_laws.py` holds it to that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from stepc._core.nodes import InScan, MeanNode, Node, OverMesh, ScaleNode, UnderVmap


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
        case MeanNode(InScan(1)) | MeanNode(OverMesh(size=1)):
            return ()
        case _:
            return None


def _drop_unit_scale(node: Node) -> tuple[Node, ...] | None:
    match node:
        case ScaleNode(1.0):
            return ()
        case _:
            return None


def _merge_scan(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # Part r of the outer mean is the rows i = r (mod a); its part q is those with i // a = q (mod b).
        # Together: one residue of i mod a b, each residue once.
        case MeanNode(InScan(a), one), MeanNode(InScan(b), other) if one == other:
            return (MeanNode(InScan(a * b), one, written=f"{outer.written} @ {inner.written}"),)
        case _:
            return None


def _merge_mesh(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # Contiguous parts of contiguous parts are contiguous parts. No bound program names an axis twice.
        case MeanNode(OverMesh(a)), MeanNode(OverMesh(b)):
            place = OverMesh((*a, *b), prod((outer.size, inner.size)))
            return (MeanNode(place, written=f"{outer.written} @ {inner.written}"),)
        case _:
            return None


def _defer_reduce(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # Row i lies in part i // (B/n) of space and in part i mod k of time. B/n is a multiple of k, so
        # the local row number has the same residue: either order gives the same k n cells.
        case MeanNode(InScan()), MeanNode(OverMesh()):
            return (inner, outer)
        case _:
            return None


def _merge_vmap(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # A row is one row: it has no parts but itself.
        case MeanNode(UnderVmap()), MeanNode(UnderVmap()):
            return (outer,)
        case _:
            return None


def _scale_past_mean(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        case MeanNode(), ScaleNode():
            return (inner, outer)
        case _:
            return None


def _merge_scale(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        case ScaleNode(a), ScaleNode(b):
            return (ScaleNode(a * b, written=f"{outer.written} @ {inner.written}"),)
        case _:
            return None


LAWS: tuple[Law, ...] = (
    Law(
        "drop-unit-mean", "mean[1] = id", "a mean of one part",
        "a loop of one turn or an axis of one device is nothing", 1, _drop_unit_mean,
    ),
    Law("drop-unit-scale", "1 g = g", "a factor of 1", "no multiplication", 1, _drop_unit_scale),
    Law(
        "merge-scan", "t(a) . t(b) = t(a b)", "strided parts that add up in one type, and no model_state",
        "one loop instead of a loop in a loop", 2, _merge_scan, keeps_order=False,
    ),
    Law("merge-vmap", "l . l = l", "single rows", "one row has no parts", 2, _merge_vmap),
    Law(
        "merge-mesh", "s . r = (s r)", "different axes, contiguous parts", "one reduction over both axes",
        2, _merge_mesh,
    ),
    Law(
        "defer-reduce", "t . s = s . t", "equal parts, strided in time and contiguous in space, and no model_state",
        "the reduction leaves the loop: once a step instead of once a microbatch",
        2, _defer_reduce, keeps_order=False,
    ),
    Law("scale-past-mean", "t . c = c . t", "any mean: it is linear", "one multiplication a step", 2, _scale_past_mean),
    Law("merge-scale", "a (b g) = (a b) g", "two constants", "one multiplication", 2, _merge_scale),
)  # fmt: skip
