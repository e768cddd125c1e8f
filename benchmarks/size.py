"""Do lowering and compiling cost more than by hand, the more leaves a model has?

Residual blocks of four tiny leaves, on eight simulated devices, clip and adamw, k = 4. "unrolled" is a Python loop over
the blocks, so that a deeper model has more leaves; "stacked" is a `lax.scan` over two rematerialised layers of many
blocks, so that each leaf is a stack. By hand: `jax.shard_map` around a `lax.scan` over microbatches for the replicated
state (zero 0); sharding constraints on parameters, gradients and moments for the sharded one (fully sharded data
parallelism; stepc's `zero=3`, with `gather="layer"` where layers are stacked). Lowering is from a loss that jax has not
seen to StableHLO, with stepc's plan in it; no array is made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measuring import (
    CPU_SECONDS,
    SECONDS,
    Taken,
    arguments,
    begin,
    finish,
    interleaved,
    ratio,
    require_equal,
    show,
    spreads,
    timed,
    verdict,
)
from models import Loss, adamw

import stepc as sc

NUM_DEVICES, K, WIDTH, NUM_LAYERS = 8, 4, 8, 2
MAX_NORM = 1.0
SIZES = {50: 5, 500: 3}  # rounds for each number of leaves; of any other, one
MOST_COMPILED = 500  # leaves: with more a step is lowered alone, since XLA takes minutes for it
TARGETS = {"zero 0": 1.10, "zero 3": 1.25}  # of lowering: stepc / by hand
STAGES = ("lower", "compile")
DATA, REPLICATED = PartitionSpec("data"), PartitionSpec()


@dataclass(frozen=True)
class Blocks:
    """A model of so many leaves, in a loop of Python or stacked in a scan."""

    leaves: int
    is_stacked: bool

    @property
    def name(self) -> str:
        return f"{self.leaves} leaves, {'stacked' if self.is_stacked else 'unrolled'}"

    def shapes(self) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """The parameters, as shapes."""
        stack = (NUM_LAYERS,) if self.is_stacked else ()
        vector, matrix = (jax.ShapeDtypeStruct((*stack, *shape), jnp.float32) for shape in ((WIDTH,), (WIDTH, WIDTH)))
        blocks = [{"gain": vector, "up": matrix, "bias": vector, "down": matrix} for _ in range(self.leaves // 4)]
        rest = [{"gain": vector}, {"gain": vector}] if self.leaves % 4 else []
        return blocks + rest

    def loss(self, constrain: Callable[[Any], Any] = lambda block: block) -> Loss:
        """A new loss; `constrain` the parameters of a block to a sharding where they are used: by hand."""

        def blocks(stream: jax.Array, params: Any) -> jax.Array:
            for block in params:
                block = constrain(block)
                if "up" not in block:
                    stream = stream * block["gain"]
                else:
                    hidden = jnp.tanh((stream * block["gain"]) @ block["up"] + block["bias"])
                    stream = stream + hidden @ block["down"]
            return stream

        def loss(params: Any, batch: Any) -> jax.Array:
            if self.is_stacked:
                layer = jax.checkpoint(lambda stream, layer: (blocks(stream, layer), None))
                stream, _ = jax.lax.scan(layer, batch["x"], params)
            else:
                stream = blocks(batch["x"], params)
            return jnp.square(stream - batch["y"]).mean()

        return loss


def optimizer() -> optax.GradientTransformation:
    """By hand, clipping is a part of it."""
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), adamw())


def mean_gradient(loss: Loss, params: Any, batch: Any, constrain: Callable[[Any], Any] = lambda grads: grads) -> Any:
    """A scan over contiguous microbatches."""
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, K, *leaf.shape[1:]).swapaxes(0, 1), batch)

    def iteration(total: Any, part: Any) -> tuple[Any, None]:
        value, grads = jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part))
        return (value, constrain(grads)), None

    zeros = (jnp.zeros(()), constrain(jax.tree.map(jnp.zeros_like, params)))
    total, _ = jax.lax.scan(iteration, zeros, parts)
    return jax.tree.map(lambda leaf: leaf / K, total)


def replicated_by_hand(model: Blocks, mesh: Mesh) -> Any:  # Any: a jitted function
    """Each device its own rows, one reduction."""
    return replicated_step(model.loss(), mesh)


def replicated_step(loss: Loss, mesh: Mesh | None) -> Any:  # Any: as above
    """The same of any loss; without a mesh on one device."""
    rule = optimizer()

    def reduced(params: Any, batch: Any) -> Any:
        found = mean_gradient(loss, params, batch)
        return found if mesh is None else jax.lax.pmean(found, "data")

    if mesh is not None:
        specs = (REPLICATED, DATA)
        reduced = jax.shard_map(reduced, mesh=mesh, in_specs=specs, out_specs=REPLICATED, check_vma=False)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, moments = state
        value, grads = reduced(params, batch)
        updates, moments = rule.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), {"loss": value}

    return step


def sharded_by_hand(model: Blocks, mesh: Mesh) -> Any:  # Any: as above
    """Parameters, moments and sums of gradients are sharded along their last dimension, by constraints."""

    def sharded(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda leaf: last_dimension(leaf, mesh), tree))

    def gathered(block: Any) -> Any:
        return jax.lax.with_sharding_constraint(block, NamedSharding(mesh, REPLICATED))

    loss, rule = model.loss(gathered), optimizer()

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, moments = state
        value, grads = mean_gradient(loss, params, batch, sharded)
        updates, moments = rule.update(grads, moments, params)
        return (sharded(optax.apply_updates(params, updates)), moments), {"loss": value}

    return step


def last_dimension(leaf: Any, mesh: Mesh) -> NamedSharding:
    """Fully sharded: every leaf but the count of the optimizer has a last dimension."""
    return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "data") if leaf.ndim else REPLICATED)


def by_stepc(model: Blocks, mesh: Mesh, **level: Any) -> sc.Step:
    """The same with stepc."""
    gradient = sc.accumulate(K) @ sc.shard(sc.dp("data", **level)) @ sc.grad(model.loss())
    return sc.compile(sc.update(adamw()) @ sc.clip(MAX_NORM) @ gradient, mesh=mesh)


def level_of(model: Blocks, kind: str) -> dict[str, Any]:
    """What `dp` is given."""
    if kind == "zero 0":
        return {}
    return {"zero": 3, "gather": "layer" if model.is_stacked else "microbatch"}


def hand_state(model: Blocks, mesh: Mesh, kind: str) -> Any:
    """The state by hand, as shapes with their shardings."""
    params = model.shapes()
    state = (params, jax.eval_shape(optimizer().init, params))

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, REPLICATED) if kind == "zero 0" else last_dimension(leaf, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, state)


def batch_of(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Two rows per microbatch and device."""
    rows = jax.ShapeDtypeStruct((2 * K * NUM_DEVICES, WIDTH), jnp.float32, sharding=NamedSharding(mesh, DATA))
    return {"x": rows, "y": rows}


def staged(make: Callable[[], tuple[Any, Any]], batch: Any, *, compiles: bool) -> Callable[[], list[Taken]]:
    """A sample that lowers a new step for its state, and compiles it, with empty caches."""

    def sample() -> list[Taken]:
        jax.clear_caches()
        (step, state), lowered = make(), list[jax.stages.Lowered]()

        def lower() -> None:
            made = step.lower(state, batch)
            lowered.append(made.traced.lower() if isinstance(step, sc.Step) else made)

        return [timed(lower), *([timed(lambda: lowered[0].compile())] if compiles else [])]

    return sample


def measure(model: Blocks, kind: str, mesh: Mesh, *, rounds: int) -> dict[str, Any]:
    """Both steps, side by side."""
    by_hand = {"zero 0": replicated_by_hand, "zero 3": sharded_by_hand}[kind]

    def ours() -> tuple[Any, Any]:
        step = by_stepc(model, mesh, **level_of(model, kind))
        return step, step.init(model.shapes())

    def theirs() -> tuple[Any, Any]:
        return by_hand(model, mesh), hand_state(model, mesh, kind)

    pairs, compiles = (("stepc", ours), ("by hand", theirs)), model.leaves <= MOST_COMPILED
    samples = {name: staged(make, batch_of(mesh), compiles=compiles) for name, make in pairs}
    taken = interleaved(samples, rounds=rounds, discarded=0)
    found: dict[str, Any] = {"leaves": model.leaves, "is_stacked": model.is_stacked, "kind": kind, "rounds": rounds}
    for place, what in enumerate(STAGES[: 1 + compiles]):
        stage = {name: [one[place] for one in many] for name, many in taken.items()}
        for clock, at in (("seconds", SECONDS), ("cpu_seconds", CPU_SECONDS)):
            found[f"{what}_{clock}"] = spreads(stage, at)
            found[f"{what}_{clock}_ratio"] = ratio(stage, "stepc", "by hand", at)
    return found


def require_same_step(model: Blocks, kind: str, mesh: Mesh) -> None:
    """Run both once, and compare the parameters."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / WIDTH, model.shapes())
    batch = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), batch_of(mesh))
    step = by_stepc(model, mesh, **level_of(model, kind))
    state, _ = step(step.init(params), batch)
    by_hand = {"zero 0": replicated_by_hand, "zero 3": sharded_by_hand}[kind](model, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, hand_state(model, mesh, kind))
    other, _ = by_hand(jax.device_put((params, optimizer().init(params)), shardings), batch)
    require_equal(state.params, other[0], name=f"stepc, {model.name}, {kind},")


def tell(results: list[dict[str, Any]]) -> None:
    """One table for lowering and one for compiling."""
    for what in STAGES:
        rows = [("model", "sharding", "stepc, CPU s", "by hand, CPU s", "ratio", "target")]
        for found in results:
            if f"{what}_cpu_seconds" not in found:
                continue
            seconds, quotient = found[f"{what}_cpu_seconds"], found[f"{what}_cpu_seconds_ratio"]
            ours, theirs = (seconds[name].shown() for name in ("stepc", "by hand"))
            met = verdict(quotient.median, TARGETS[found["kind"]]) if what == "lower" else "-"
            name = Blocks(found["leaves"], found["is_stacked"]).name
            rows.append((name, found["kind"], ours, theirs, quotient.shown(1.0, 3), met))
        show(f"{what}; median (quartiles)", rows)


def main() -> None:
    parser = arguments(__doc__, rounds=0)  # 0: those of `SIZES`
    parser.add_argument(
        "--leaves", type=int, nargs="+", default=[50, 500, 2000, 5000], help="sizes (default: %(default)s)"
    )
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_enable_compilation_cache", False)
    setting = begin(f"lowering and compiling by the number of leaves: {NUM_DEVICES} devices, k = {K}")
    mesh = jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sizes = [6, 14] if options.quick else options.leaves
    for is_stacked in (False, True):
        for kind in TARGETS:
            require_same_step(Blocks(6, is_stacked), kind, mesh)
    results = []
    for leaves in sizes:
        for is_stacked in (False, True):
            for kind in TARGETS:
                rounds = options.rounds or SIZES.get(leaves, 1)
                found = measure(Blocks(leaves, is_stacked), kind, mesh, rounds=rounds)
                results.append(found)
    tell(results)
    finish("size", setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
