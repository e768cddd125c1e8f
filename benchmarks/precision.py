"""Does a model learn as well in bfloat16?

A smaller GPT than the demo's, in the demo's pipeline: for each seed, one run in float32 and one with
`cast(jnp.bfloat16)`, on the same parameters and batches. Validation is in float32, on held-out files. The difference of
the two runs is compared with the spread of the float32 runs between seeds. A CPU emulates bfloat16, so the times
printed here say nothing about hardware that has it. A round is a seed.
"""

import statistics
import time
from dataclasses import replace
from typing import Any

import jax
from measuring import arguments, begin, finish, show

import stepc as sc
from examples.gpt import model as gpt
from examples.gpt import text
from examples.gpt.job import Job
from examples.gpt.train import pipeline_of

JOB = Job(steps=400, batch=16, k=2, devices=1, layers=2, width=32, heads=2, context=64, text_bytes=4_000_000)
VALIDATION_ROWS, VALIDATIONS = 32, 16


def final_loss(job: Job, source: text.Text) -> tuple[float, float]:
    """The validation loss after a run, in nats per byte, and the seconds that the run took."""
    step = sc.compile(pipeline_of(job), mesh=jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))
    state = step.init(gpt.init(jax.random.key(job.seed), job.size), seed=job.seed)
    data = text.Batches(source.train, rows=job.batch, context=job.context, seed=job.seed)
    started = time.perf_counter()
    state = sc.run(step, state, data, steps=job.steps).state
    seconds = time.perf_counter() - started
    exam = text.validation_batches(source.held_out, rows=VALIDATION_ROWS, context=job.context, num_batches=VALIDATIONS)
    loss = jax.jit(gpt.make_loss(job.size))
    return statistics.mean(float(loss(state.params, windows)) for windows in exam), seconds


def measure(job: Job, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Both precisions for every seed, and their difference relative to the spread."""
    source = text.read(text.standard_library(), max_bytes=job.text_bytes)
    runs = []
    for seed in seeds:
        wide, wide_seconds = final_loss(replace(job, seed=seed), source)
        narrow, narrow_seconds = final_loss(replace(job, seed=seed, bf16=True), source)
        runs.append(
            {
                "seed": seed,
                "float32": wide,
                "bfloat16": narrow,
                "float32_seconds": wide_seconds,
                "bfloat16_seconds": narrow_seconds,
            }
        )
    return {
        "model": f"GPT {job.layers} layers, width {job.width}, context {job.context}, {job.batch} rows",
        "steps": job.steps,
        "runs": runs,
        "mean_difference": statistics.mean(run["bfloat16"] - run["float32"] for run in runs),
        "spread_between_seeds": statistics.stdev(run["float32"] for run in runs),
    }


def tell(found: dict[str, Any]) -> None:
    """One table, and the summary."""
    rows = [("seed", "float32", "bfloat16", "difference", "float32, s", "bfloat16, s")]
    for run in found["runs"]:
        losses = (f"{run[name]:.4f}" for name in ("float32", "bfloat16"))
        seconds = (f"{run[f'{name}_seconds']:.0f}" for name in ("float32", "bfloat16"))
        rows.append((str(run["seed"]), *losses, f"{run['bfloat16'] - run['float32']:+.4f}", *seconds))
    difference, spread = found["mean_difference"], found["spread_between_seeds"]
    within = "within noise" if abs(difference) <= spread else "OUTSIDE of noise"
    rows.append(("mean difference", f"{difference:+.4f}", "spread between seeds", f"{spread:.4f}", within, ""))
    show(f"{found['model']}; validation, nats per byte, after {found['steps']} steps", rows)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    options = parser.parse_args()
    setting = begin("the validation loss of a GPT in bfloat16 against float32")
    job = replace(JOB, steps=5, text_bytes=300_000) if options.quick else JOB
    found = measure(job, tuple(range(options.rounds)))
    tell(found)
    finish("precision", setting, [found], quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
