"""A logger for Weights & Biases, here in offline mode.

A run that resumes has the same id. Offline, each start writes a folder of its own, and `wandb sync` uploads them. Steps
that were logged after the checkpoint are logged again. Online, add `resume="allow"`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import wandb

import stepc as sc


class WandbLogger:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None:
        if name == "start":  # the pipeline, the mesh and the versions
            self.run.config.update(dict(facts), allow_val_change=True)


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


def main(directory: Path, *, steps: int) -> sc.Run:
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    batch = {"x": x, "y": x.sum(axis=1)}
    step = sc.compile(sc.update(optax.adam(1e-2)) @ sc.grad(loss))
    directory.mkdir(parents=True, exist_ok=True)
    with wandb.init(project="recipes", id=directory.name, dir=directory, mode="offline") as tracker:
        return sc.run(
            step,
            step.init({"w": jnp.zeros(4)}),
            [batch] * steps,  # real data resumes exactly: see the recipes for data
            steps=steps,
            checkpoint=sc.Checkpoints(directory / "checkpoints", every=10),
            loggers=[WandbLogger(tracker)],
        )


if __name__ == "__main__":
    run = main(Path("runs/wandb"), steps=40)
    print(run.steps, run.metrics)
