"""Several processes make the same steps as one, and together refuse what they do not agree on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed.launching import Place, alone, by_open_mpi, by_slurm, started

fault = pytest.mark.fault


def done(folder: Path, num: int) -> list[dict[str, Any]]:
    with started("by_hand", folder, num=num) as job:
        assert job.wait() == [0] * num, [job.said(number) for number in range(num)]
        return [job.found(number) for number in range(num)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return done(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return alone("by_hand", tmp_path_factory.mktemp("one"), devices=4)


def test_two_processes_equal_one_bitwise(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    assert [found["digest"] for found in two] == [one["digest"]] * 2
    assert two[0]["adam"] == two[1]["adam"]
    np.testing.assert_allclose(two[0]["adam"], one["adam"], rtol=0, atol=1e-6)  # Adam rounds a mean of squares
    assert [found["traces"] for found in two] == [1, 1]


def test_every_level_of_zero_on_two_processes_equals_one(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    assert two[0]["zero"] == two[1]["zero"]
    for level in range(4):  # `clip` sums its norm in another order
        np.testing.assert_allclose(two[0]["zero"][level], one["zero"][0], rtol=0, atol=1e-6)
    assert two[0]["specs"] == one["specs"] == ["P()"] + ["P('data',)"] * 3


def test_four_processes_equal_one(tmp_path: Path) -> None:
    four = done(tmp_path / "four", 4)
    one = alone("by_hand", tmp_path / "one", devices=8)
    assert len({found["digest"] for found in four}) == 1
    assert len({str(found["adam"]) for found in four}) == 1
    np.testing.assert_allclose(four[0]["zero"], one["zero"], rtol=0, atol=1e-6)
    # Four processes sum in another order than one.
    np.testing.assert_allclose(four[0]["adam"], one["adam"], rtol=0, atol=1e-6)
    assert "process 0: " in four[0]["refused"]["seed"] and "process 1: " in four[0]["refused"]["seed"]


@fault("76", "another seed, parameters, pipeline on one process", "ConfigError on both before a collective, both sides")
@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("seed", ("seed", "process 0: 0; process 1: 1")),
        ("params", ("params/w", "process 0: float32[8] crc32", "process 1: float32[8] crc32")),
        ("pipeline", ("pipeline", "process 0: compile(ema(0.25) @ update", "process 1: compile(ema(0.5) @ update")),
    ],
)
def test_start_that_differs_is_refused_on_both(two: list[dict[str, Any]], what: str, shown: tuple[str, ...]) -> None:
    texts = [found["refused"][what] for found in two]
    assert texts[0] == texts[1]
    assert texts[0].startswith("ConfigError: The processes do not agree on the pipeline and parameters.")
    assert all(part in texts[0] for part in shown), texts[0]


@fault("76", "another learning rate on one process, in a closure", "ConfigError on both before it runs, with the lines")
def test_program_that_differs_is_refused_on_both(two: list[dict[str, Any]]) -> None:
    texts = [found["refused"]["program"] for found in two]
    assert texts[0] == texts[1]
    assert texts[0].startswith("ConfigError: The processes do not agree on the program.")
    assert "-0.5:f32[]" in texts[0] and "-1.5:f32[]" in texts[0]


@fault("76", "another number of rows on one process", "BatchError on both before a collective, with both sides")
def test_uneven_rows_are_refused_on_both(two: list[dict[str, Any]]) -> None:
    texts = [found["refused"]["uneven"] for found in two]
    assert texts[0] == texts[1]
    assert texts[0].startswith("BatchError: The batches of the processes have different signatures.")
    assert "x  process 0: float32[8, 8]; process 1: float32[6, 8]" in texts[0]


def test_global_batch_that_does_not_divide_is_refused(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert (
            "2 rows do not divide by 8 = 2 (`accumulate(2)`) × 4 (mesh axis 'data')" in found["refused"]["indivisible"]
        )


def test_second_call_of_init_distributed_is_refused(two: list[dict[str, Any]]) -> None:
    assert two[0]["refused"]["twice"].startswith("ConfigError: `init_distributed` was already called")


def test_init_distributed_without_any_address_is_refused(tmp_path: Path) -> None:
    with started("nowhere", tmp_path, num=1) as job:
        assert job.wait() == [0], job.said(0)
        assert "coordinator_address should be defined" in job.found(0)["refused"]


def padded(folder: Path, num: int, **told: object) -> list[dict[str, Any]]:
    if num == 1:
        return [alone("padded", folder, devices=4, **told)]
    with started("padded", folder, num=num, **told) as job:
        assert job.wait() == [0] * num, [job.said(number) for number in range(num)]
        return [job.found(number) for number in range(num)]


@pytest.mark.parametrize("outer", ["data", "model"])
def test_padded_state_and_its_checkpoint_are_those_of_one_process(outer: str, tmp_path: Path) -> None:
    """Two processes begin, with one column of padding; four go on, with three; one ends."""
    whole = padded(tmp_path / "whole", 1, outer=outer, steps=6)[0]
    for num, steps, columns in ((2, 2, 6), (4, 4, 8), (1, 6, 6)):
        found = padded(tmp_path / "job", num, outer=outer, steps=steps)
        assert [(one["columns"], one["is_nan"], one["traces"]) for one in found] == [(columns, True, 1)] * num
        assert len({one["digest"] for one in found}) == 1
        assert ("resumed" in found[0]["events"]) is (steps > 2)
        assert "resume_not_exact" not in found[0]["events"]
    assert found[0]["digest"] == whole["digest"]
    assert np.any(whole["params"])


@pytest.mark.parametrize("zero", [0, 3])
def test_padded_adam_on_two_processes_equals_one(zero: int, tmp_path: Path) -> None:
    told = {"outer": "model", "steps": 3, "zero": zero, "optimizer": "adam"}
    two, one = padded(tmp_path / "two", 2, **told), padded(tmp_path / "one", 1, **told)[0]
    assert two[0]["params"] == two[1]["params"]
    np.testing.assert_allclose(two[0]["params"], one["params"], rtol=0, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("place", [by_slurm, by_open_mpi])
def test_processes_of_slurm_and_open_mpi_find_each_other(place: Place, tmp_path: Path) -> None:
    with started("joined", tmp_path, place=place) as job:
        assert job.wait() == [0, 0], [job.said(0), job.said(1)]
        found = [job.found(process) for process in (0, 1)]
    assert [(one["process"], one["num"]) for one in found] == [(0, 2), (1, 2)]
    assert found[0]["digest"] == found[1]["digest"]


def test_missing_processes_are_logged_before_jax_aborts(tmp_path: Path) -> None:
    with started("alone", tmp_path, num=1) as job:
        assert job.wait() == [-6]  # jax ends it by SIGABRT
        assert "the other processes did not start within 3 s" in job.said(0)
