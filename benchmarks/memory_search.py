"""Does `accumulate(memory=...)` find the smallest k that fits, with few compilations, and does the step then fit?

Searches: for each of three models, twenty budgets between what its smallest and its largest number of microbatches
needs. To know the right answer, every divisor is compiled separately: the chosen k must fit, and the next smaller
divisor must not. The compilations of each search are counted.

Children: the plan against what happens. A child process places the state and the batch, compiles the step, runs it once
(which reads tens of MB of the library's code), returns freed memory to the system, resets the kernel's peak of
resident memory (VmHWM) and runs two steps. The rise of the peak is what the steps took beyond state and batch; with the
bytes of those, it is printed as measured. It is a few MB more than planned, because XLA does not plan the scratch
memory of matrix products and convolutions on the CPU. The C library returns freed memory at once here, since it
could otherwise keep the temporaries of the last step for another thread than the one that runs the next. The budgets
are half-way between two divisors, and the next smaller divisor must be measured above its budget. Linux, one CPU.
"""

import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import arguments, begin, finish, show
from models import Model, mlp, small_gpt

import stepc as sc
from examples.gpt import model as gpt

BUDGETS = 20
MEASURED = 8  # the k whose program is run
# What XLA frees goes back to the system at once; else glibc may keep one step's temporaries beside those of the next.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
STATUS, MARKS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def convolutions(rows: int) -> Model:
    """Three convolutions with ReLU between them, a mean over the image, and a squared error; rematerialized."""
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 3, 16), (3, 3, 16, 16), (3, 3, 16, 16)]
    params = {
        "kernels": [0.1 * rng.standard_normal(shape).astype(np.float32) for shape in shapes],
        "out": rng.standard_normal((16, 4)).astype(np.float32),
    }

    def loss(params: Any, batch: Any) -> jax.Array:
        picture = batch["x"]
        for kernel in params["kernels"]:
            dimensions = ("NHWC", "HWIO", "NHWC")
            picture = jax.lax.conv_general_dilated(picture, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
            picture = jax.nn.relu(picture)
        return jnp.square(picture.mean((1, 2)) @ params["out"] - batch["y"]).mean()

    batch = {
        "x": rng.standard_normal((rows, 16, 16, 3)).astype(np.float32),
        "y": rng.standard_normal((rows, 4)).astype(np.float32),
    }
    return Model(f"three convolutions, {rows} rows", lambda: jax.checkpoint(loss), params, batch)


# By name: of as many rows as asked.
MODELS: dict[str, Callable[[int], Model]] = {
    "mlp": lambda rows: mlp((256, 512, 512, 512, 64), rows=rows),
    "gpt": lambda rows: small_gpt(gpt.Size(layers=2, width=32, heads=2, context=32), rows=rows),
    "convolutions": convolutions,
}
ROWS = {"mlp": 2048, "gpt": 128, "convolutions": 256}
LARGE_ROWS = {"mlp": 32_768, "gpt": 1024, "convolutions": 2048}


def step_of(model: Model, transform: sc.Transform) -> sc.Step:
    """The step whose k is searched for."""
    return sc.compile(sc.update(optax.adamw(1e-3)) @ sc.clip(1.0) @ transform @ sc.grad(model.make_loss()))


def lowered(model: Model, transform: sc.Transform) -> sc.Lowered:
    """From shapes alone."""
    step = step_of(model, transform)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (model.params, model.batch))
    return step.lower(step.init(shapes[0]), shapes[1])


def searched(model: Model, rows: int) -> list[dict[str, Any]]:
    """The search for every budget, and the right answer."""
    divisors = [k for k in range(1, rows + 1) if rows % k == 0]
    needs = {k: lowered(model, sc.accumulate(k)).compile().memory().total for k in divisors}
    found = []
    for budget in np.geomspace(min(needs.values()), max(needs.values()), BUDGETS).astype(int).tolist():
        search = lowered(model, sc.accumulate(memory=budget)).plan.search
        if search is None or search.chosen is None:
            raise ValueError("a question has an answer in its plan, or an error")
        k, below = search.chosen, [one for one in divisors if one < search.chosen]
        row = {"budget": budget, "k": k, "compiled": needs[k], "next_smaller": below[-1] if below else None}
        row |= {"next_compiled": needs[below[-1]] if below else None, "compilations": search.compilations}
        row["right"] = needs[k] <= budget and (not below or needs[below[-1]] > budget)
        found.append(row)
    return found


def resident(what: str) -> int:
    """Resident bytes of this process: "VmRSS" now, "VmHWM" the peak so far."""
    found = re.search(rf"{what}:\s+(\d+) kB", STATUS.read_text())
    if found is None:
        raise OSError(f"this kernel does not count {what}")
    return 1024 * int(found[1])


def child(name: str, transform: sc.Transform) -> None:
    """Run two steps and print the memory they took."""
    model = MODELS[name](LARGE_ROWS[name])
    step = step_of(model, transform)
    state, batch = step.init(model.params), jax.block_until_ready(jax.device_put(model.batch))
    program = step.lower(state, batch)
    needs = program.compile().memory()
    state, metrics = jax.block_until_ready(step(state, batch))  # reads the library's code, which is file pages
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    MARKS.write_text("5")
    for _ in range(2):
        state, metrics = jax.block_until_ready(step(state, batch))
    rise = resident("VmHWM") - before
    facts = {"k": program.plan.loop_length, "planned": needs.total, "measured": needs.arguments + rise}
    print(json.dumps({**facts, "arguments": needs.arguments, "traces": step.traces}))


def measured(name: str) -> list[dict[str, Any]]:
    """One budget, run in a child; and the next smaller divisor, which must not fit."""

    def in_child(transform: str) -> dict[str, Any]:
        transforms, environment = (sys.executable, __file__, "--child", name, transform), {**os.environ, **GIVE_BACK}
        done = subprocess.run(transforms, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    model = MODELS[name](LARGE_ROWS[name])
    needs = {k: lowered(model, sc.accumulate(k)).compile().memory().total for k in (MEASURED // 2, MEASURED)}
    budget = sum(needs.values()) // 2
    chosen, below = in_child(f"memory={budget}"), in_child(f"k={MEASURED // 2}")
    right = chosen["measured"] <= budget < below["measured"]
    return [{"budget": budget, **chosen, "below": below["measured"], "right": right}]


def show_searches(name: str, rows: list[dict[str, Any]]) -> None:
    """One table of searches."""
    cells = [("budget, B", "k", "compiled, B", "next smaller", "needs, B", "compilations", "")]
    for row in rows:
        smaller = ("-", "-") if row["next_smaller"] is None else (f"{row['next_smaller']}", f"{row['next_compiled']:,}")
        right = "right" if row["right"] else "WRONG"
        cells.append(
            (f"{row['budget']:,}", str(row["k"]), f"{row['compiled']:,}", *smaller, str(row["compilations"]), right)
        )
    mean = statistics.mean(row["compilations"] for row in rows)
    show(f"{name}: {mean:.2f} compilations a search", cells)


def show_children(name: str, rows: list[dict[str, Any]]) -> None:
    """One table of what was measured."""
    cells = [("budget, MB", "k", "planned, MB", "measured, MB", "next smaller, measured, MB", "")]
    for row in rows:
        numbers = [f"{row[key] / 1e6:.1f}" for key in ("budget", "planned", "measured", "below")]
        cells.append((numbers[0], str(row["k"]), *numbers[1:], "right" if row["right"] else "WRONG"))
    show(f"{name}: the most that a child process had resident", cells)


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parts = ("searches", "children")
    parser.add_argument("--part", choices=parts, help="half of the question (default: both)")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "WORD"), help="run one step, for this script itself")
    options = parser.parse_args()
    if options.child:
        name, transform = options.child
        key, _, value = transform.partition("=")
        child(name, sc.accumulate(**{key: int(value)}))
        return
    setting = begin("Does accumulate(memory=...) find the smallest k that fits, and does the step then fit?")
    names = list(MODELS)[:1] if options.quick else list(MODELS)
    searches: dict[str, list[dict[str, Any]]] = {}
    children: dict[str, list[dict[str, Any]]] = {}
    for name in names if options.part != "children" else ():
        searches[name] = searched(MODELS[name](ROWS[name]), ROWS[name])
        show_searches(MODELS[name](ROWS[name]).name, searches[name])
    for name in names if options.part != "searches" else ():
        children[name] = measured(name)
        show_children(MODELS[name](LARGE_ROWS[name]).name, children[name])
    results: dict[str, Any] = {"searches": searches, "children": children}
    counts = [row["compilations"] for rows in searches.values() for row in rows]
    results["mean_compilations"] = round(statistics.mean(counts), 3) if counts else None
    results["wrong"] = sum(not row["right"] for rows in (*searches.values(), *children.values()) for row in rows)
    name = "memory_search" if options.part is None else f"memory_search_{options.part}"
    finish(name, setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
