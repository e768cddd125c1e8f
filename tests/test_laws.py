"""Rung 2: wherever a law applies in a random core program, the program evaluates to the same bits after it.

The test of the test: the same check catches a wrong variant of each law, and of the split.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import PROBES, every_probe, over_pairs, probe_batch, probe_params
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stepc._compiler.normalize import AppliedLaw, apply_laws
from stepc._core.laws import LAWS, Law
from stepc._core.nodes import (
    DifferentiateNode,
    InScan,
    MapNode,
    MeanNode,
    Node,
    OverMesh,
    Program,
    ScaleNode,
    UnderVmap,
    show,
)
from stepc.errors import EquivalenceError
from stepc.testing import assert_equal_trees
from stepc.testing import evaluate as evaluator
from stepc.testing.probes import encoding

NUM_ROWS = 32
STATE = evaluator.EvaluationState(jax.tree.map(jnp.asarray, probe_params()), None)
BY_NAME = {law.name: law for law in LAWS}
PROBE = jax.jit(every_probe)  # traced once for all microbatches of one shape


def signs(grads: object) -> tuple[object, dict[str, jax.Array]]:
    """A gradient transform that is not linear and yet exact on whole numbers."""
    return jax.tree.map(jnp.sign, grads), {}


def programs(probe: Callable[..., jax.Array]) -> st.SearchStrategy[Program]:
    scans = st.sampled_from([1, 2, 4]).map(lambda k: MeanNode(InScan(k)))
    scales = st.sampled_from([1.0, 0.5, -2.0]).map(ScaleNode)
    meshes = st.sampled_from(["a", "b"]).flatmap(
        lambda axis: st.sampled_from([1, 2, 4]).map(lambda size: MeanNode(OverMesh((axis,), size)))
    )
    nodes = st.lists(
        st.one_of(scans, scales, meshes, st.just(MeanNode(UnderVmap())), st.just(MapNode(signs))),
        min_size=1,
        max_size=6,
    )
    return nodes.map(lambda found: (*found, DifferentiateNode(probe))).filter(_is_well_formed)


def _is_well_formed(program: Program) -> bool:
    means = [node for node in program if isinstance(node, MeanNode)]
    axes = [axis for node in means if isinstance(node.place, OverMesh) for axis in node.place.axes]
    vmap = next((n for n, node in enumerate(means) if isinstance(node.place, UnderVmap)), len(means))
    # Inside a vmap there is one row, which has no parts.
    splits_no_row = all(isinstance(node.place, UnderVmap) or node.size == 1 for node in means[vmap:])
    divides = NUM_ROWS % prod(node.size for node in means if not isinstance(node.place, UnderVmap)) == 0
    return splits_no_row and divides and len(axes) == len(set(axes))


def assert_evaluates_to_the_same(one: AppliedLaw) -> None:
    batch = jax.tree.map(jnp.asarray, probe_batch(NUM_ROWS, seed=1))
    before, after = (evaluator.gradient(program, STATE, batch) for program in (one.before, one.after))
    assert_equal_trees(after, before, tolerance=0.0, of=f"{one.law.name}: `{show(one.before)}` = `{show(one.after)}`")


@settings(max_examples=60)
@given(data=st.data())
def test_laws_change_no_bit_wherever_they_apply(data: st.DataObject) -> None:
    trace = apply_laws(data.draw(programs(PROBE)), LAWS)
    for one in trace:
        assert_evaluates_to_the_same(one)


def of_whole_batch(program: Program) -> Program:
    """The same means of a loss of the whole batch."""
    return (*program[:-1], DifferentiateNode(encoding, head=over_pairs))


@settings(max_examples=25)
@given(data=st.data())
def test_laws_change_no_bit_of_a_loss_of_the_whole_batch(data: st.DataObject) -> None:
    program = of_whole_batch(data.draw(programs(PROBE)))
    assume(not any(isinstance(node, MeanNode) and isinstance(node.place, UnderVmap) for node in program))
    for one in apply_laws(program, LAWS):
        assert_evaluates_to_the_same(one)


@pytest.mark.parametrize("mean", [MeanNode(InScan(4)), MeanNode(OverMesh(("a",), 4))], ids=str)
def test_mean_that_moves_past_what_is_not_linear_gives_the_head_another_batch(mean: MeanNode) -> None:
    program = (mean, MapNode(signs), *of_whole_batch((DifferentiateNode(PROBE),)))
    assert not apply_laws(program, LAWS)
    moved = (program[1], program[0], program[2])
    with pytest.raises(EquivalenceError):
        assert_evaluates_to_the_same(AppliedLaw(BY_NAME["defer-reduce"], program, moved))


# A program on which each law applies; a law without one fails the test below.
APPLIES: dict[str, tuple[Node, ...]] = {
    "drop-unit-mean": (MeanNode(InScan(1)),),
    "drop-unit-scale": (ScaleNode(1.0),),
    "merge-scan": (MeanNode(InScan(2)), MeanNode(InScan(4))),
    "merge-mesh": (MeanNode(OverMesh(("a",), 2)), MeanNode(OverMesh(("b",), 4))),
    "merge-vmap": (MeanNode(UnderVmap()), MeanNode(UnderVmap())),
    "defer-reduce": (MeanNode(InScan(4)), MeanNode(OverMesh(("a",), 2))),
    "scale-past-mean": (MeanNode(InScan(4)), ScaleNode(0.5)),
    "merge-scale": (ScaleNode(0.5), ScaleNode(-2.0)),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_law_alone_changes_no_bit(name: str) -> None:
    (one, *_) = apply_laws((*APPLIES[name], DifferentiateNode(PROBE)), (BY_NAME[name],))
    assert one.law.name == name
    assert_evaluates_to_the_same(one)


def _law(name: str, rewrite_: Callable[..., tuple[Node, ...] | None]) -> Law:
    return replace(BY_NAME[name], rewrite=rewrite_)


WRONG = {
    "drop-unit-mean": _law("drop-unit-mean", lambda node: () if node == MeanNode(InScan(2)) else None),
    "drop-unit-scale": _law("drop-unit-scale", lambda node: () if node == ScaleNode(0.5) else None),
    "merge-scan": _law("merge-scan", lambda a, b: (MeanNode(InScan(a.size)),) if _both(a, b, InScan) else None),
    "merge-mesh": _law(
        "merge-mesh", lambda a, b: (MeanNode(OverMesh(("a",), a.size)),) if _both(a, b, OverMesh) else None
    ),
    # It drops both, so the rows share a call.
    "merge-vmap": _law("merge-vmap", lambda a, b: () if isinstance(a, MeanNode) and a == b else None),
    # The reduction leaves the loop, and the loop is gone.
    "defer-reduce": _law(
        "defer-reduce", lambda a, b: (b,) if isinstance(a, MeanNode) and isinstance(b, MeanNode) and a != b else None
    ),
    # True of the loss, false of its gradient: a constant is not the identity of a sum.
    "scale-past-mean": _law("scale-past-mean", lambda a, b: (a,) if isinstance(a, MeanNode) and _is_scale(b) else None),
    "merge-scale": _law("merge-scale", lambda a, b: (ScaleNode(a.factor + b.factor),) if _is_scale(a, b) else None),
}


def _both(a: Node, b: Node, place: type) -> bool:
    return (
        isinstance(a, MeanNode)
        and isinstance(b, MeanNode)
        and isinstance(a.place, place)
        and isinstance(b.place, place)
    )


def _is_scale(*nodes: Node) -> bool:
    return all(isinstance(node, ScaleNode) for node in nodes)


WRONG_ON = {**APPLIES, "drop-unit-mean": (MeanNode(InScan(2)),), "drop-unit-scale": (ScaleNode(0.5),)}


@pytest.mark.parametrize("name", BY_NAME)
def test_wrong_variant_of_a_law_is_caught(name: str) -> None:
    (one, *_) = apply_laws((*WRONG_ON[name], DifferentiateNode(PROBE)), (WRONG[name],))
    with pytest.raises(EquivalenceError):
        assert_evaluates_to_the_same(one)


@pytest.mark.parametrize("split", ["contiguous in the scan", "strided on the mesh", "rows reversed"])
def test_wrong_split_is_caught(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(mean: MeanNode, rows: np.ndarray) -> list[np.ndarray]:
        match split, mean.place:
            case ("contiguous in the scan", InScan(size)):
                return list(rows.reshape(size, -1))
            case ("strided on the mesh", OverMesh()):
                return list(rows.reshape(-1, mean.size).T)
            case ("rows reversed", InScan()):
                return [part[::-1] for part in right(mean, rows)]
            case _:
                return right(mean, rows)

    right, batch = evaluator._split, jax.tree.map(jnp.asarray, probe_batch(NUM_ROWS))
    program = (MeanNode(InScan(4)), MeanNode(OverMesh(("a",), 2)))
    expected = evaluator.gradient((*program, DifferentiateNode(PROBE)), STATE, batch)
    monkeypatch.setattr(evaluator, "_split", wrong)
    got = evaluator.gradient((*program, DifferentiateNode(PROBE)), STATE, batch)
    with pytest.raises(EquivalenceError):
        assert_equal_trees(got, expected, tolerance=0.0, of=split)


def test_defer_reduce_across_a_nonlinear_node_is_caught() -> None:
    program = (
        MeanNode(InScan(4)),
        MapNode(signs),
        MeanNode(OverMesh(("a",), 2)),
        DifferentiateNode(PROBES["coupling_rows"]),
    )
    assert not apply_laws(program, (BY_NAME["defer-reduce"],))
    moved = (program[2], program[0], program[1], program[3])
    with pytest.raises(EquivalenceError):
        assert_evaluates_to_the_same(AppliedLaw(BY_NAME["defer-reduce"], program, moved))


@settings(max_examples=200)
@given(program=programs(PROBES["over_rows"]))
def test_laws_come_to_an_end_in_the_normal_form(program: Program) -> None:
    trace = apply_laws(program, LAWS)
    assume(trace)
    normal = trace[-1].after
    assert not apply_laws(normal, LAWS)
    assert len(normal) <= len(program)
    # Between two nodes that are not linear: at most one constant, one mean over the mesh, one scan, one vmap.
    rank = {ScaleNode: 0, OverMesh: 1, InScan: 2, UnderVmap: 3}
    for one, two in zip(normal, normal[1:], strict=False):
        ranks = [rank.get(type(node.place if isinstance(node, MeanNode) else node)) for node in (one, two)]
        assert None in ranks or ranks[0] < ranks[1]  # pyright: ignore[reportOperatorIssue]


def test_rewrite_of_laws_that_contradict_each_other_raises() -> None:
    back = _law("defer-reduce", lambda a, b: (b, a) if _both(b, b, InScan) and _both(a, a, OverMesh) else None)
    program = (MeanNode(InScan(2)), MeanNode(OverMesh(("a",), 2)), DifferentiateNode(PROBES["over_rows"]))
    with pytest.raises(RuntimeError, match="do not come to an end"):
        apply_laws(program, (BY_NAME["defer-reduce"], back))
