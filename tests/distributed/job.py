"""One process of a job: `python -m distributed.job CASE FOLDER`, in the environment that `stepc launch` sets.

It writes what it found to FOLDER/<process>.json.
"""

import dataclasses
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from faults.plan import Remembering, digest
from jax.experimental.multihost_utils import process_allgather

import stepc as sc
from stepc._runner.multihost import GroupCommit

FEATURES, ROWS = 8, 16  # rows of the batch of all processes
TRUTH = np.float32([1.0, -2.0, 0.5, 3.0, 0.0, 1.0, -1.0, 2.0])


def loss(params: Any, batch: Any) -> jax.Array:
    return ((batch["x"] @ params["w"] - batch["y"]) ** 2).mean()


def global_batch(number: int) -> dict[str, np.ndarray]:
    """Whole numbers, so that sums are exact in any order."""
    x = np.random.default_rng(number).integers(-3, 4, size=(ROWS, FEATURES)).astype(np.float32)
    return {"x": x, "y": x @ TRUTH}


def local(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of this process."""
    rows = ROWS // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    return {name: leaf[mine] for name, leaf in batch.items()}


def compiled(optimizer: Any = None, *, words: Callable[[Any], Any] = lambda inner: inner, zero: int = 0) -> sc.Step:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    gradient = sc.clip(10.0) @ sc.accumulate(2) @ sc.shard(sc.dp("data", zero=zero)) @ sc.grad(loss)
    return sc.compile(words(sc.update(optimizer or optax.sgd(2.0**-6)) @ gradient), mesh=mesh)


def fresh(step: sc.Step, **more: Any) -> sc.State:
    return step.init({"w": np.zeros(FEATURES, np.float32)}, **{"seed": 7, **more})


def refusal(act: Callable[[], object]) -> str:
    """The class and the text of what is raised."""
    try:
        act()
    except sc.StepcError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def three_steps(step: sc.Step, *, first: int = 0) -> tuple[sc.State, Any]:
    state = fresh(step)
    metrics: Any = {}
    for number in range(first, first + 3):
        state, metrics = step(state, local(global_batch(number)))
    return state, metrics


def gathered(state: sc.State) -> Any:
    """Every leaf, gathered on this process."""
    bare = dataclasses.replace(state, rng=jax.random.key_data(state.rng))
    return jax.tree.map(
        lambda leaf: process_allgather(leaf, tiled=True) if spans_processes(leaf) else np.asarray(leaf), bare
    )


def spans_processes(leaf: jax.Array) -> bool:
    return not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def first_rows(batch: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    return {name: leaf[:number] for name, leaf in batch.items()}


def by_hand(folder: Path) -> dict[str, Any]:
    """Steps without a runner, and errors that all processes raise together and then go on from."""
    me, step = jax.process_index(), compiled(optax.sign_sgd(0.25))  # exact, whatever norm `clip` measures
    other, short = compiled(optax.sgd(0.5 + me)), local(global_batch(0))
    state = fresh(step)
    refused = {
        "seed": refusal(lambda: fresh(step, seed=me)),
        "params": refusal(lambda: step.init({"w": np.full(FEATURES, me, np.float32)})),
        "program": refusal(lambda: other(fresh(other), short)),
        "pipeline": refusal(lambda: fresh(compiled(words=sc.ema(0.5) if me else sc.ema(0.25)))),
        "uneven": refusal(
            lambda: step(state, {name: leaf[: len(leaf) - 2 * (me == 1)] for name, leaf in short.items()})
        ),
        "indivisible": refusal(lambda: step(state, first_rows(short, 1))),
        "twice": refusal(sc.init_distributed),
    }
    state, metrics = three_steps(step)
    adam, _ = three_steps(compiled(optax.adam(0.1)))
    in_parts = {zero: three_steps(compiled(optax.sgd(2.0**-6, momentum=0.5), zero=zero))[0] for zero in range(4)}
    return {
        "zero": [gathered(state).params["w"].tolist() for state in in_parts.values()],
        "specs": [str(state.opt_state[0].trace["w"].sharding.spec) for state in in_parts.values()],
        "digest": digest(state),
        "loss": float(metrics["loss"]),
        "traces": step.traces,
        "adam": np.asarray(adam.params["w"]).tolist(),
        "refused": refused if jax.process_count() > 1 else {},
    }


class Rows:
    """An iterator with a position over the local rows of batches 1 to 20, with one fault.

    Args:
      at: the batch with the fault, on process `on`.
      fault: see `inject`.
      part: the rows of this process.
    """

    def __init__(
        self, folder: Path, *, fault: str = "", at: int = 0, on: int = 1, part: Callable[[Any], Any] = local
    ) -> None:
        self.folder, self.num, self.part = folder, 20, part
        self.fault, self.at, self.is_due = fault, at, on == jax.process_index()
        self.given = 0

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> Any:
        number = self.given + 1
        if number > (self.at if self.fault == "ends" and self.is_due else self.num):
            raise StopIteration
        self.given = number
        batch = self.part(global_batch(number))
        return self.inject(batch) if number == self.at and self.is_due else batch

    def inject(self, batch: dict[str, np.ndarray]) -> Any:
        match self.fault:
            case "read_once":
                self.given, self.fault = self.given - 1, ""
                raise OSError("the disk is slow")
            case "read":
                raise OSError("the disk is gone")
            case "rows":
                return first_rows(batch, len(batch["x"]) // 2)
            case "nan":
                batch["y"][0] = np.nan
            case "term":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
            case "int":
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)
            case "read-only later":
                while not (self.folder / "kept" / "3").is_dir():
                    time.sleep(0.01)  # until the first checkpoint is committed
                make_read_only(self.folder / "kept")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                time.sleep(1000)
        return batch

    def get_state(self) -> dict[str, Any]:
        if self.fault == "position" and self.is_due and self.given >= self.at:
            return {"given": {self.given}}  # a set, which JSON cannot hold
        return {"given": self.given}

    def set_state(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class Failing:
    """A logger, a hook and a step, one of which fails at one step."""

    def __init__(self, where: str, at: int, on: int, zero: int) -> None:
        self.where, self.at, self.is_due = where, at, on == jax.process_index()
        self.num_calls = 0
        # With the sign every state is a multiple of 1/4: sums are exact in any order, after any number of steps.
        self.step = compiled(
            optax.sign_sgd(0.25), words=sc.skip_nonfinite(limit=3) if where == "guarded" else lambda inner: inner
        )

    def fail(self, where: str, number: int) -> None:
        if where == self.where and self.is_due and number == self.at:
            raise RuntimeError(f"the {where} has failed")

    def log(self, metrics: Any, step: int) -> None:
        self.fail("logger", step)

    def hook(self, number: int, metrics: Any, snapshot: Any) -> sc.Stop | None:
        self.fail("hook", number)
        if self.where == "exit" and self.is_due and number == self.at:
            sys.exit(3)
        return sc.Stop("enough") if self.where == "stop" and self.is_due and number == self.at else None

    def __call__(self, state: Any, batch: Any) -> Any:
        self.num_calls += 1
        self.fail("step", self.num_calls)
        if self.where == "state" and self.is_due and self.num_calls == self.at:
            state = corrupted(state)
        return self.step(state, batch)


def seconds_to_warm_up(step: sc.Step) -> float:
    """Compile all that a run compiles; how long that takes on the slower process, which measures the machine."""
    began = time.monotonic()
    sc.run(step, fresh(step), [local(global_batch(0))] * 2)
    return float(process_allgather(np.float32(time.monotonic() - began)).max())


def corrupted(state: sc.State) -> sc.State:
    """A state with one number changed in one replica, as by a memory fault, on this process alone."""
    leaf = state.params["w"]
    copies = [shard.data for shard in leaf.addressable_shards]
    copies[0] = jax.device_put(np.asarray(copies[0]) + np.float32(2.0**-20), copies[0].device)
    new = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, copies)
    return dataclasses.replace(state, params={"w": new})


def run(folder: Path, *, fault: str = "", at: str = "7", on: str = "1", **options: Any) -> Any:
    """A run with a fault: how it ended, and the digest of the state on this process."""
    failing, told = Failing(options.pop("where", ""), int(at), int(on), int(options.pop("zero", 0))), Remembering()
    raises = options.pop("raises", "")
    if fault == "full" and int(on) == jax.process_index():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(options.pop("bytes")), resource.RLIM_INFINITY))
    options.pop("bytes", None)
    if "differs" in options and jax.process_index() == 1:
        options |= dict([options["differs"].split(":")])
    options.pop("differs", None)
    if options.pop("dies", "") and int(on) == jax.process_index():
        GroupCommit.barrier = GroupCommit.gather = kill  # pyright: ignore[reportAttributeAccessIssue]
    if fault == "read-only" and int(on) == jax.process_index():
        wait = GroupCommit.barrier

        def wait_and_make_read_only(commit: GroupCommit, **more: Any) -> None:
            wait(commit, **more)
            # In the thread that commits every leaf is written. Earlier, what the storage has begun may hang.
            if threading.current_thread().name != "stepc-save":
                make_read_only(folder / "kept")

        GroupCommit.barrier = wait_and_make_read_only
    prefetch, on_error = int(options.pop("prefetch", 0)), STRICT[options.pop("on_error", "raise")]
    watchdog = sc.Watchdog(
        warn_seconds=max(float(options["warn_seconds"]), seconds_to_warm_up(failing.step))
        if "warn_seconds" in options
        else None,
        compare_replicas_every=int(options["compare_every"]) if "compare_every" in options else None,
    )
    more: dict[str, Any] = {name: READ[name](value, folder) for name, value in options.items() if name in READ}
    if "best_every" in more:
        more["checkpoint"] = more.pop("best_every")
    rows = Rows(folder, fault=fault, at=int(at), on=int(on))
    step = failing if failing.where in ("step", "state") else failing.step
    hooks = [(1, failing.hook)] if failing.where in ("hook", "exit", "stop") else []
    loggers = [told, failing] if failing.where == "logger" else [told]
    found: dict[str, Any] = {}
    try:
        run = sc.run(
            step,
            fresh(failing.step),
            sc.Data(rows, prefetch=prefetch, short_batches=options.get("short_batches", "raise")),
            loggers=loggers,
            hooks=hooks,
            log_every=1,
            on_error=on_error,
            watchdog=watchdog,
            **more,
        )
        found |= {"ended": run.ended, "skipped": run.skipped, "why": run.why}
    except (sc.StepcError, sc.Interrupted, sc.Preempted) as error:
        run: Any = vars(error).get("run")
        found |= {"error": f"{type(error).__name__}: {error}"}
        if raises:
            raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if run is not None and run.state is not None:
        found |= {"digest": digest(gathered(run.state)), "step": int(run.state.step), "steps": run.steps}
    return {**found, "told": told.told, "events": told.names(), "given": rows.given}


def make_read_only(folder: Path) -> None:
    """For this process, from now on."""
    folder.chmod(0o555)
    os.setuid(65534)  # nothing is read-only to root


def kill(*about: Any, **more: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def verdict(which: str) -> Callable[[Any], str | None]:
    """`reject_if` that process 1 calls with another result, at its seventh step, once."""
    judged: list[int] = []

    def judge(metrics: Any) -> str | None:
        judged.append(1)
        return "I do not like it" if len(judged) == 7 and str(jax.process_index()) in which else None

    return judge


def masked_loss(params: Any, batch: Any) -> sc.Mean:
    error = batch["x"] @ params["w"] - batch["y"]
    return sc.Mean((error**2 * batch["mask"]).sum(), batch["mask"].sum())


def evaluation(numbers: str) -> sc.Eval:
    """Of so many batches on each process, of which the last has half of the rows: by a step if there are masks."""
    kind, *counts = numbers.split(",")
    num = int(counts[jax.process_index() % len(counts)])
    batches: list[Any] = [local(global_batch(number)) for number in range(1, num + 1)]
    batches = [{**batch, "mask": np.ones(len(batch["x"]), np.float32)} for batch in batches]
    if kind == "plain":
        return sc.Eval(3, lambda state, batch: {"w": state.params["w"].sum()}, batches)
    batches[-1] = first_rows(batches[-1], 4)
    gradient = sc.shard(sc.dp("data")) @ sc.grad(masked_loss)
    judge = sc.compile(sc.update(optax.sgd(0.0)) @ gradient, mesh=jax.make_mesh((jax.device_count(),), ("data",)))
    if kind == "step":
        return sc.Eval(3, judge, batches)
    of_rows = jax.jit(lambda state, batch: {"loss": loss(state.params, batch)})
    never = sc.EarlyStopping("eval/loss", "min", patience=2, min_delta=1e6)  # no loss is better by that
    return sc.Eval(
        3, (lambda state, batch: of_rows(state, judge.put(batch))) if kind == "put" else of_rows, batches, stop=never
    )


READ: dict[str, Callable[[str, Path], Any]] = {
    "reject_if": lambda value, _: verdict(value),
    "profile": lambda value, folder: sc.Profile(2, 4, folder / "trace") if value == str(jax.process_index()) else None,
    "eval": lambda value, _: evaluation(value),
    "checkpoint": lambda value, folder: sc.Checkpoints(folder / "kept", every=int(value)),
    "best_every": lambda value, folder: sc.Checkpoints(
        folder / "kept", every=int(value), keep=1, best=("eval/loss", "min")
    ),
    "steps": lambda value, _: int(value),
}
# The policies by their names, with loggers that are to raise.
STRICT = {
    "raise": {"log": "raise"},
    "skip": {"data": "skip", "nonfinite": "skip", "device": "skip", "log": "raise"},
    "retry": {"data": "retry", "device": "retry", "log": "raise"},
}


def wide_loss(params: Any, batch: Any) -> jax.Array:
    return (((batch["x"] @ params["w"]).sum(axis=1) - batch["y"]) ** 2).mean()


def padded(folder: Path, *, outer: str, steps: str, zero: str = "1", optimizer: str = "sign") -> dict[str, Any]:
    """A run with checkpoints whose parameters have 5 columns along an axis of the model, which is every other device's.

    Args:
      outer: the outer axis of the mesh: with "model" each process has all rows and some of the columns.
    """
    sizes = {"data": 2, "model": jax.device_count() // 2}
    names = ("model", "data") if outer == "model" else ("data", "model")
    mesh = jax.make_mesh(tuple(sizes[name] for name in names), names)
    rules = sc.shard(sc.dp("data", zero=int(zero)), sc.tp({"w": jax.P(None, "model")}, pad=True))
    tx = optax.sign_sgd(0.25) if optimizer == "sign" else optax.adam(2.0**-3)
    gradient = sc.clip(10.0) @ sc.accumulate(2) @ rules @ sc.grad(wide_loss)
    step = sc.compile(sc.ema(0.5) @ sc.update(tx) @ gradient, mesh=mesh)
    places = np.argwhere([[device.process_index == jax.process_index() for device in row] for row in mesh.devices])
    mine = sorted({int(place[names.index("data")]) for place in places})
    half = ROWS // 2

    def of_this_process(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: np.concatenate([leaf[one * half : (one + 1) * half] for one in mine]) for name, leaf in batch.items()
        }

    state = step.init({"w": np.zeros((FEATURES, 5), np.float32)}, seed=7)
    told = Remembering()
    kept = sc.Checkpoints(folder / "kept", every=2)
    rows = Rows(folder, part=of_this_process)
    run = sc.run(step, state, rows, steps=int(steps), checkpoint=kept, loggers=[told])
    stored, whole = gathered(run.state), gathered(run.state.unpadded())
    return {
        "digest": digest(whole),
        "params": whole.params["w"].tolist(),
        "columns": stored.params["w"].shape[1],
        "is_nan": bool(np.isnan(stored.params["w"][:, 5:]).all() and np.isnan(stored.slots["ema"]["w"][:, 5:]).all()),
        "events": told.names(),
        "traces": step.traces,
    }


def nowhere(folder: Path) -> dict[str, Any]:
    for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID"):
        del os.environ[f"STEPC_{name}"]
    return {"refused": refusal(sc.init_distributed)}


def alone(folder: Path) -> dict[str, Any]:
    return {"refused": refusal(lambda: sc.init_distributed("127.0.0.1:1", 2, 1, start_seconds=3))}


def joined(folder: Path) -> dict[str, Any]:
    """The index of this process, and a step over all of them."""
    step = compiled()
    state, _ = step(fresh(step), local(global_batch(0)))
    return {"process": jax.process_index(), "num": jax.process_count(), "digest": digest(state)}


PATIENT = {"heartbeat_seconds": 60, "shutdown_seconds": 60}  # so that jax ends no job on a slow machine
BEFORE = {"nowhere": nowhere, "alone": alone}
CASES = {"by_hand": by_hand, "run": run, "joined": joined, "padded": padded}


def main(arguments: list[str]) -> None:
    case, folder = arguments[0], Path(arguments[1])
    told = dict(word.split("=", 1) for word in arguments[2:])
    if case in BEFORE:
        found = BEFORE[case](folder, **told)
    else:
        if "JAX_COORDINATOR_PORT" in os.environ:  # under SLURM or Open MPI, which jax detects
            sc.init_distributed(listen_on="127.0.0.1", **PATIENT)
        if "STEPC_COORDINATOR" in os.environ:
            sc.init_distributed(**PATIENT)
        found = CASES[case](folder, **told)
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
