"""A logger for MLflow, here with its database in a file.

A run that resumes goes on in the same run of MLflow, by the id in a file beside the checkpoints. Steps that were logged
after its checkpoint are logged again, and MLflow keeps both values of a step.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mlflow
import numpy as np
import optax

import stepc as sc


class MlflowLogger:
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        mlflow.log_metrics(dict(metrics), step=step)

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None:
        mlflow.set_tags({f"{name}.{key}": value[:5000] for key, value in facts.items()})  # the last of each name


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((rows["x"] @ params["w"] - rows["y"]) ** 2)


def main(directory: Path, *, steps: int) -> sc.Run:
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    batch = {"x": x, "y": x.sum(axis=1)}
    step = sc.compile(sc.update(optax.adam(1e-2)) @ sc.grad(loss))
    directory.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{directory.absolute()}/mlflow.db")
    written = directory / "mlflow_run_id"
    with mlflow.start_run(written.read_text() if written.exists() else None) as tracked:
        written.write_text(tracked.info.run_id)
        return sc.run(
            step,
            step.init({"w": jnp.zeros(4)}),
            [batch] * steps,  # real data resumes exactly: see the recipes for data
            steps=steps,
            checkpoint=sc.Checkpoints(directory / "checkpoints", every=10),
            loggers=[MlflowLogger()],
        )


if __name__ == "__main__":
    run = main(Path("runs/mlflow"), steps=40)
    print(run.steps, run.metrics)
