"""A torch `DataLoader` as data. A run that resumes has its state back, and reads the data from the beginning.

A `DataLoader` has no position. The event `resume_not_exact` says so, and `Checkpoints(…, exact_resume=True)` refuses to
resume. `torch_exact.py` has a position. Workers need `multiprocessing_context="forkserver"`: JAX has threads, and a
process with threads may hang after a fork.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from torch.utils.data import DataLoader, TensorDataset

import stepc as sc

BATCH_SIZE = 8


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


def named(rows: list[Any]) -> dict[str, torch.Tensor]:
    """The rows of a batch as one dict. The run takes the tensors as they are."""
    x, y = zip(*rows, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


def epochs(loader: DataLoader) -> Iterator[Any]:
    """A `DataLoader` ends after an epoch; a run ends with its data, or after `steps`."""
    while True:
        yield from loader


def main(directory: Path, *, steps: int) -> sc.Run:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    rows = TensorDataset(x, x.sum(1))
    order = torch.Generator().manual_seed(1)
    # With `drop_last` each batch has the shape of the first; else: `sc.Data(…, short_batches="pad")` and a mask.
    loader = DataLoader(rows, BATCH_SIZE, shuffle=True, generator=order, drop_last=True, collate_fn=named)

    step = sc.compile(sc.update(optax.adam(1e-2)) @ sc.accumulate(2) @ sc.grad(loss))
    keep = sc.Checkpoints(directory, every=5)
    return sc.run(
        step, step.init({"w": jnp.zeros(4)}), sc.Data(epochs(loader), prefetch=2), steps=steps, checkpoint=keep
    )


if __name__ == "__main__":
    run = main(Path("runs/torch_dataloader"), steps=40)
    print(run.steps, run.metrics)
