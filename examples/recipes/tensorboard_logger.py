"""`sc.TensorBoard` for the curves, and a hook that adds an image.

A run that resumes marks the steps after its checkpoint as purged: TensorBoard shows what is logged again. The images of
the hook are in a folder of their own, and stay.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tensorboardX import SummaryWriter

import stepc as sc


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


def main(directory: Path, *, steps: int) -> sc.Run:
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    batch = {"x": x, "y": x.sum(axis=1)}
    step = sc.compile(sc.update(optax.adam(1e-2)) @ sc.grad(loss))
    with sc.TensorBoard(directory / "curves") as curves, SummaryWriter(str(directory / "images")) as images:

        def show(number: int, metrics: Any, snapshot: Any) -> None:
            weights = np.asarray(snapshot().params["w"])
            images.add_image("w", weights[None, None].clip(0, 1), number)

        return sc.run(
            step,
            step.init({"w": jnp.zeros(4)}),
            [batch] * steps,  # real data resumes exactly: see the recipes for data
            steps=steps,
            checkpoint=sc.Checkpoints(directory / "checkpoints", every=10),
            loggers=[curves],
            hooks=[(20, show)],
        )


if __name__ == "__main__":
    run = main(Path("runs/tensorboard"), steps=40)
    print(run.steps, run.metrics)
