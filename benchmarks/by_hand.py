"""Does stepc cost more than the same step written by hand?

One device; the step clips and runs adamw, with k = 1 and 4 microbatches. By hand: `jax.jit` with a donated state,
`value_and_grad`, `lax.scan` over contiguous microbatches, an optax chain. Measured are step time, compile time (trace,
lower and compile, with empty caches), temporary memory and program size. stepc also returns the gradient norm and keeps
a step counter and a key; the step by hand does not.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from measuring import (
    CPU_SECONDS,
    SECONDS,
    Repeated,
    Sample,
    Step,
    Taken,
    arguments,
    begin,
    finish,
    interleaved,
    num_instructions,
    plot,
    ratio,
    require_equal,
    show,
    spreads,
    timed,
    verdict,
)
from models import Loss, Model, adamw, mlp, resnet, small_gpt

import stepc as sc
from examples.gpt.model import Size

MAX_NORM = 1.0
STEP, COMPILE, MEMORY = 1.03, 1.10, 1.00  # targets: stepc / by hand


def by_hand(
    loss: Loss, k: int, optimizer: optax.GradientTransformation | None = None
) -> tuple[Any, Callable[[Any, Any], Any]]:
    """The optimizer's init and the jitted step, as one writes them. The gradient is clipped; adamw unless given."""
    optimizer = optax.chain(optax.clip_by_global_norm(MAX_NORM), optimizer or adamw())

    def mean_gradient(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        if k == 1:
            return jax.value_and_grad(loss)(params, batch)
        parts = jax.tree.map(lambda leaf: leaf.reshape(k, leaf.shape[0] // k, *leaf.shape[1:]), batch)

        def iteration(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(iteration, zeros, parts)
        return jax.tree.map(lambda leaf: leaf / k, total)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state = state
        value, grads = mean_gradient(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value}

    return optimizer.init, step


def by_stepc(loss: Loss, k: int) -> sc.Step:
    """The same with stepc."""
    return sc.compile(sc.update(adamw()) @ sc.clip(MAX_NORM) @ sc.accumulate(k) @ sc.grad(loss))


def measure(model: Model, k: int, *, rounds: int, compile_rounds: int, calls: int) -> dict[str, Any]:
    """Both steps, side by side."""
    batch = jax.tree.map(jnp.asarray, model.batch)
    shapes = jax.eval_shape(lambda batch: batch, batch)
    ours = by_stepc(model.make_loss(), k)
    init, theirs = by_hand(model.make_loss(), k)
    state = ours.init(model.params)
    params = jax.tree.map(jnp.copy, model.params)
    hand_state = jax.jit(lambda params: jax.tree.map(jnp.copy, (params, init(params))))(params)
    abstract, hand_abstract = jax.eval_shape(lambda pair: pair, (state, hand_state))

    programs = {
        "stepc": ours.lower(state, batch).compile().executable,
        "by hand": theirs.lower(hand_state, batch).compile(),
    }
    texts = {"stepc": ours.lower(state, batch).stablehlo(), "by hand": theirs.lower(hand_state, batch).as_text()}
    state, _ = ours(state, batch)
    hand_state, _ = theirs(hand_state, batch)
    difference = require_equal(state.params, hand_state[0], name="stepc")

    steps: dict[str, Sample] = {
        "stepc": Repeated(ours, state, batch, calls=calls),
        "by hand": Repeated(theirs, hand_state, batch, calls=calls),
    }
    step_times = interleaved(steps, rounds=rounds)
    compiles = {
        "stepc": _compiling(lambda: by_stepc(model.make_loss(), k), abstract, shapes),
        "by hand": _compiling(lambda: by_hand(model.make_loss(), k)[1], hand_abstract, shapes),
    }
    compile_times = interleaved(compiles, rounds=compile_rounds)
    return {
        "model": model.name,
        "num_params": model.num_params,
        "k": k,
        "difference": difference,
        **_compared("step", step_times),
        **_compared("compile", compile_times),
        "temporary_bytes": {name: one.memory_analysis().temp_size_in_bytes for name, one in programs.items()},
        "hlo_instructions": {name: num_instructions(one.as_text()) for name, one in programs.items()},
        "stablehlo_instructions": {name: num_instructions(text) for name, text in texts.items()},
    }


def _compared(what: str, taken: dict[str, list[Taken]]) -> dict[str, Any]:
    compared = {}
    for clock, place in (("seconds", SECONDS), ("cpu_seconds", CPU_SECONDS)):
        compared[f"{what}_{clock}"] = spreads(taken, place)
        compared[f"{what}_{clock}_ratio"] = ratio(taken, "stepc", "by hand", place)
    return compared


def _compiling(make: Callable[[], Step], state: Any, batch: Any) -> Sample:
    def sample() -> Taken:
        jax.clear_caches()  # as in a fresh process
        return timed(lambda: make().lower(state, batch).compile())

    return sample


def tell(found: dict[str, Any]) -> None:
    """One table for one model and k."""
    plot(f"{found['model']}, k = {found['k']}", found["step_seconds_ratio"], STEP)
    rows = [("", "stepc", "by hand", "ratio", "target")]
    for what, clock, scale, unit, target in (
        ("step", "seconds", 1e3, "ms", STEP),
        ("step", "cpu_seconds", 1e3, "CPU ms", None),
        ("compile", "seconds", 1.0, "s", COMPILE),
        ("compile", "cpu_seconds", 1.0, "CPU s", None),
    ):
        seconds, quotient = found[f"{what}_{clock}"], found[f"{what}_{clock}_ratio"]
        ours, theirs = (seconds[name].shown(scale) for name in ("stepc", "by hand"))
        met = "-" if target is None else verdict(quotient.median, target)
        rows.append((f"{what}, {unit}", ours, theirs, quotient.shown(1.0, 3), met))
    temporary = found["temporary_bytes"]
    quotient = temporary["stepc"] / temporary["by hand"]
    megabytes = [f"{temporary[name] / 1e6:.3f}" for name in ("stepc", "by hand")]
    rows.append(("temporaries, MB", *megabytes, f"{quotient:.4f}", verdict(quotient, MEMORY, digits=3)))
    for what in ("hlo", "stablehlo"):
        counts = found[f"{what}_instructions"]
        shown = f"{counts['stepc'] / counts['by hand']:.3f}"
        rows.append((f"{what} instructions", str(counts["stepc"]), str(counts["by hand"]), shown, "-"))
    show(f"{found['model']}; k = {found['k']}; median (quartiles)", rows)


def cases() -> list[tuple[Model, int, int]]:
    """Model, k, calls in one sample."""
    small, demo = mlp((64, 256, 256, 16), rows=256), small_gpt(Size(layers=4, width=128, heads=4, context=128), rows=16)
    convolutions = resnet(32, blocks=3, size=16, rows=32)
    models = ((small, 100), (demo, 1), (convolutions, 1))
    return [(model, k, calls) for model, calls in models for k in (1, 4)]


def quick_cases() -> list[tuple[Model, int, int]]:
    """Small ones."""
    small = mlp((8, 16, 4), rows=16)
    return [(small, 1, 20), (small, 4, 20)]


def main() -> None:
    parser = arguments(__doc__, rounds=30)
    parser.add_argument("--compile-rounds", type=int, default=5, help="rounds of compiling (default: %(default)s)")
    options = parser.parse_args()
    rounds, compile_rounds = (3, 1) if options.quick else (options.rounds, options.compile_rounds)
    jax.config.update("jax_enable_compilation_cache", False)
    setting = begin("stepc against the same step by hand: time, compile time, temporaries, program size")
    results = []
    for model, k, calls in quick_cases() if options.quick else cases():
        found = measure(model, k, rounds=rounds, compile_rounds=compile_rounds, calls=calls)
        tell(found)
        results.append(found)
    finish("by_hand", setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
