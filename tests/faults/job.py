"""A training job in a process of its own, for tests that end it: by signals, by kill -9, by a full disk.

`python -m faults.job FOLDER` trains with checkpoints in FOLDER/kept and a log in FOLDER/metrics.jsonl, and writes the
digest of the final state to FOLDER/digest.
"""

import argparse
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from faults.plan import FaultPlan, batch_of, digest, fresh, step

import stepc as sc
from stepc.runner.jsonl import JSONL


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--term", help="where SIGTERM comes")
    parser.add_argument("--kill", help="POINT:NUMBER, where the process ends as by kill -9")
    parser.add_argument("--fsize", type=int, help="the most bytes of a file, as a full disk has it")
    options = parser.parse_args()
    if options.fsize:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.fsize, options.fsize))
    place = Place(options.folder, options.term or "")
    plan = FaultPlan()
    batches: Any = plan.batches(options.steps)
    if options.term == "data":
        batches = place.waiting(batches)
    with JSONL(options.folder / "metrics.jsonl") as lines:
        run = sc.run(
            place.step if options.term else step(),
            fresh(),
            batches,
            steps=options.steps,
            on_error={"device": sc.Retry(1)},
            checkpoint=sc.Checkpoints(options.folder / "kept", every=options.every),
            loggers=[lines, place],
            log_every=1,
            eval=(7, place.judge, [batch_of(1)]) if options.term == "eval" else None,
        )
    (options.folder / "digest").write_text(digest(run.state))


class Place:
    """Sends SIGTERM to its own process at one place, twice where that may matter."""

    def __init__(self, folder: Path, where: str) -> None:
        self.folder, self.where, self.is_sent = folder, where, False

    def at(self, where: str, seconds: float = 0.0) -> None:
        if where == self.where and not self.is_sent:
            self.is_sent = True
            threading.Timer(seconds, self._send).start()
            time.sleep(seconds + 0.05 if where != "between" else 0)

    def _send(self) -> None:
        (self.folder / "sent").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGTERM)
        if self.where == "save":
            time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

    def step(self, state: Any, batch: Any) -> Any:
        number = int(batch["n"][0])
        if number == 1 and self.where == "compile":
            self.is_sent = True
            threading.Timer(0.05, self._send).start()
        if number == 20:
            self.at("step")
            self.at("between")
        return step()(state, batch)

    def judge(self, state: Any, batch: Any) -> dict[str, jax.Array]:
        self.at("eval")
        return {"w": state.params["w"].sum()}

    def log(self, metrics: Any, step: int) -> None:
        if step == 20:
            self.at("logger")

    def event(self, name: str, facts: Any, step: int) -> None:
        if name == "checkpoint":
            self.at("save")

    def waiting(self, batches: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number == 12:
                self.is_sent = True
                threading.Timer(0.1, self._send).start()
                time.sleep(60)
            yield batch


if __name__ == "__main__":
    sys.exit(main())
