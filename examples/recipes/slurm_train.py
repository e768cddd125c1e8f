"""The program that `slurm.sbatch` starts, once for each GPU: `python slurm_train.py [STEPS]`.

It resumes exactly, and with another number of processes, which have to divide a batch. The folder of its checkpoints is
on a file system that all hosts share.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

BATCH_SIZE = 64  # of all processes together


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


class Batches:
    """This process's rows of each batch. The number of the next batch is the position, the same on all processes."""

    def __init__(self) -> None:
        self.number = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        x = np.random.default_rng(self.number).normal(size=(BATCH_SIZE, 4)).astype(np.float32)
        self.number += 1
        x = np.split(x, jax.process_count())[jax.process_index()]
        return {"x": x, "y": x.sum(axis=1)}

    def get_state(self) -> int:
        return self.number

    def set_state(self, state: int) -> None:
        self.number = state


def main(directory: Path, *, steps: int) -> sc.Run:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))  # the devices of all processes
    pipeline = sc.update(optax.adam(1e-2)) @ sc.clip(1.0) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
    step = sc.compile(pipeline, mesh=mesh)
    keep = sc.Checkpoints(directory, every=50, exact_resume=True)
    return sc.run(step, step.init({"w": jnp.zeros(4)}), Batches(), steps=steps, checkpoint=keep)


if __name__ == "__main__":
    logging.basicConfig()
    logging.getLogger("stepc").setLevel(logging.INFO)  # where it resumes and what it saves
    if "SLURM_STEP_NODELIST" in os.environ:  # set by `srun`; without it this is the only process
        sc.init_distributed()  # before anything else uses jax
    run = main(Path("runs/slurm"), steps=int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    if jax.process_index() == 0:
        print(run.steps, run.metrics)
