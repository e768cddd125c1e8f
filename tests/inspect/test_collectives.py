"""Collectives of programs whose collectives are known, because they are written by hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stepc.inspect import Collective, Collectives, collectives

AXES = {1: ("data",), 2: ("data", "model"), 3: ("data", "fsdp", "model")}
SIZES = {1: (8,), 2: (4, 2), 3: (2, 2, 2)}
BYTES = 8 * 4 * 4  # f32[8,4]


def mesh_of(rank: int, order: list[int] | None = None) -> Mesh:
    devices = np.array(jax.devices()[:8])
    return Mesh(devices[order or range(8)].reshape(SIZES[rank]), AXES[rank])


def compiled(body: Callable[[jax.Array], jax.Array], mesh: Mesh) -> jax.stages.Compiled:
    """Compile `body` for one f32[8,4] a device; each device keeps what it returns."""
    spec = P(mesh.axis_names)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 4), jnp.float32)).compile()


def times(n: int, body: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: lax.scan(lambda c, _: (body(c), None), x, length=n)[0]


def facts(rows: Collectives) -> list[tuple[str, int, tuple[str, ...], int | None, bool]]:
    return [(row.kind, row.bytes, row.axes, row.executions, row.in_loop) for row in rows]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_collectives_without_communication_are_none(rank: int) -> None:
    mesh = mesh_of(rank)
    rows = collectives(compiled(lambda x: 2 * x, mesh), mesh)
    assert len(rows) == 0
    assert str(rows) == "no collectives"
    assert rows.executed_bytes == 0


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_collectives_one_psum_an_axis_is_one_row_of_that_axis(rank: int) -> None:
    mesh = mesh_of(rank)
    for axis in AXES[rank]:
        rows = collectives(compiled(lambda x, axis=axis: lax.psum(x, axis), mesh), mesh)
        assert facts(rows) == [("all-reduce", BYTES, (axis,), 1, False)]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_collectives_psum_in_scan_runs_as_often_as_the_scan(rank: int) -> None:
    mesh = mesh_of(rank)
    rows = collectives(compiled(times(6, lambda x: jnp.sin(lax.psum(x, "data"))), mesh), mesh)
    assert facts(rows) == [("all-reduce", BYTES, ("data",), 6, True)]
    assert rows.executed_bytes == 6 * BYTES


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_collectives_psum_in_nested_scans_multiplies_their_lengths(rank: int) -> None:
    mesh = mesh_of(rank)
    layers = times(3, lambda x: jnp.sin(lax.psum(x, "data")))
    rows = collectives(compiled(times(5, lambda x: layers(x) + 1), mesh), mesh)
    assert facts(rows) == [("all-reduce", BYTES, ("data",), 15, True)]


def test_collectives_psum_over_two_axes_names_both_in_mesh_order() -> None:
    mesh = mesh_of(3)
    rows = collectives(compiled(lambda x: lax.psum(x, ("model", "data")), mesh), mesh)
    assert facts(rows) == [("all-reduce", BYTES, ("data", "model"), 1, False)]
    assert len(rows.over("data")) == len(rows.over("model")) == 1
    assert len(rows.over("fsdp")) == 0


def gather(x: jax.Array) -> jax.Array:
    return lax.all_gather(x, "model", tiled=True)[:8]


def scatter(x: jax.Array) -> jax.Array:
    return jnp.tile(lax.psum_scatter(x, "model", scatter_dimension=0, tiled=True), (2, 1))


def turn(x: jax.Array) -> jax.Array:
    return lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)])


def exchange(x: jax.Array) -> jax.Array:
    return lax.all_to_all(x, "data", 0, 0, tiled=True)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (gather, ("all-gather", 2 * BYTES, ("model",), 1, False)),
        (scatter, ("reduce-scatter", BYTES, ("model",), 1, False)),
        (turn, ("collective-permute", BYTES, ("data",), 1, False)),
        (exchange, ("all-to-all", BYTES, ("data",), 1, False)),
    ],
)
def test_collectives_of_each_kind_give_bytes_and_axes(
    body: Callable[[jax.Array], jax.Array], expected: tuple[str, int, tuple[str, ...], int, bool]
) -> None:
    mesh = mesh_of(2)
    assert facts(collectives(compiled(body, mesh), mesh)) == [expected]


@pytest.mark.parametrize("order", [[7, 6, 5, 4, 3, 2, 1, 0], [3, 1, 4, 0, 5, 7, 2, 6]])
def test_collectives_on_permuted_devices_keep_their_axes(order: list[int]) -> None:
    mesh = mesh_of(3, order)
    for axis in AXES[3]:
        rows = collectives(compiled(lambda x, axis=axis: lax.psum(x, axis), mesh), mesh)
        assert [row.axes for row in rows] == [(axis,)]


def test_collectives_in_branch_run_at_most_as_often_as_the_branch() -> None:
    mesh = mesh_of(2)

    def sometimes(x: jax.Array) -> jax.Array:
        return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, "model"), lambda x: x, x)

    rows = collectives(compiled(times(4, sometimes), mesh), mesh)
    assert facts(rows) == [("all-reduce", BYTES, ("model",), 4, True)]
    assert rows[0].conditional
    assert "at most 4" in str(rows)


def test_collectives_in_loop_of_unknown_length_are_unknown_and_have_no_sum() -> None:
    mesh = mesh_of(1)

    def until(x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda x: x[0, 0] < 9, lambda x: lax.psum(x, "data") + 1, x)

    rows = collectives(compiled(until, mesh), mesh)
    assert facts(rows) == [("all-reduce", BYTES, ("data",), None, True)]
    with pytest.raises(ValueError, match="unknown how often"):
        _ = rows.executed_bytes


def test_collectives_source_names_the_line_of_the_call() -> None:
    mesh = mesh_of(1)

    def summed(x: jax.Array) -> jax.Array:
        return lax.psum(x, "data")

    (row,) = collectives(compiled(summed, mesh), mesh)
    line = summed.__code__.co_firstlineno + 1
    assert row.source.startswith(f"test_collectives.py:{line} (")
    assert row.source.endswith("psum)")


def gspmd(w: jax.Array, xs: jax.Array) -> jax.Array:
    return lax.scan(lambda w, x: (w + jnp.sum(x @ w), None), w, xs)[0]


@pytest.mark.parametrize("order", [None, [3, 1, 4, 0, 5, 7, 2, 6]])
def test_collectives_of_gspmd_scan_run_each_turn_and_find_their_own_mesh(order: list[int] | None) -> None:
    mesh = mesh_of(3, order)
    placed = (NamedSharding(mesh, P(None, "model")), NamedSharding(mesh, P(None, ("data", "fsdp"))))
    shapes = (jax.ShapeDtypeStruct((8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 16, 8), jnp.float32))
    program = jax.jit(gspmd, in_shardings=placed, out_shardings=placed[0]).lower(*shapes).compile()
    rows = collectives(program)
    assert facts(rows) == [
        ("all-reduce", 4, ("model",), 3, True),
        ("all-reduce", 4, ("data", "fsdp"), 3, True),
    ]
    assert rows == collectives(program, mesh)
    assert [row.axes for row in collectives(program.as_text() or "")] == [(), ()]
    assert rows.in_loops == rows


def test_collectives_with_mesh_of_another_size_raises() -> None:
    program = compiled(lambda x: x, mesh_of(1))
    with pytest.raises(ValueError, match="is for 8 devices; the mesh has 4"):
        collectives(program, Mesh(np.array(jax.devices()[:4]), ("data",)))


def test_collectives_are_an_immutable_sequence() -> None:
    mesh = mesh_of(2)
    rows = collectives(compiled(lambda x: exchange(turn(x)), mesh), mesh)
    assert isinstance(rows[0], Collective)
    assert rows[1:] == Collectives(rows.rows[1:])
    assert [row.kind for row in rows] == ["collective-permute", "all-to-all"]
    assert hash(rows) == hash(Collectives(tuple(rows)))


def test_collectives_print_as_an_aligned_table() -> None:
    rows = Collectives(
        (
            Collective("all-reduce", 126_800_000, ("data",), 2, False, False, False, "m.py:7 (jit(f)/psum)"),
            Collective("all-gather", 512, (), None, True, False, True, ""),
        )
    )
    assert str(rows) == (
        "kind                size      axes  executions  in loop  source\n"
        "all-reduce          126.8 MB  data  2           no       m.py:7 (jit(f)/psum)\n"
        "all-gather (async)  512 B     -     unknown     yes      -"
    )
