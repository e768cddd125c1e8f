"""The laws: equations between core programs, one row each. They belong to no transform, so no transform holds one.

A law looks at one node, or at two neighbours, and says what may replace them. It must hold for every loss, including
one that depends on which rows share a microbatch; `tests/test_laws.py` checks that, bitwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from stepc._core.nodes import InScan, MeanNode, Node, OverMesh, ScaleNode, UnderVmap


@dataclass(frozen=True)
class Law:
    """One equation, applied from left to right.

    Args:
      name: kebab-case, as plans print it.
      formula: the equation. `scan a`, `mesh a` and `vmap` are means there, `mean` is any of them, and c a constant.
      condition: what must be true of the nodes for the equation to hold.
      reason: why the right-hand side is better.
      width: how many neighbouring nodes the law looks at.
      keeps_order: whether the local microbatches keep their order. Model state passes through them one after another,
        so a law that reorders them does not apply to a loss with model state.
      rewrite: from the nodes, outermost first, to their replacement; None where the law does not apply.
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


def _merge_vmap(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # The only part of a single row is that row.
        case MeanNode(UnderVmap()), MeanNode(UnderVmap()):
            return (outer,)
        case _:
            return None


def _merge_mesh(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # Contiguous parts of contiguous parts are contiguous. A bound program names each axis at most once.
        case MeanNode(OverMesh(a)), MeanNode(OverMesh(b)):
            place = OverMesh((*a, *b), prod((outer.size, inner.size)))
            return (MeanNode(place, written=f"{outer.written} @ {inner.written}"),)
        case _:
            return None


def _defer_reduce(outer: Node, inner: Node) -> tuple[Node, ...] | None:
    match outer, inner:
        # Row i is in part i // (B/n) on the mesh and in part i mod k of the scan. B/n is a multiple of k, so the local
        # row number has the same residue: either order gives the same k n local microbatches.
        case MeanNode(InScan()), MeanNode(OverMesh()):
            return (inner, outer)
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
        "a loop of one iteration, or an axis of one device, does nothing", 1, _drop_unit_mean,
    ),
    Law("drop-unit-scale", "1 g = g", "a factor of 1", "no multiplication", 1, _drop_unit_scale),
    Law(
        "merge-scan", "scan a . scan b = scan (a b)", "strided parts, accumulated in one dtype, and no model state",
        "one loop instead of a loop in a loop", 2, _merge_scan, keeps_order=False,
    ),
    Law("merge-vmap", "vmap . vmap = vmap", "single rows", "one row has no parts", 2, _merge_vmap),
    Law(
        "merge-mesh", "mesh a . mesh b = mesh (a b)", "different axes, contiguous parts",
        "one reduction over both axes", 2, _merge_mesh,
    ),
    Law(
        "defer-reduce", "scan . mesh = mesh . scan",
        "equal parts, strided in the scan and contiguous on the mesh, and no model state",
        "the reduction leaves the loop: once a step instead of once a microbatch",
        2, _defer_reduce, keeps_order=False,
    ),
    Law(
        "scale-past-mean", "mean . c = c . mean", "any mean: it is linear", "one multiplication a step",
        2, _scale_past_mean,
    ),
    Law("merge-scale", "a (b g) = (a b) g", "two constants", "one multiplication", 2, _merge_scale),
)  # fmt: skip
