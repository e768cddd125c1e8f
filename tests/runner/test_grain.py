"""Grain's iterators, as they are: a run that is broken off goes on with the very batches that were to come."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from faults.plan import batch_of, digest, fresh, step

import stepc as sc

NUM, ROWS, STEPS = 64, 4, 13


class Records:
    """One row for each number. Its `repr` is what Grain knows it by."""

    def __repr__(self) -> str:
        return "Records()"

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return {name: leaf[0] for name, leaf in batch_of(int(number) + 1, rows=1).items()}


def dataset(*, seed: int = 0, rows: int = ROWS, num: int = NUM) -> Any:
    shuffled = grain.MapDataset.source(Records())[:num].shuffle(seed=seed)
    return iter(shuffled.batch(rows).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def loader(*, seed: int = 0, rows: int = ROWS, num: int = NUM) -> Any:
    sampler = grain.samplers.IndexSampler(
        num_records=num, shard_options=grain.sharding.NoSharding(), shuffle=True, num_epochs=1, seed=seed
    )
    batches = grain.transforms.Batch(rows, drop_remainder=True)
    return iter(grain.DataLoader(data_source=Records(), sampler=sampler, operations=[batches], worker_count=0))


MAKES = {"MapDataset": dataset, "DataLoader": loader}
# A MapDataset takes any place; a DataLoader compares what it is made of, and raises.
SAYS = {dataset: "not the data of the checkpoint", loader: "cannot return to its saved position: ValueError: Sampler"}


def run_on(data: Any, folder: Path, *, prefetch: int = 0, **options: Any) -> sc.Run:
    keep = sc.Checkpoints(folder / "kept", every=3)
    with sc.JSONL(folder / "metrics.jsonl") as lines:
        return sc.run(
            step(), fresh(), sc.Data(data, prefetch=prefetch), checkpoint=keep, loggers=[lines], log_every=1, **options
        )


def losses(folder: Path) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"event"' not in line]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_grain_run_in_parts_is_the_whole_run_bitwise(make: Callable[..., Any], prefetch: int, tmp_path: Path) -> None:
    whole = run_on(make(), tmp_path / "whole", steps=STEPS, prefetch=prefetch)
    for stop in (1, 3, 8, STEPS):
        parts = run_on(make(), tmp_path / "parts", steps=stop, prefetch=prefetch)
    assert digest(parts.state) == digest(whole.state)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("other", [{"seed": 1}, {"num": NUM - 16}], ids=str)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_grain_other_data_is_refused_and_not_taken_up(
    make: Callable[..., Any], other: dict[str, int], tmp_path: Path
) -> None:
    run_on(make(), tmp_path, steps=9)
    with pytest.raises(sc.ResumeError, match=SAYS[make]):
        run_on(make(**other), tmp_path, steps=STEPS)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_grain_other_batch_size_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    run_on(make(), tmp_path, steps=3)
    with pytest.raises(sc.DataError, match="not that of the batches before the checkpoint"):
        run_on(make(rows=2 * ROWS), tmp_path, steps=STEPS)


def test_grain_dataset_that_refuses_a_place_is_a_resume_error(tmp_path: Path) -> None:
    run_on(dataset(), tmp_path, steps=9)
    with pytest.raises(sc.ResumeError, match="cannot return to its saved position") as raised:
        run_on(dataset(num=NUM // 2), tmp_path, steps=STEPS)
    assert isinstance(raised.value.__cause__, IndexError)
