"""A training job in a process of its own, for tests that end it by signals, kill -9 or a full disk.

`python -m faults.job FOLDER` trains with checkpoints in FOLDER/kept and a log in FOLDER/metrics.jsonl, and writes the
digest of the final state to FOLDER/digest.
"""

import argparse
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from faults.plan import FaultPlan, batch_of, digest, fresh, step
from faults.points import POINTS, act_at
from waiting import LIMIT_SECONDS

import stepc as sc
from stepc._runner.loggers.files import JSONL


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--term", help="where SIGTERM comes")
    parser.add_argument("--kill", choices=POINTS, help="where the process ends by kill -9")
    parser.add_argument("--hang", choices=POINTS, help="where the disk does not answer until the run has ended")
    parser.add_argument(
        "--lose", choices=("removed", "file", "read-only"), help="what happens to the checkpoint directory"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="how long a save may take")
    parser.add_argument("--fsize", type=int, help="the largest size of a file, which stands for a full disk")
    options = parser.parse_args(arguments)
    has_ended = threading.Event()
    if options.kill:
        act_at(options.kill, lambda: end(options))
    if options.hang:
        act_at(options.hang, lambda: has_ended.wait(LIMIT_SECONDS))
    if options.fsize:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.fsize, options.fsize))
    termination = SelfTermination(options.folder, options.term or "", options.lose or "")
    if options.lose == "read-only" and os.getuid() == 0:
        os.setuid(65534)  # nothing is read-only to root
    plan = FaultPlan()
    batches: Any = plan.batches(options.steps)
    if options.term == "data":
        batches = termination.waiting(batches)
    with JSONL(options.folder / "metrics.jsonl") as lines, ExitStack() as at_the_end:
        at_the_end.callback(has_ended.set)
        run = sc.run(
            termination.step if options.term else step(),
            fresh(),
            batches,
            steps=options.steps,
            on_error={"device": sc.Retry(1)},
            checkpoint=sc.Checkpoints(options.folder / "kept", every=options.every, timeout_seconds=options.timeout),
            loggers=[lines, termination],
            log_every=1,
            buffers=sc.Buffers(in_flight=0 if options.kill else 2),  # a point is reached at the step that it names
            eval=sc.Eval(7, termination.judge, [batch_of(1)]) if options.term == "eval" else None,
        )
    (options.folder / "digest").write_text(digest(run.state))


def end(options: argparse.Namespace) -> None:
    """kill -9; "in a line of the log" first writes half a line, as a dying process may."""
    if options.kill == "in a line of the log":
        with (options.folder / "metrics.jsonl").open("a") as lines:
            lines.write('{"step": 45, "lo')
    os.kill(os.getpid(), signal.SIGKILL)


def lost(folder: Path, how: str) -> None:
    match how:
        case "read-only":
            folder.chmod(0o555)
        case "removed":
            shutil.rmtree(folder)
        case _:
            shutil.rmtree(folder)
            folder.write_text("a file where the directory was")


class SelfTermination:
    """Sends SIGTERM to its own process at one place in the run, and during a save twice."""

    def __init__(self, folder: Path, where: str, lose: str = "") -> None:
        self.folder, self.where, self.lose, self.is_sent = folder, where, lose, False

    def at(self, where: str) -> None:
        if where == self.where and not self.is_sent:
            self.is_sent = True
            if where == "between":  # by another thread, whenever that runs
                threading.Timer(0.0, self._send).start()
            else:
                self._send()

    def _send(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        if self.where == "save":  # while the last checkpoint is written
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM)).start()

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
        sys.audit("job.finished", step)
        sys.audit("job.writing", step)
        if step == 20:
            self.at("logger")

    def event(self, name: str, facts: Any, step: int) -> None:
        if name == "checkpoint":
            self.at("save")
            if self.lose:
                lost(self.folder / "kept", self.lose)

    def waiting(self, batches: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number == 12:
                self.is_sent = True
                threading.Timer(0.1, self._send).start()
                time.sleep(LIMIT_SECONDS)
            yield batch


if __name__ == "__main__":
    sys.exit(main())
