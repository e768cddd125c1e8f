"""A hundred thousand steps with faults of every kind: the state stays exact, and nothing leaks."""

import logging
import random
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.plan import FaultPlan, by_a_plain_loop, digest, fresh

import stepc as sc

NUM, SAMPLE = 100_000, 10_000
MEBIBYTE = 2**20
# One batch in a hundred fails to be read once, one in a thousand holds a NaN, and one in ten thousand fails once on the
# device.
SHARES = {"read": NUM // 100, "nan": NUM // 1000, "device": NUM // 10_000}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def trained(plan: FaultPlan, num: int, folder: Path, look: Callable[..., object] = print) -> sc.Run:
    with sc.JSONL(folder / "metrics.jsonl") as lines:
        return sc.run(
            plan,
            fresh(),
            sc.Data(plan.batches(num), prefetch=2),
            steps=num,
            on_error={"data": sc.Retry(2, wait_seconds=0.0), "nonfinite": sc.Skip(3), "device": sc.Retry(2, 0.0)},
            checkpoint=sc.Checkpoints(folder / "kept", every=num // 5, keep=2),
            loggers=[lines],
            log_every=100,
            hooks=[(SAMPLE, look)],
        )


@pytest.mark.long
def test_hundred_thousand_steps_with_faults_equal_the_model_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "stepc")  # pytest keeps all log lines in memory
    trained(
        FaultPlan({30: "read", 40: "nan", 50: "device"}), 100, tmp_path / "first"
    )  # one-time allocations happen here
    seed = random.SystemRandom().randrange(2**32)
    kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
    faults = dict(zip(random.Random(seed).sample(range(1, NUM + 1), len(kinds)), kinds, strict=True))
    memory, threads, files = [resident_bytes()], threading.active_count(), num_files()
    run = trained(FaultPlan(faults), NUM, tmp_path / "all", lambda *about: memory.append(resident_bytes()))
    with capsys.disabled():
        mebibytes = ", ".join(f"{one / MEBIBYTE:.1f}" for one in memory)
        print(f"\nseed {seed}: {run.failures}, {run.skipped} skipped; MiB every {SAMPLE:,} steps: {mebibytes}")
        print(f"threads {threads} before, {threading.active_count()} after; files {files} before, {num_files()} after")
    assert run.failures == {"data": SHARES["read"], "nonfinite": SHARES["nan"], "device": SHARES["device"]}
    good = [number for number in range(1, NUM + 1) if faults.get(number) != "nan"]
    assert digest(run.state) == digest(by_a_plain_loop(good))
    assert memory[-1] - memory[0] < 10 * MEBIBYTE, seed
    assert threading.active_count() <= threads
    assert num_files() <= files
