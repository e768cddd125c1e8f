"""The course of programs whose course is known."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from by_hand import BYTES, DUMPS, LAYERS, K, compiled, mesh_of_rank

from stepc.inspect import collectives, cost
from stepc.inspect.roofline import DEVICES, Device, wire_bytes
from stepc.inspect.timeline import CollectiveSegment, ComputeSegment, LoopSegment, Segment, timeline

ROUND = Device("round", "", 10.0, 1, 1000.0, 4.0, "ours")


def shape(segments: tuple[Segment, ...] | None) -> str:
    """`work`, `exchange`, `loop(...)` in a row."""
    assert segments is not None
    names = []
    for segment in segments:
        match segment:
            case LoopSegment(_, inner):
                names.append(f"loop({shape(inner)})")
            case ComputeSegment():
                names.append("work")
            case CollectiveSegment():
                names.append("exchange")
    return " ".join(names)


def parts(segments: tuple[Segment, ...] | None) -> list[tuple[int, ComputeSegment | CollectiveSegment]]:
    """Every part, and how often it runs."""
    assert segments is not None
    found: list[tuple[int, ComputeSegment | CollectiveSegment]] = []
    for segment in segments:
        match segment:
            case LoopSegment(times, inner):
                found += [(times * inside, part) for inside, part in parts(inner)]
            case _:
                found.append((1, segment))
    return found


@pytest.mark.parametrize("path", sorted(DUMPS.glob("*.txt")), ids=lambda path: path.stem)
def test_timeline_adds_up_to_the_cost_and_the_collectives(path: Path) -> None:
    text = path.read_text()
    found, work, rows = parts(timeline(text)), cost(text), collectives(text)
    assert sum(times * part.flops for times, part in found if isinstance(part, ComputeSegment)) == work.flops
    assert work.bytes is not None
    own = sum(times * part.bytes for times, part in found if isinstance(part, ComputeSegment))
    assert own <= work.bytes  # what a collective reads and writes in memory is no work
    sent = sum(times * part.times * part.wire_bytes for times, part in found if isinstance(part, CollectiveSegment))
    assert sent == sum(wire_bytes(row) * (row.executions or 0) for row in rows)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", "work loop(work) work"),
        ("once", "work loop(work) exchange work"),
        ("overlapped", "work exchange work"),
    ],
)
def test_timeline_of_known_steps_has_their_course(name: str, platform: str, expected: str) -> None:
    (path,) = DUMPS.glob(f"{platform}-{name}-*")
    assert shape(timeline(path.read_text())) == expected


def test_timeline_of_a_reduction_a_microbatch_has_it_in_the_loop() -> None:
    mesh = mesh_of_rank(1, jax.devices())
    segments = timeline(compiled("each", mesh), mesh)
    assert shape(segments) == "loop(work exchange work) work" or shape(segments) == "work loop(work exchange work) work"
    (loop,) = [segment for segment in segments or () if isinstance(segment, LoopSegment)]
    assert (loop.times, loop.label) == (K, "while")
    (exchange,) = [part for part in loop.segments if isinstance(part, CollectiveSegment)]
    assert (exchange.axes, exchange.wire_bytes) == (("data",), 2 * 7 / 8 * BYTES)


def test_timeline_of_layers_multiplies_them_out_in_the_microbatch() -> None:
    (path,) = DUMPS.glob("gpu-layers-*")
    (loop,) = [segment for segment in timeline(path.read_text()) or () if isinstance(segment, LoopSegment)]
    (exchange,) = [part for part in loop.segments if isinstance(part, CollectiveSegment)]
    assert (loop.times, exchange.times) == (K, LAYERS)


def test_seconds_are_the_slower_of_arithmetic_and_memory() -> None:
    work = ComputeSegment(100, 1000, "")
    assert work.seconds(ROUND) == 10.0
    assert ComputeSegment(1, 2000, "").seconds(ROUND) == 2.0
    exchange = CollectiveSegment("all-reduce", 8.0, 3, (), False, "")
    assert exchange.seconds(ROUND) == 6.0
    assert LoopSegment(4, (work, exchange), "").seconds(ROUND) == 64.0


def test_timeline_of_a_loop_of_unknown_length_is_none() -> None:
    program = jax.jit(lambda w: jax.lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w @ w, w))
    assert timeline(program.lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile()) is None


def test_timeline_of_a_loop_without_products_is_work() -> None:
    program = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=9)[0])
    segments = timeline(program.lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile())
    assert shape(segments) == "work"
    assert segments is not None and segments[0].seconds(DEVICES["tpu:v5e"]) > 0
