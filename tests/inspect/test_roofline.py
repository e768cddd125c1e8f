"""Estimates from peaks, with numbers that can be checked in the head."""

import pytest

import stepc as sc
from stepc.inspect import Collective, Cost, Memory, roofline
from stepc.inspect.roofline import Device, duration, wire_bytes

ROUND = Device("round", "", 1e12, 1000, 1e9, 1e6, "ours")


def sends(kind: str, *, executions: int | None = 1) -> Collective:
    return Collective(kind, 800, ("data",), executions, False, False, False, "", group_size=8)


def memory(total: int) -> Memory:
    return Memory(arguments=total, outputs=0, aliased=0, temporaries=0, code=0)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 1400.0),
        ("reduce-scatter", 700.0),
        ("all-gather", 700.0),
        ("all-to-all", 700.0),
        ("collective-permute", 800.0),
    ],
)
def test_wire_bytes_of_each_kind_are_those_of_a_ring(kind: str, sent: float) -> None:
    assert wire_bytes(sends(kind)) == sent


def test_roofline_divides_by_the_peaks() -> None:
    found = roofline(Cost(2 * 10**12, 10**9, ()), memory(900), [sends("all-reduce", executions=2)], ROUND)
    assert found is not None
    assert (found.compute_seconds, found.memory_seconds, found.exchange_seconds) == (2.0, 1.0, 0.0028)
    assert (found.overlapped_seconds, found.exposed_seconds) == (2.0, 2.0028)
    assert (found.bound, found.fits) == ("compute", True)
    assert str(found) == (
        "round: an estimate, 2 s (all overlapped) to 2 s (no exchange overlapped), bound by compute; 90% of its memory"
    )


@pytest.mark.parametrize(("cost", "bound"), [(Cost(1, 10**9, ()), "memory"), (Cost(1, 1, ()), "links")])
def test_roofline_names_what_binds(cost: Cost, bound: str) -> None:
    found = roofline(cost, memory(1001), [sends("all-reduce")], ROUND)
    assert found is not None
    assert (found.bound, found.fits) == (bound, False)
    assert "does not fit: 100% of its memory" in str(found)


@pytest.mark.parametrize(
    ("cost", "executions"), [(Cost(None, 1, ()), 1), (Cost(1, None, ()), 1), (Cost(1, 1, ()), None)]
)
def test_roofline_of_what_is_unknown_is_none(cost: Cost, executions: int | None) -> None:
    assert roofline(cost, memory(1), [sends("all-reduce", executions=executions)], ROUND) is None


def test_roofline_of_a_named_device_takes_its_shape_too() -> None:
    short, whole = (roofline(Cost(1, 1, ()), memory(1), [], name) for name in ("tpu:v5e", "tpu:v5e:16x16"))
    assert short == whole


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2.0, "2 s"), (0.00125, "1.25 ms"), (3.4e-4, "340 us"), (5e-9, "5 ns"), (0.0, "0 ns")]
)
def test_duration_prints_three_digits(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_roofline_of_a_compiled_step_names_its_device() -> None:
    with pytest.raises(sc.ConfigError, match="not in the table"):
        roofline(Cost(1, 1, ()), memory(1), [], "tpu:v1")
