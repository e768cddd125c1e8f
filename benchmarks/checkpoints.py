"""How long does training stand still for a save, and at what bandwidth is a checkpoint written and read?

A state of 1 GB in 32 leaves, on one device. By stepc's store (`sc.Checkpoints`); by Orbax's `AsyncCheckpointer` alone,
compressed as it does by default and not compressed as stepc does; as plain files: one `write` and `fsync`, one `read`.
Each keeps what it wrote last while it writes. The time that training stands still is that of the call that begins
the save; the least it can be is that of a copy of the state, since the step that follows donates it. On a CPU the copy
is within memory. stepc checks the digest of each leaf that it reads, and moves it to where a step can donate it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from measuring import (
    CPU_SECONDS,
    SECONDS,
    Sample,
    Taken,
    arguments,
    begin,
    finish,
    interleaved,
    plot,
    ratio,
    show,
    spreads,
    timed,
)

from stepc._runner.checkpoint_store import CheckpointStore
from stepc._runner.pending import copy_state

LEAVES, TARGET = 32, 1.10
ORBAX = "Orbax", "Orbax uncompressed"
META: dict[str, Any] = {"position": None, "batch": {}, "last": None, "settings": ()}


def state_of(megabytes: int) -> dict[str, jax.Array]:
    """Random numbers, which no file system compresses."""
    rng = np.random.default_rng(0)
    rows = megabytes * 1_000_000 // (4 * 1000 * LEAVES)
    return {f"leaf_{number:02}": jnp.asarray(rng.standard_normal((rows, 1000), np.float32)) for number in range(LEAVES)}


def files(state: Any, directory: Path) -> dict[str, Sample]:
    """Plain files."""
    path = directory / "raw"

    def write() -> None:
        with path.open("wb") as file:
            for leaf in state.values():
                file.write(np.asarray(leaf).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())

    return {"write, file": lambda: timed(write), "read, file": lambda: timed(path.read_bytes)}


def orbax(state: Any, directory: Path, *, is_compressed: bool) -> dict[str, Sample]:
    """Orbax alone."""
    name = ORBAX[not is_compressed]
    writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=is_compressed))
    number, folder = 0, directory / name

    def write() -> None:
        writer.save(folder / str(number), args=ocp.args.PyTreeSave(state))
        writer.wait_until_finished()

    def save() -> Taken:
        nonlocal number
        number += 1
        taken = timed(write)
        shutil.rmtree(folder / str(number - 1), ignore_errors=True)  # after, as stepc has to: memory is new in both
        return taken

    def restore() -> None:
        how = ocp.checkpoint_utils.construct_restore_args(state)
        args = ocp.args.PyTreeRestore(state, restore_args=how)
        jax.block_until_ready(writer.restore(folder / str(number), args=args))

    return {f"write, {name}": save, f"read, {name}": lambda: timed(restore)}


def stepc(state: Any, store: CheckpointStore, stands_still: list[Taken]) -> dict[str, Sample]:
    """By stepc; how long each call took that begins a save is noted too."""
    number = 0

    def save() -> Taken:
        nonlocal number
        number += 1
        stands_still.append(timed(lambda: store.save(number, state, {**META, "step": number})))
        taken = _sum(stands_still[-1], timed(store.wait))
        store.delete_old()
        return taken

    def restore() -> None:
        found = store.restore(state, lambda *_: None)
        if found is None:
            raise ValueError("There is no checkpoint.")
        jax.block_until_ready(found.state)

    return {"write, stepc": save, "read, stepc": lambda: timed(restore)}


def measure(megabytes: int, directory: Path, *, rounds: int) -> dict[str, Any]:
    """Everything, side by side. What is read was written before the first round."""
    state = jax.block_until_ready(state_of(megabytes))
    stands_still: list[Taken] = []
    copying: Callable[[], object] = lambda: jax.block_until_ready(copy_state(state))  # noqa: E731
    with closing(CheckpointStore(directory / "stepc", keep=1, timeout_seconds=600, state=state)) as store:
        samples = {
            "copy": lambda: timed(copying),
            **files(state, directory),
            **orbax(state, directory, is_compressed=True),
            **orbax(state, directory, is_compressed=False),
            **stepc(state, store, stands_still),
        }
        for name in samples:
            if name.startswith("write"):
                samples[name]()
        stands_still.clear()
        taken = interleaved(samples, rounds=rounds)
    taken["stands still"] = stands_still[1:]  # the first round is discarded
    return {
        "megabytes": sum(leaf.nbytes for leaf in state.values()) / 1e6,
        "seconds": spreads(taken),
        "cpu_seconds": spreads(taken, CPU_SECONDS),
        "stands_still": ratio(taken, "stands still", "copy"),
        "stands_still_cpu": ratio(taken, "stands still", "copy", CPU_SECONDS),
        **{
            f"{what}_of_{other}{unit}": ratio(taken, f"{what}, stepc", f"{what}, {other}", which)
            for what in ("write", "read")
            for other in (*ORBAX, "file")
            for unit, which in (("", SECONDS), ("_cpu", CPU_SECONDS))
        },
    }


def _sum(one: Taken, other: Taken) -> Taken:
    return Taken(*(a + b for a, b in zip(one, other, strict=True)))


def tell(found: dict[str, Any]) -> None:
    """Bandwidths, and how long training stands still."""
    rows = [("", "s", "CPU s", "GB/s", "stepc's time of it", "CPU")]
    for name, spread in found["seconds"].items():
        what, _, who = name.partition(", ")
        of = [found.get(f"{what}_of_{who}{unit}") for unit in ("", "_cpu")]
        bandwidth = f"{found['megabytes'] / 1e3 / spread.median:.2f}"
        cpu = found["cpu_seconds"][name].shown()
        rows.append((name, spread.shown(), cpu, bandwidth, *("-" if one is None else one.shown() for one in of)))
    show(f"a state of {found['megabytes']:,.0f} MB; median (quartiles)", rows)
    of, cpu = found["stands_still"], found["stands_still_cpu"]
    met = f"<= {TARGET:.2f} {'met' if of.median <= TARGET else 'MISSED'}"
    still = [("", "of the time of a copy", "CPU", "target"), ("stands still", of.shown(), cpu.shown(), met)]
    show("how long training stands still for a save", still)
    plot("stands still, of a copy", of, TARGET)
    for what in ("write", "read"):
        for other in (*ORBAX, "file"):
            plot(f"{what}, of {other}", found[f"{what}_of_{other}"])


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--megabytes", type=int, default=1000, help="the size of the state (default: %(default)s)")
    options = parser.parse_args()
    setting = begin("How long does training stand still for a save, and at what bandwidth is it written and read?")
    megabytes, rounds = (8, 2) if options.quick else (options.megabytes, options.rounds)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(megabytes, Path(directory), rounds=rounds)
    tell(found)
    finish("checkpoints", setting, found, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
