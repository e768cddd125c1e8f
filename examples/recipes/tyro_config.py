"""A command line by tyro: a dataclass is the configuration, and the pipeline is a function of it.

    python tyro_config.py --optimizer sgd --learning-rate 0.1 --clip None

The same directory resumes, with another optimizer's numbers too: the event `pipeline_changed` prints both pipelines. An
optimizer whose state has other leaves is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import stepc as sc


@dataclass(frozen=True)
class Config:
    """Fit a line."""

    directory: Path = Path("runs/tyro")  # of the checkpoints
    steps: int = 40  # the number of the last step, counting those of earlier runs
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-2
    clip: float | None = 1.0  # the largest norm of the gradient
    num_microbatches: int = 2


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


def pipeline(config: Config) -> sc.Pipeline:
    optimizer = {"adam": optax.adam, "sgd": optax.sgd}[config.optimizer]
    gradient = sc.accumulate(config.num_microbatches) @ sc.grad(loss)
    if config.clip is not None:
        gradient = sc.clip(config.clip) @ gradient
    return sc.update(optimizer(config.learning_rate)) @ gradient


def main(config: Config) -> sc.Run:
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    batch = {"x": x, "y": x.sum(axis=1)}
    step = sc.compile(pipeline(config))
    keep = sc.Checkpoints(config.directory, every=10)
    return sc.run(step, step.init({"w": jnp.zeros(4)}), [batch] * config.steps, steps=config.steps, checkpoint=keep)


if __name__ == "__main__":
    run = main(tyro.cli(Config))
    print(run.steps, run.metrics)
