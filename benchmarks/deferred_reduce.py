"""What does it gain to reduce the gradient once a step instead of once a microbatch?

Eight simulated devices and one, k = 8, adamw. stepc against
  by hand            `jax.shard_map` over the devices, a `lax.scan` in it and one `psum` after it: should cost the same
  GSPMD scan         `jax.jit` with a sharded batch and a `lax.scan` over strided microbatches with a sharding
                     constraint, which is how MaxText accumulates
  optax.microbatch   the same with optax's loop (`optax.micro_grad` does something else: one example at a time)
  optax.MultiSteps   k calls, with the sum in the optimizer state
All get the same parameters and rows, and must give the same new parameters before anything is timed. Every step is
waited for, MultiSteps after its k calls. Simulated devices share the cores and the memory of one machine: times are
those of copies in memory, not of a network. Counts hold anywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from measuring import (
    CPU_SECONDS,
    Repeated,
    Step,
    arguments,
    begin,
    finish,
    interleaved,
    plot,
    ratio,
    require_equal,
    show,
    spreads,
)
from models import Loss, Model, adamw, mlp, resnet, small_gpt

import stepc as sc
from examples.gpt.model import Size

try:
    from optax import microbatching
except ImportError:  # optax before 0.2.6
    microbatching = None

NUM_DEVICES, K = 8, 8  # one device reduces nothing, and shows what the loop costs
REPLICATED, ROWS = PartitionSpec(), PartitionSpec("data")
Gradient: TypeAlias = Callable[[Any, Any], tuple[jax.Array, Any]]  # Any: parameters, rows and gradients


@dataclass(frozen=True)
class Variant:
    """One way to make the step. `calls` is how often its program runs in a step."""

    step: Step
    state: Any  # Any: what the step changes
    batch: Any  # Any: what the step takes
    params_of: Callable[[Any], Any]
    program: jax.stages.Compiled
    calls: int = 1


def ours(model: Model, mesh: Mesh) -> Variant:
    """With stepc."""
    transforms = sc.update(adamw()) @ sc.accumulate(K) @ sc.shard(sc.dp("data"))
    step = sc.compile(transforms @ sc.grad(model.make_loss()), mesh=mesh)
    state, batch = step.init(model.params), _placed(model.batch, mesh, ROWS)
    return Variant(step, state, batch, lambda state: state.params, step.lower(state, batch).compile().executable)


def by_hand(model: Model, mesh: Mesh) -> Variant:
    """The same by hand."""
    loss = model.make_loss()

    @partial(jax.shard_map, mesh=mesh, in_specs=(REPLICATED, ROWS), out_specs=REPLICATED, check_vma=False)
    def gradient(params: Any, rows: Any) -> tuple[jax.Array, Any]:
        total = jax.lax.psum(_added_up(loss, params, jax.tree.map(_strided, rows)), "data")
        return jax.tree.map(lambda leaf: leaf / (K * mesh.size), total)

    return _jitted(model, mesh, gradient)


def gspmd_scan(model: Model, mesh: Mesh) -> Variant:
    """The partitioner is free to reduce where it likes; it reduces in the loop."""
    split = NamedSharding(mesh, PartitionSpec(None, "data"))

    def gradient(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        parts = jax.lax.with_sharding_constraint(jax.tree.map(_strided, batch), split)
        return jax.tree.map(lambda leaf: leaf / K, _added_up(loss, params, parts))

    loss = model.make_loss()
    return _jitted(model, mesh, gradient)


def optax_microbatch(model: Model, mesh: Mesh) -> Variant:
    """optax keeps the rows of a microbatch strided, for the same reason."""
    size = len(jax.tree.leaves(model.batch)[0]) // K
    accumulator = microbatching.AccumulationType.MEAN
    gradient = microbatching.microbatch(
        jax.value_and_grad(model.make_loss()), argnums=1, microbatch_size=size, accumulator=accumulator
    )
    return _jitted(model, mesh, gradient)


def multi_steps(model: Model, mesh: Mesh) -> Variant:
    """The microbatches are cut beforehand, as a loader would."""
    optimizer = optax.MultiSteps(adamw(), every_k_schedule=K).gradient_transformation()
    call = _call(optimizer, jax.value_and_grad(model.make_loss()), mesh)
    state = _fresh(model, optimizer, mesh)
    parts = [_placed(jax.tree.map(lambda leaf, j=j: leaf[j::K], model.batch), mesh, ROWS) for j in range(K)]

    def step(state: Any, parts: Any) -> tuple[Any, Any]:
        losses = []
        for part in parts:
            state, loss = call(state, part)
            losses.append(loss)
        return state, losses

    return Variant(step, state, parts, _first, call.lower(state, parts[0]).compile(), calls=K)


def variants() -> Mapping[str, Callable[[Model, Mesh], Variant]]:
    """The variants that this version of optax has."""
    all_ = {"stepc": ours, "by hand": by_hand, "GSPMD scan": gspmd_scan, "optax.microbatch": optax_microbatch}
    if microbatching is None:
        print(f"optax {optax.__version__} has no microbatch: it is left out\n")
        del all_["optax.microbatch"]
    return {**all_, "optax.MultiSteps": multi_steps}


def measure(model: Model, mesh: Mesh, *, rounds: int) -> dict[str, Any]:
    """Compare the results of all variants, then time them side by side."""
    loss, optimizer = model.make_loss(), adamw()
    grads = jax.jit(jax.grad(loss))(model.params, model.batch)  # one device, the whole batch
    updates, _ = optimizer.update(grads, optimizer.init(model.params), model.params)
    expected = optax.apply_updates(model.params, updates)

    samples, found = {}, {}
    for name, make in variants().items():
        one = make(model, mesh)
        state, _ = jax.block_until_ready(one.step(one.state, one.batch))
        difference = require_equal(one.params_of(state), expected, name=name)
        samples[name] = Repeated(one.step, state, one.batch, calls=1)
        memory = sc.inspect.memory(one.program)
        reduces = [row for row in sc.inspect.collectives(one.program, mesh) if row.kind == "all-reduce"]
        found[name] = {
            "difference": difference,
            "temporary_bytes": memory.temporaries,
            "total_bytes": memory.total,
            "all_reduces": one.calls * sum(row.executions for row in reduces),
            "all_reduced_bytes": one.calls * sum(row.bytes * row.executions for row in reduces),
        }
    taken = interleaved(samples, rounds=rounds)
    seconds = spreads(taken)
    for name, one in found.items():
        one |= {"step_seconds": seconds[name], "step_ratio": ratio(taken, name, "stepc")}
        one["step_cpu_ratio"] = ratio(taken, name, "stepc", CPU_SECONDS)
        one["temporary_ratio"] = one["temporary_bytes"] / found["stepc"]["temporary_bytes"]
    name = f"{model.name}, {mesh.size} device{'s' * (mesh.size > 1)}"
    return {"model": name, "num_params": model.num_params, "k": K, "variants": found}


def _strided(leaf: jax.Array) -> jax.Array:
    return leaf.reshape(-1, K, *leaf.shape[1:]).swapaxes(0, 1)


def _added_up(loss: Loss, params: Any, parts: Any) -> tuple[jax.Array, Any]:
    """The sum of the losses of the parts, and of their gradients."""

    def iteration(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(iteration, zeros, parts)[0]


def _call(optimizer: optax.GradientTransformation, gradient: Gradient, mesh: Mesh) -> Any:
    """One jitted, donating update."""
    replicated, rows = NamedSharding(mesh, REPLICATED), NamedSharding(mesh, ROWS)

    @partial(jax.jit, donate_argnums=0, in_shardings=(replicated, rows), out_shardings=replicated)
    def call(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, opt_state = state
        value, grads = gradient(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return call


def _jitted(model: Model, mesh: Mesh, gradient: Gradient) -> Variant:
    optimizer = adamw()
    step = _call(optimizer, gradient, mesh)
    state, batch = _fresh(model, optimizer, mesh), _placed(model.batch, mesh, ROWS)
    return Variant(step, state, batch, _first, step.lower(state, batch).compile())


def _fresh(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Replicated parameters and optimizer state, in new buffers."""

    def copied(params: Any) -> Any:
        params = jax.tree.map(jnp.copy, params)
        return params, jax.tree.map(jnp.copy, optimizer.init(params))

    return jax.jit(copied, out_shardings=NamedSharding(mesh, REPLICATED))(model.params)


def _placed(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, spec))


def _first(state: Any) -> Any:
    return state[0]


def tell(result: dict[str, Any]) -> None:
    """One table for one model."""
    rows = [("", "step, ms", "of stepc", "temporaries, MB", "of stepc", "all, MB", "all-reduces", "MB reduced")]
    for name, one in result["variants"].items():
        time, temporaries = one["step_seconds"].shown(1e3, 1), f"{one['temporary_bytes'] / 1e6:.2f}"
        quotients = one["step_ratio"].shown(), f"{one['temporary_ratio']:.2f}"
        counts = str(one["all_reduces"]), f"{one['all_reduced_bytes'] / 1e6:.2f}"
        if name != "stepc":
            plot(f"{result['model']}: {name}", one["step_ratio"])
        rows.append((name, time, quotients[0], temporaries, quotients[1], f"{one['total_bytes'] / 1e6:.2f}", *counts))
    title = f"{result['model']}; {result['num_params']:,} parameters; per step and device; median (quartiles)"
    show(title, rows)


def cases() -> list[tuple[int, Model]]:
    """Devices and model.

    The MLP has one row a local microbatch, and eight: the more there is to compute, the less a reduction weighs.
    """
    wide, size = (512, 2048, 2048, 512), Size(layers=2, width=128, heads=4, context=32)
    rows = NUM_DEVICES * K
    gpt, convolutions = small_gpt(size, rows=rows, num_tokens=8192), resnet(32, blocks=3, size=8, rows=rows)
    many = [mlp(wide, rows=rows), mlp(wide, rows=8 * rows), gpt, convolutions]
    return [
        *((NUM_DEVICES, model) for model in many),
        *((1, model) for model in (mlp(wide, rows=rows), gpt, convolutions)),
    ]


def quick_cases() -> list[tuple[int, Model]]:
    """Small ones."""
    return [(devices, mlp((16, 32, 16), rows=NUM_DEVICES * K)) for devices in (NUM_DEVICES, 1)]


def main() -> None:
    options = arguments(__doc__, rounds=15).parse_args()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_enable_compilation_cache", False)
    setting = begin(f"one reduction a step against one a microbatch: {NUM_DEVICES} devices and one, k = {K}, adamw")
    results = []
    for devices, model in quick_cases() if options.quick else cases():
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        result = measure(model, mesh, rounds=3 if options.quick else options.rounds)
        tell(result)
        results.append(result)
    finish("deferred_reduce", setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
