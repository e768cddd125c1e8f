"""A torch `DataLoader` with a position: a run that resumes reads the batches that were to come, bitwise.

It is for a data set with an index. The order of an epoch depends on its seed alone, so the number of the next batch is
the position, with workers too. Random augmentation in `__getitem__` has to take its seed from the index and the epoch.
"""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset

import stepc as sc

BATCH_SIZE = 8


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


def named(rows: list[Any]) -> dict[str, torch.Tensor]:
    x, y = zip(*rows, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


class Order(Sampler):
    """The indices of each batch from the batch `first` on, epoch after epoch. A short last batch is left out."""

    def __init__(self, num_rows: int, *, seed: int) -> None:
        self.num_rows, self.seed, self.first = num_rows, seed, 0

    def __iter__(self) -> Iterator[list[int]]:
        epoch, place = divmod(self.first, self.num_rows // BATCH_SIZE)
        for number in count(epoch):
            order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(self.seed + number))
            batches = order.split(BATCH_SIZE)[: self.num_rows // BATCH_SIZE]
            yield from (batch.tolist() for batch in batches[place if number == epoch else 0 :])


class Batches:
    """The batches of a loader, with a position: the number of the next one."""

    def __init__(self, loader: DataLoader, order: Order) -> None:
        self.loader, self.order = loader, order
        self.set_state(0)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        if self.batches is None:
            self.batches = iter(self.loader)  # workers start here
        batch = next(self.batches)
        self.number += 1
        return batch

    def get_state(self) -> int:
        return self.number

    def set_state(self, state: int) -> None:
        self.number = self.order.first = state
        self.batches: Iterator[Any] | None = None


def main(directory: Path, *, steps: int, num_workers: int = 0) -> sc.Run:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    rows, order = TensorDataset(x, x.sum(1)), Order(len(x), seed=1)
    start = "forkserver" if num_workers else None  # JAX has threads: a fork of this process may hang
    loader = DataLoader(
        rows, batch_sampler=order, collate_fn=named, num_workers=num_workers, multiprocessing_context=start
    )
    data = sc.Data(Batches(loader, order), prefetch=2)

    step = sc.compile(sc.update(optax.adam(1e-2)) @ sc.accumulate(2) @ sc.grad(loss))
    keep = sc.Checkpoints(directory, every=5, exact_resume=True)
    return sc.run(step, step.init({"w": jnp.zeros(4)}), data, steps=steps, checkpoint=keep)


if __name__ == "__main__":
    run = main(Path("runs/torch_exact"), steps=40)
    print(run.steps, run.metrics)
