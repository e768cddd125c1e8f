"""Steps written by hand, compiled for CPU, TPU and GPU: every collective is found, with its bytes, axes and turns."""

from pathlib import Path

import jax
import pytest
from by_hand import BYTES, DUMPS, PODS, STEPS, WIDTH, Facts, compiled, mesh_of_rank
from test_topology import HAS

import stepc as sc
from stepc.inspect import Collective, Collectives, collectives

SAVED = sorted(DUMPS.glob("*.txt"))
LIVE = [(name, rank) for name, step in STEPS.items() for rank in step.ranks]


def facts(rows: Collectives) -> list[tuple[str, int, tuple[str, ...], int | None, bool]]:
    return [(row.kind, row.bytes, row.axes, row.executions, row.in_loop) for row in rows]


def expected(name: str) -> list[Facts]:
    return list(STEPS[name].facts)


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_collectives_of_saved_text_are_those_of_the_step(path: Path) -> None:
    _, name, rank = path.stem.split("-")
    rows = collectives(path.read_text(), mesh_of_rank(int(rank), jax.devices()))
    assert facts(rows) == expected(name)
    assert all(row.source.startswith("by_hand.py:") for row in rows)


@pytest.mark.parametrize("name, rank", LIVE)
def test_collectives_of_step_on_cpu_are_those_of_the_step(name: str, rank: int) -> None:
    mesh = mesh_of_rank(rank, jax.devices())
    assert facts(collectives(compiled(name, mesh), mesh)) == expected(name)


@pytest.mark.parametrize("platform", [pytest.param(p, marks=pytest.mark.skipif(not HAS[p], reason=p)) for p in PODS])
@pytest.mark.parametrize("name, rank", LIVE)
def test_collectives_of_step_for_a_pod_are_those_of_the_step(name: str, rank: int, platform: str) -> None:
    mesh = mesh_of_rank(rank, list(sc.topology(PODS[platform]).devices.flat))
    assert facts(collectives(compiled(name, mesh), mesh)) == expected(name)


def only(name: str) -> Collective:
    (path,) = DUMPS.glob(f"{name}-*.txt")
    (row,) = collectives(path.read_text())
    return row


@pytest.mark.parametrize("platform", PODS)
def test_collective_that_is_overlapped_names_what_runs_meanwhile(platform: str) -> None:
    row = only(f"{platform}-overlapped")
    assert row.asynchronous and row.between is not None
    assert row.between.flops in (2 * WIDTH**3, 2 * 2 * WIDTH**3)  # one of the two products, or both
    assert "flops" in str(Collectives((row,)))


def test_collective_on_a_gpu_may_run_beside_work_without_products() -> None:
    row = only("gpu-each")
    assert row.asynchronous and row.between is not None
    assert (len(row.between.instructions), row.between.flops) == (1, 0)


@pytest.mark.parametrize("platform", PODS)
def test_collective_in_nested_loops_names_them_from_the_outside(platform: str) -> None:
    assert only(f"{platform}-layers").loops == ("while x3", "closed_call/while x2")
    assert "while x3 > closed_call/while x2" in str(Collectives((only(f"{platform}-layers"),)))


def test_every_platform_has_a_saved_text_of_every_step() -> None:
    assert {tuple(path.stem.split("-")[:2]) for path in SAVED} == {(p, name) for p in PODS for name in STEPS}
    assert BYTES == 4 * WIDTH**2
