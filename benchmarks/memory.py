"""Does a transform take more memory than the same by hand?

The temporaries that XLA plans for a step, of each transform alone and in the demo's pipeline, against the same step by
hand: `jax.jit` with a donated state, optax, `lax.scan`, `lax.cond`, `jax.vmap`. Nothing runs: the sizes are exact, and
the same wherever this version of XLA compiles for a CPU. stepc also computes the squared norm of each leaf of the
gradient, by which `run` knows whether a step is finite and which leaf is not. So each step by hand is compiled twice:
without these norms, and with them.

Then the demo's pipeline runs in child processes: the most that each had resident during two steps.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from measuring import arguments, begin, finish, show
from memory_search import GIVE_BACK, MARKS, resident
from models import Loss, Model, adamw, mlp, small_gpt

import stepc as sc
from examples.gpt.model import Size

K, NUM_DEVICES, DEVIATION = 4, 2, 0.1
TARGET = 1.0
DEMO = Size(layers=4, width=64, heads=4, context=128)

# Any: params, a batch and gradients are trees of arrays, a state by hand is a tuple of such.
Gradient: TypeAlias = Callable[[Any, Any], tuple[jax.Array, Any]]
Init: TypeAlias = Callable[[Any], Any]
HandStep: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]
Hand: TypeAlias = tuple[Init, HandStep]


def averaged(gradient: Gradient, k: int = K) -> Gradient:
    """The mean over `k` microbatches."""

    def mean(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        parts = jax.tree.map(lambda leaf: leaf.reshape(k, -1, *leaf.shape[1:]), batch)

        def iteration(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, part)), None

        total, _ = jax.lax.scan(iteration, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)), parts)
        return jax.tree.map(lambda leaf: leaf / k, total)

    return mean


def mapped(gradient: Gradient, function: Callable[[Any], Any]) -> Gradient:
    """A function of the gradient."""

    def of(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        value, grads = gradient(params, batch)
        return value, function(grads)

    return of


def clipped(grads: Any) -> Any:
    """At most a norm of 1."""
    return optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())[0]


def over_rows(gradient: Gradient) -> Gradient:
    """The mean over single rows."""

    def mean(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        rows = jax.tree.map(lambda leaf: leaf[:, None], batch)
        return jax.tree.map(lambda leaf: leaf.mean(0), jax.vmap(gradient, in_axes=(None, 0))(params, rows))

    return mean


def encoded(params: Any, rows: Any) -> Any:
    """What the MLP makes of each row, and what it should be."""
    *inner, last = params
    hidden = rows["x"]
    for layer in inner:
        hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
    return {"made": hidden @ last["kernel"] + last["bias"], "wanted": rows["y"]}


def contrast(params: Any, z: Any) -> jax.Array:
    """Of all rows, which one is this?"""
    logits = z["made"] @ z["wanted"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(logits))).mean()


def in_two_passes(params: Any, batch: Any, k: int = K) -> tuple[jax.Array, Any]:
    """The gradient of `contrast`, with one of `k` microbatches in memory: GradCache."""
    parts = jax.tree.map(lambda leaf: leaf.reshape(k, -1, *leaf.shape[1:]), batch)
    _, made = jax.lax.scan(lambda _, part: (None, encoded(params, part)["made"]), None, parts)

    def of_whole(made: jax.Array) -> jax.Array:
        return contrast(params, {"made": made.reshape(-1, made.shape[-1]), "wanted": batch["y"]})

    value, cotangents = jax.value_and_grad(of_whole)(made)

    def iteration(total: Any, given: Any) -> tuple[Any, None]:
        part, cotangent = given
        _, pull = jax.vjp(lambda params: encoded(params, part)["made"], params)
        return jax.tree.map(jnp.add, total, pull(cotangent)[0]), None

    total, _ = jax.lax.scan(iteration, jax.tree.map(jnp.zeros_like, params), (parts, cotangents))
    return value, total


def perturbed(gradient: Gradient, rho: float) -> Gradient:
    """The gradient where the loss is worse."""

    def there(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        value, grads = gradient(params, batch)
        factor = rho / optax.tree.norm(grads)
        moved = jax.tree.map(lambda leaf, grad: leaf + factor * grad, params, grads)
        return value, gradient(moved, batch)[1]

    return there


def over_devices(gradient: Gradient, mesh: jax.sharding.Mesh) -> Gradient:
    """The mean over the devices, reduced once."""
    specs = PartitionSpec(), PartitionSpec("data")

    def on_device(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        return jax.lax.pmean(gradient(params, batch), "data")

    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)


def bfloat16(loss: Loss) -> Loss:
    """The loss in bfloat16, its value in float32."""

    def narrow(tree: Any) -> Any:
        is_floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if is_floating(leaf) else leaf, tree)

    return lambda params, batch: loss(narrow(params), narrow(batch)).astype(jnp.float32)


def reported(value: jax.Array, grads: Any, *, norms: bool) -> dict[str, Any]:
    """The metrics of a step by hand."""
    squares = {"squares": jax.tree.map(lambda leaf: jnp.square(leaf).sum(), grads)} if norms else {}
    return {"loss": value, **squares}


def updated(gradient: Gradient, *, norms: bool) -> Hand:
    """A step of adamw."""
    optimizer = adamw()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state = state
        value, grads = gradient(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), reported(value, grads, norms=norms)

    return lambda params: (params, optimizer.init(params)), step


def guarded(gradient: Gradient) -> Hand:
    """A step that is not made unless loss and gradient are finite."""
    optimizer = adamw()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        value, grads = gradient(state[0], batch)

        def update(state: Any, grads: Any) -> Any:
            params, opt_state = state
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        is_finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(grads))
        state = jax.lax.cond(is_finite, update, lambda state, grads: state, state, grads)
        return state, {"loss": value, "skipped": ~is_finite}

    return lambda params: (params, optimizer.init(params)), step


def rescaled(loss: Loss) -> Hand:
    """A step whose loss is scaled; the scale adapts."""
    optimizer = adamw()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        (params, opt_state), scale, count = state
        value, grads = jax.value_and_grad(lambda params: loss(params, batch) * scale)(params)
        grads = jax.tree.map(lambda leaf: leaf / scale, grads)
        is_finite = jnp.isfinite(optax.tree.norm(grads))

        def update(state: Any, grads: Any) -> Any:
            params, opt_state = state
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        new = jax.lax.cond(is_finite, update, lambda state, grads: state, (params, opt_state), grads)
        count = jnp.where(is_finite, count + 1, 0)
        grows = count >= 2000
        scale = jnp.where(is_finite, jnp.where(grows, scale * 2, scale), scale / 2)
        return (new, scale, jnp.where(grows, 0, count)), {"loss": value / scale}

    return lambda params: ((params, optimizer.init(params)), jnp.float32(2**15), jnp.int32(0)), step


def noisy(gradient: Gradient, *, norms: bool) -> Hand:
    """A step with noise from a key of its state."""
    init, _ = updated(gradient, norms=norms)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        inner, key, number = state
        drawn = jax.random.fold_in(key, number)

        def added(grads: Any) -> Any:
            leaves, tree = jax.tree.flatten(grads)
            keys = [jax.random.fold_in(drawn, index) for index in range(len(leaves))]
            pairs = zip(leaves, keys, strict=True)
            return tree.unflatten([leaf + DEVIATION * jax.random.normal(key, leaf.shape) for leaf, key in pairs])

        new, metrics = updated(mapped(gradient, added), norms=norms)[1](inner, batch)
        return (new, key, number + 1), metrics

    return lambda params: (init(params), jax.random.key(0), jnp.int32(0)), step


def averaging(gradient: Gradient, *, norms: bool) -> Hand:
    """A step that keeps an average of the parameters."""
    init, inner = updated(gradient, norms=norms)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        new, metrics = inner(state[0], batch)
        average = jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, state[1], new[0])
        return (new, average), metrics

    return lambda params: (init(params), params), step


def measuring_norms(gradient: Gradient, *, norms: bool) -> Hand:
    """A step that reports the norm of each leaf."""
    init, _ = updated(gradient, norms=norms)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        value, grads = gradient(state[0], batch)
        new, metrics = updated(lambda *_: (value, grads), norms=norms)[1](state, batch)
        return new, {**metrics, **norms_of(grads, None)}

    return init, step


def norms_of(grads: Any, _: Any) -> dict[str, jax.Array]:
    """The norm of each leaf."""
    return {"norms": jnp.stack([jnp.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(grads)])}


def repeated(gradient: Gradient, *, norms: bool) -> Hand:
    """A scan over steps."""
    init, inner = updated(gradient, norms=norms)
    return init, lambda state, batches: jax.lax.scan(inner, state, batches)


def epochs_of(gradient: Gradient, num_rows: int, *, norms: bool) -> Hand:
    """Two epochs of four minibatches."""
    init, inner = updated(gradient, norms=norms)

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        made, key, number = state

        def epoch(state: Any, index: jax.Array) -> tuple[Any, Any]:
            order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, number), index), num_rows)

            def minibatch(state: Any, rows: jax.Array) -> tuple[Any, Any]:
                return inner(state, jax.tree.map(lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), batch))

            return jax.lax.scan(minibatch, state, order.reshape(4, -1))

        new, metrics = jax.lax.scan(epoch, made, jnp.arange(2))
        return (new, key, number + 8), metrics

    return lambda params: (init(params), jax.random.key(0), jnp.int32(0)), step


def trained_alone(loss: Loss, *, norms: bool) -> Hand:
    """A step of the first layer."""
    optimizer = adamw()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        (first, *rest), opt_state = state
        value, grads = jax.value_and_grad(lambda first: loss([first, *rest], batch))(first)
        updates, opt_state = optimizer.update(grads, opt_state, first)
        return ([optax.apply_updates(first, updates), *rest], opt_state), reported(value, grads, norms=norms)

    return lambda params: (params, optimizer.init(params[0])), step


def alternated(loss: Loss, *, norms: bool, guard: bool = False) -> Hand:
    """A step of the first layer, then one of the others."""
    optimizers = adamw(), adamw()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        (first, *rest), opt_states = state
        value, grads = jax.value_and_grad(lambda first: loss([first, *rest], batch))(first)
        updates, one = optimizers[0].update(grads, opt_states[0], first)
        first = optax.apply_updates(first, updates)
        other_value, other_grads = jax.value_and_grad(lambda rest: loss([first, *rest], batch))(rest)
        updates, other = optimizers[1].update(other_grads, opt_states[1], rest)
        new = [first, *optax.apply_updates(rest, updates)], (one, other)
        if guard:
            norm = optax.tree.norm((grads, other_grads))
            is_finite = jnp.isfinite(value) & jnp.isfinite(other_value) & jnp.isfinite(norm)
            new = jax.lax.cond(is_finite, lambda new, old: new, lambda new, old: old, new, state)
        return new, reported(value + other_value, (grads, other_grads), norms=norms)

    return lambda params: (params, (optimizers[0].init(params[0]), optimizers[1].init(params[1:]))), step


Case: TypeAlias = tuple[sc.Pipeline, Hand]


def cases(model: Model, *, norms: bool) -> dict[str, Case]:
    """The transforms on one device, by the text of what is compared."""
    loss, update = model.make_loss(), sc.update(adamw())
    plain = jax.value_and_grad(loss)
    step_of = partial(updated, norms=norms)
    num_rows = len(jax.tree.leaves(model.batch)[0])
    found: dict[str, Case] = {
        "update @ grad": (update @ sc.grad(loss), step_of(plain)),
        "accumulate(4)": (update @ sc.accumulate(K) @ sc.grad(loss), step_of(averaged(plain))),
        "clip(1.0)": (update @ sc.clip(1.0) @ sc.grad(loss), step_of(mapped(plain, clipped))),
        "scale(0.5)": (
            update @ sc.scale(0.5) @ sc.grad(loss),
            step_of(mapped(plain, lambda grads: jax.tree.map(lambda leaf: 0.5 * leaf, grads))),
        ),
        "measure(norms)": (update @ sc.measure(norms_of) @ sc.grad(loss), measuring_norms(plain, norms=norms)),
        "noise(0.1)": (update @ sc.noise(DEVIATION) @ sc.grad(loss), noisy(plain, norms=norms)),
        "sam(0.05)": (update @ sc.sam(0.05) @ sc.grad(loss), step_of(perturbed(plain, 0.05))),
        "cast(bfloat16)": (update @ sc.grad(sc.cast(jnp.bfloat16) @ loss), step_of(jax.value_and_grad(bfloat16(loss)))),
        "remat()": (update @ sc.grad(sc.remat() @ loss), step_of(jax.value_and_grad(jax.checkpoint(loss)))),
        "loss_scale()": (update @ sc.loss_scale() @ sc.grad(loss), rescaled(loss)),
        "skip_nonfinite()": (sc.skip_nonfinite() @ update @ sc.grad(loss), guarded(plain)),
        "ema(0.99)": (sc.ema(0.99) @ update @ sc.grad(loss), averaging(plain, norms=norms)),
        "repeat(4)": (sc.repeat(K) @ update @ sc.grad(loss), repeated(plain, norms=norms)),
        "epochs(2, minibatches=4)": (
            sc.epochs(2, minibatches=4) @ update @ sc.grad(loss),
            epochs_of(plain, num_rows, norms=norms),
        ),
        "rows() @ clip(1.0)": (
            update @ sc.rows() @ sc.clip(1.0) @ sc.grad(loss),
            step_of(over_rows(mapped(plain, clipped))),
        ),
    }
    whole = sc.grad(sc.across(contrast) @ encoded)
    found["across(contrast), k = 4"] = (update @ sc.accumulate(K) @ whole, step_of(in_two_passes))
    first, rest = update @ sc.grad(loss, wrt="0/**"), update @ sc.grad(loss, wrt=("1/**", "2/**"))
    turns = sc.alternate(first=first, rest=rest)
    found['grad(wrt="0/**")'] = (first, trained_alone(loss, norms=norms))
    found["alternate(first, rest)"] = (turns, alternated(loss, norms=norms))
    found["skip_nonfinite() @ alternate(first, rest)"] = (
        sc.skip_nonfinite() @ turns,
        alternated(loss, norms=norms, guard=True),
    )
    return found


def mesh_of(devices: int) -> jax.sharding.Mesh:
    """The first devices, along one axis."""
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def sharded(model: Model, mesh: jax.sharding.Mesh, *, norms: bool) -> Case:
    """One reduction over the devices."""
    loss = model.make_loss()
    pipeline = sc.update(adamw()) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
    return pipeline, updated(over_devices(jax.value_and_grad(loss), mesh), norms=norms)


def demo(model: Model, devices: int) -> tuple[Case, jax.sharding.Mesh]:
    """The demo's pipeline."""
    loss, mesh = model.make_loss(), mesh_of(devices)
    shared = sc.accumulate(K) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
    pipeline = sc.skip_nonfinite() @ sc.update(adamw()) @ sc.clip(1.0) @ shared
    gradient = averaged(jax.value_and_grad(loss))
    if devices > 1:
        gradient = over_devices(gradient, mesh)
    return (pipeline, guarded(mapped(gradient, clipped))), mesh


def placed(shapes: Any, where: NamedSharding) -> Any:
    """The shapes with a sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)


def temporaries(model: Model, case: Case, with_norms: Hand, mesh: jax.sharding.Mesh | None = None) -> dict[str, int]:
    """What XLA plans, of stepc and by hand."""
    pipeline, (init, _) = case
    compiled = sc.compile(pipeline, mesh=mesh)
    batch = jax.eval_shape(lambda batch: batch, model.batch)
    leading = compiled.steps_per_call if compiled.rows_axis else 0
    if leading:
        batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((leading, *leaf.shape), leaf.dtype), batch)
    shapes = jax.eval_shape(lambda params: params, model.params)
    state = compiled.init(shapes)
    hand_state = jax.eval_shape(init, shapes)
    hand_batch = batch
    if mesh is not None:
        replicated, along = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
        hand_state, hand_batch = placed(hand_state, replicated), placed(batch, along)
    programs = {"stepc": compiled.lower(state, batch).compile().executable}
    for name, (_, step) in (("by hand", case[1]), ("by hand with norms", with_norms)):
        programs[name] = jax.jit(step, donate_argnums=0).lower(hand_state, hand_batch).compile()
    return {name: one.memory_analysis().temp_size_in_bytes for name, one in programs.items()}


def child(who: str, rows: int) -> None:
    """Make two steps of the demo's pipeline on one device, and print the memory they took."""
    model = small_gpt(DEMO, rows=rows)
    (pipeline, (init, hand_step)), mesh = demo(model, 1)
    batch = jax.block_until_ready(jax.device_put(model.batch))
    if who == "stepc":
        step: Any = sc.compile(pipeline, mesh=mesh)
        state = step.init(model.params)
    else:
        step = jax.jit(hand_step, donate_argnums=0)
        state = jax.jit(init)(jax.tree.map(jnp.copy, model.params))
    state, _ = jax.block_until_ready(step(state, batch))  # compiles, and reads the library's code, which is file pages
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    MARKS.write_text("5")
    for _ in range(2):
        state, _ = jax.block_until_ready(step(state, batch))
    print(json.dumps({"rise": resident("VmHWM") - before}))


def in_child(who: str, rows: int) -> int:
    """The most that a process had resident during two steps, beyond what it had before them."""
    words, environment = (sys.executable, __file__, "--child", who, str(rows)), {**os.environ, **GIVE_BACK}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["rise"]


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--child", nargs=2, metavar=("WHO", "ROWS"), help="make two steps, for this script itself")
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]))
        return
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    setting = begin("temporaries of a step, stepc against by hand")
    quick = options.quick
    small = mlp((8, 16, 16, 4) if quick else (256, 1024, 1024, 256), rows=256)
    with_norms = cases(small, norms=True)
    results = [
        {"model": small.name, "what": name, "bytes": temporaries(small, case, with_norms[name][1])}
        for name, case in cases(small, norms=False).items()
    ]
    mesh = mesh_of(NUM_DEVICES)
    alone, with_norms_alone = (sharded(small, mesh, norms=norms) for norms in (False, True))
    what = f'shard(dp("data")), {NUM_DEVICES} devices'
    results.append({"model": small.name, "what": what, "bytes": temporaries(small, alone, with_norms_alone[1], mesh)})
    for model in (small,) if quick else (small, small_gpt(DEMO, rows=16)):
        for devices in (1, NUM_DEVICES):
            case, mesh = demo(model, devices)
            what = f"the demo's pipeline, {devices} device{'s' * (devices > 1)}"
            results.append({"model": model.name, "what": what, "bytes": temporaries(model, case, case[1], mesh)})
    for name in dict.fromkeys(row["model"] for row in results):
        table = [("", "stepc, MB", "by hand, MB", "ratio", "by hand with norms, MB", "ratio", f"<= {TARGET:.2f}")]
        for row in (one for one in results if one["model"] == name):
            ours, *theirs = row["bytes"].values()
            others = [cell for one in theirs for cell in (f"{one / 1e6:.3f}", f"{ours / one:.4f}")]
            met = "met" if round(ours / theirs[-1], 3) <= TARGET else f"MISSED by {ours - theirs[-1]:,} B"
            table.append((row["what"], f"{ours / 1e6:.3f}", *others, met))
        show(f"temporaries: {name}", table)
    rows = 16 if quick else 256
    peaks = {who: in_child(who, rows) for who in ("stepc", "by hand")}
    cells = [(who, f"{peak / 1e6:.1f}", f"{peak / peaks['by hand']:.3f}") for who, peak in peaks.items()]
    show(f"resident memory that two steps add, the demo's pipeline, {rows} rows", [("", "MB", "ratio"), *cells])
    finish("memory", setting, {"temporaries": results, "peaks": peaks}, quick=quick, save=options.save)


if __name__ == "__main__":
    main()
