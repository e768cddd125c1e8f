"""Do program size and compile time depend on the number of microbatches?

Eight simulated devices, k = 2, 4, 8, 32, with the same number of rows per local microbatch, so that only k changes.
Counted are instructions (StableHLO and optimized HLO), the processor time of all threads to trace, lower and compile
with empty caches (steadier than wall time), and the collectives. The target for each: within 10 % of k = 2.
"""

from typing import Any

import jax
from jax.sharding import Mesh
from measuring import (
    CPU_SECONDS,
    Sample,
    Taken,
    arguments,
    begin,
    finish,
    interleaved,
    num_instructions,
    ratio,
    show,
    spreads,
    timed,
)
from models import Model, adamw, mlp, small_gpt

import stepc as sc
from examples.gpt.model import Size

NUM_DEVICES, ROWS_PER_CELL = 8, 2
COUNTS = (2, 4, 8, 32)
WITHIN = 0.10


def compiled(model: Model, k: int, mesh: Mesh) -> tuple[sc.Lowered, sc.Compiled]:
    """The demo's step, from the transforms to the executable. No array is made."""
    transforms = sc.update(adamw()) @ sc.clip(1.0) @ sc.accumulate(k) @ sc.shard(sc.dp("data"))
    step = sc.compile(transforms @ sc.grad(model.make_loss()), mesh=mesh)
    shapes = jax.eval_shape(lambda tree: tree, (model.params, model.batch))
    lowered = step.lower(step.init(shapes[0]), shapes[1])
    return lowered, lowered.compile()


def compiling(model: Model, k: int, mesh: Mesh) -> Sample:
    """A sample that compiles as a new process does."""

    def sample() -> Taken:
        jax.clear_caches()
        return timed(lambda: compiled(model, k, mesh))

    return sample


def measure(models: dict[int, Model], mesh: Mesh, *, rounds: int) -> dict[str, Any]:
    """Everything for every k."""
    found = {}
    for k, model in models.items():
        lowered, program = compiled(model, k, mesh)
        collectives = program.collectives()
        found[k] = {
            "stablehlo_instructions": num_instructions(lowered.stablehlo()),
            "hlo_instructions": num_instructions(program.hlo()),
            "hlo_characters": len(program.hlo()),
            "collectives": len(collectives),
            "executions": sum(row.executions or 0 for row in collectives),
            "executed_bytes": collectives.executed_bytes,
            "in_loops": len(collectives.in_loops),
        }
    samples = {str(k): compiling(model, k, mesh) for k, model in models.items()}
    taken = interleaved(samples, rounds=rounds)
    first, seconds, cpu_seconds = str(min(models)), spreads(taken), spreads(taken, CPU_SECONDS)
    for k, one in found.items():
        one |= {"compile_seconds": seconds[str(k)], "compile_ratio": ratio(taken, str(k), first)}
        one |= {"compile_cpu_seconds": cpu_seconds[str(k)]}
        one |= {"compile_cpu_ratio": ratio(taken, str(k), first, CPU_SECONDS)}
    return found


def tell(name: str, found: dict[int, dict[str, Any]]) -> None:
    """One table for one model."""
    header = (
        "k",
        "StableHLO",
        "HLO",
        "compile, CPU s",
        "of k = 2",
        "collectives",
        "executed",
        "MB",
        "in loops",
        "target",
    )
    rows, first = [header], found[min(found)]
    for k, one in found.items():
        quotients = [one[what] / first[what] for what in ("stablehlo_instructions", "hlo_instructions")]
        furthest = max(abs(quotient - 1) for quotient in (*quotients, one["compile_cpu_ratio"].median))
        counts = [f"{one[what]:,}" for what in ("stablehlo_instructions", "hlo_instructions")]
        times = one["compile_cpu_seconds"].shown(), one["compile_cpu_ratio"].shown()
        sent = [str(one[what]) for what in ("collectives", "executions")]
        met = f"within {WITHIN:.0%} {'met' if furthest <= WITHIN else 'MISSED'}"
        rows.append((str(k), *counts, *times, *sent, f"{one['executed_bytes'] / 1e6:.2f}", str(one["in_loops"]), met))
    show(f"{name}; instructions, compile time, collectives; median (quartiles)", rows)


def main() -> None:
    options = arguments(__doc__, rounds=7).parse_args()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_enable_compilation_cache", False)
    setting = begin(f"program size and compile time for k = {COUNTS}: {NUM_DEVICES} devices")
    mesh = jax.make_mesh((NUM_DEVICES,), ("data",))
    size = Size(layers=2, width=64, heads=4, context=64)
    rows = {k: NUM_DEVICES * ROWS_PER_CELL * k for k in COUNTS}
    cases = {"MLP 64-256-256-16": {k: mlp((64, 256, 256, 16), rows=number) for k, number in rows.items()}}
    if not options.quick:
        cases[f"GPT {size}"] = {k: small_gpt(size, rows=number) for k, number in rows.items()}
    results = {}
    for name, models in cases.items():
        found = measure(models, mesh, rounds=1 if options.quick else options.rounds)
        tell(name, found)
        results[name] = found
    finish("independent_of_k", setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
