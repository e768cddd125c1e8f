"""What do transforms and terms cost?

  skip        `skip_nonfinite()` against the same pipeline without it
  dropout     dropout of 0.1 with `rng="example"` and `rng="microbatch"`, against the same GPT without dropout
  terms       an `sc.Mean` loss, and one with three terms and two counts, against a plain mean, on eight devices
  repeat      `repeat(32)` against 32 dispatches of a tiny step
  rows        `rows() @ clip(c)` against `clip(c)`
  epochs      `epochs(4, minibatches=8)` against a scan over the same minibatches by hand
  alternate   two turns with optimizers of their own against two steps by hand in one jit
  frozen      adapters on a frozen base of 8 bits, with `wrt=`, against the same step by hand
  across      a contrastive loss of the whole batch, `across(head) @ encode`, against GradCache by hand, and against the
              whole batch at once
  sam         `sam(rho)` against two gradients by hand

All but `terms` and the second of `frozen`, `across` and `sam` run on one device, before more are simulated. Measured
are step time, temporary memory, copies in the optimized HLO, and collectives.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.backend import clear_backends
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from measuring import (
    CPU_SECONDS,
    Repeated,
    Taken,
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
from measuring import verdict as at_most
from models import Loss, Model, adamw, mlp, small_gpt

import stepc as sc
from examples.gpt import model as gpt

NUM_DEVICES, REPEATS, DROPOUT = 8, 32, 0.1
REPEAT = 3.0  # the target: so many times as many steps a second
TARGETS = {  # of the ratio of the times of a step
    "skip_nonfinite": 1.02, 'rng="example"': 1.15, "wrt": 1.03, "epochs": 1.05, "across": 1.05, "sam": 1.03,
    "alternate": 1.05,
}  # fmt: skip
DEMO = gpt.Size(layers=4, width=64, heads=4, context=128)  # that of the demo


@dataclass(frozen=True)
class Variant:
    """A step, its arguments, and the number of steps that one call makes."""

    step: sc.Step
    params: Any  # Any: a tree of arrays
    batch: Any  # Any: a tree of arrays
    num_steps: int = 1


def compare(
    question: str, model: str, variants: Mapping[str, Variant], base: str, *, rounds: int, calls: int, is_same: bool
) -> dict[str, Any]:
    """Time the variants, after comparing the parameters of those that compute the same."""
    facts, samples, params = {}, {}, {}
    for name, one in variants.items():
        state = one.step.init(one.params)
        compiled = one.step.lower(state, one.batch).compile()
        facts[name] = facts_of(compiled.executable)
        state, _ = one.step(state, one.batch)
        params[name] = jax.tree.map(jnp.copy, state.params)
        samples[name] = per_step(Repeated(one.step, state, one.batch, calls=calls), one.num_steps)
        if is_same:
            facts[name]["difference"] = require_equal(params[name], params[base], name=name) if name != base else 0.0
    return {"question": question, "model": model, **timed(samples, base, rounds=rounds), "facts": facts}


def timed(samples: Mapping[str, Callable[[], Taken]], base: str, *, rounds: int) -> dict[str, Any]:
    """The times of all samples in interleaved rounds, and their ratios to that of `base`."""
    taken = interleaved(samples, rounds=rounds)
    return {
        "base": base,
        "seconds": spreads(taken),
        "ratio": {name: ratio(taken, name, base) for name in samples},
        "cpu_ratio": {name: ratio(taken, name, base, CPU_SECONDS) for name in samples},
    }


def per_step(sample: Callable[[], Taken], num_steps: int) -> Callable[[], Taken]:
    """The time of one step, where one call makes several."""
    return lambda: Taken(*(one / num_steps for one in sample()))


def num_copies(hlo: str) -> int:
    """How many instructions copy an array."""
    return sum(" copy(" in line for line in hlo.splitlines())


def facts_of(program: jax.stages.Compiled) -> dict[str, Any]:
    """Temporary memory, copies and collectives of a compiled program."""
    return {
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "copies": num_copies(program.as_text()),
        "collectives": [
            {"kind": row.kind, "bytes": row.bytes, "executions": row.executions}
            for row in sc.inspect.collectives(program)
        ],
    }


def skip(model: Model, **how: int) -> dict[str, Any]:
    """With `skip_nonfinite()`, and without it."""

    def inner() -> sc.Pipeline:
        return sc.update(adamw()) @ sc.clip(1.0) @ sc.accumulate(4) @ sc.grad(model.make_loss())

    batch = jax.tree.map(jnp.asarray, model.batch)
    variants = {
        "without": Variant(sc.compile(inner()), model.params, batch),
        "skip_nonfinite": Variant(sc.compile(sc.skip_nonfinite() @ inner()), model.params, batch),
    }
    return compare("skip", model.name, variants, "without", is_same=True, **how)


def dropout(size: gpt.Size, *, num_rows: int, **how: int) -> dict[str, Any]:
    """One key per row, one per microbatch, none."""
    model = small_gpt(size, rows=num_rows)
    batch = jax.tree.map(jnp.asarray, model.batch)
    by_row = gpt.make_dropout_loss(size, dropout=DROPOUT)

    def by_cell(params: Any, rows: Any, key: jax.Array) -> jax.Array:
        """The same draws, from keys that this loss makes itself."""
        return by_row(params, rows, jax.random.split(key, rows["tokens"].shape[0]))

    def step_of(gradient: sc.Transform) -> Variant:
        step = sc.compile(sc.update(adamw()) @ sc.clip(1.0) @ sc.accumulate(4) @ gradient)
        return Variant(step, model.params, batch)

    variants = {
        "no dropout": step_of(sc.grad(model.make_loss())),
        'rng="example"': step_of(sc.grad(by_row, rng="example")),
        'rng="microbatch"': step_of(sc.grad(by_cell, rng="microbatch")),
    }
    return compare("dropout", model.name, variants, "no dropout", is_same=False, **how)


def terms(model: Model, **how: int) -> dict[str, Any]:
    """A plain mean, the same as a `Mean`, and three terms that need three counts; on simulated devices."""
    model = simulated(model)

    def errors(params: Any, rows: Any) -> jax.Array:
        hidden = rows["x"]
        for layer in params[:-1]:
            hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
        return jnp.square(hidden @ params[-1]["kernel"] + params[-1]["bias"] - rows["y"]).mean(axis=1)

    def plain(params: Any, rows: Any) -> jax.Array:
        return errors(params, rows).mean()

    def one_term(params: Any, rows: Any) -> sc.Mean:
        each = errors(params, rows)
        return sc.Mean(each.sum(), each.size)

    def masked(params: Any, rows: Any) -> sc.Mean:
        return sc.Mean((errors(params, rows) * rows["mask"]).sum(), rows["mask"].sum())

    def three_terms(params: Any, rows: Any) -> Any:  # Any: a sum of terms
        each, mask = errors(params, rows), rows["mask"]
        penalty = sum(jnp.square(layer["bias"]).sum() for layer in params)
        counts = (mask.sum(), (1 - mask).sum())
        return sc.Mean((each * mask).sum(), counts[0]) + 0.1 * sc.Mean((each * (1 - mask)).sum(), counts[1]) + penalty

    mask = np.random.default_rng(1).integers(0, 2, model.batch["x"].shape[0]).astype(np.float32)
    mesh = jax.make_mesh((NUM_DEVICES,), ("data",))
    along = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put(model.batch | {"mask": mask}, along)

    def variant(loss: Loss) -> Variant:
        shared = sc.accumulate(4) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
        return Variant(sc.compile(sc.update(adamw()) @ sc.clip(1.0) @ shared, mesh=mesh), model.params, batch)

    losses = {"plain": plain, "Mean": one_term, "Mean of masked rows": masked, "three terms": three_terms}
    variants = {name: variant(loss) for name, loss in losses.items()}
    require_equal(*(after_one(variants[name]) for name in ("Mean", "plain")), name="Mean")
    return compare("terms", model.name, variants, "plain", is_same=False, **how)


def simulated(model: Model) -> Model:
    """The model on the host, and eight devices from here on; what ran before had all threads for one device."""
    held = replace(model, params=jax.device_get(model.params))
    clear_backends()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    return held


def after_one(variant: Variant) -> Any:  # Any: parameters
    """The parameters after one step."""
    state, _ = variant.step(variant.step.init(variant.params), variant.batch)
    return state.params


def repeat(model: Model, *, rounds: int, calls: int) -> dict[str, Any]:
    """The same steps on the same batches, in one dispatch and in 32; a sample makes as many steps of each."""
    once = sc.compile(sc.update(optax.sgd(1e-3)) @ sc.grad(model.make_loss()))
    many = sc.compile(sc.repeat(REPEATS) @ sc.update(optax.sgd(1e-3)) @ sc.grad(model.make_loss()))
    batch = jax.tree.map(jnp.asarray, model.batch)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * REPEATS), batch)

    def singles(state: sc.State, batch: Any) -> tuple[sc.State, Any]:
        for _ in range(REPEATS):
            state, metrics = once(state, batch)
        return state, metrics

    one, other = singles(once.init(model.params), batch), many(many.init(model.params), stacked)
    found = require_equal(other[0].params, one[0].params, name="repeat")
    samples = {
        "single": per_step(Repeated(singles, one[0], batch, calls=calls), REPEATS),
        f"repeat({REPEATS})": per_step(Repeated(many, other[0], stacked, calls=calls), REPEATS),
    }
    taken = interleaved(samples, rounds=rounds)
    return {
        "question": "repeat",
        "model": model.name,
        "base": "single",
        "difference": found,
        "seconds": spreads(taken),
        "ratio": {name: ratio(taken, name, "single") for name in samples},
        "cpu_ratio": {name: ratio(taken, name, "single", CPU_SECONDS) for name in samples},
        "throughput": ratio(taken, "single", f"repeat({REPEATS})"),
    }


def epochs(model: Model, *, rounds: int, calls: int) -> dict[str, Any]:
    """Four epochs of eight minibatches over one batch: by the compiler, and as a scan in a scan by hand."""
    loss, optimizer, batch = model.make_loss(), adamw(), jax.tree.map(jnp.asarray, model.batch)
    step = sc.compile(sc.epochs(4, minibatches=8) @ sc.update(optimizer) @ sc.grad(loss))
    num_rows = len(jax.tree.leaves(batch)[0])

    def hand(state: Any, batch: Any) -> tuple[Any, Any]:
        *start, key, number = state

        def minibatch(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, opt_state = carry
            taken = jax.tree.map(lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), batch)
            value, grads = jax.value_and_grad(loss)(params, taken)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        def epoch(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
            order = jax.random.permutation(jax.random.fold_in(drawn, number), num_rows)
            return jax.lax.scan(minibatch, carry, order.reshape(8, -1))

        drawn = jax.random.fold_in(jax.random.fold_in(key, number), zlib.crc32(b"epochs") | 2**31)
        (params, opt_state), losses = jax.lax.scan(epoch, tuple(start), jnp.arange(4))
        return (params, opt_state, key, number + 32), {"loss": losses.reshape(-1)}

    by_hand, state = jax.jit(hand, donate_argnums=0), step.init(model.params)
    params = jax.tree.map(jnp.copy, state.params)
    hand_state = (params, optimizer.init(params), jnp.copy(state.rng), jnp.copy(state.step))
    programs = {
        "by hand": by_hand.lower(hand_state, batch).compile(),
        "epochs": step.lower(state, batch).compile().executable,
    }
    (state, _), (hand_state, _) = step(state, batch), by_hand(hand_state, batch)
    found = require_equal(state.params, hand_state[0], name="epochs")
    samples = {
        "by hand": per_step(Repeated(by_hand, hand_state, batch, calls=calls), 32),
        "epochs": per_step(Repeated(step, state, batch, calls=calls), 32),
    }
    return {
        "question": "epochs",
        "model": model.name,
        "difference": found,
        "batch_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(batch)),
        **timed(samples, "by hand", rounds=rounds),
        "facts": {name: facts_of(one) for name, one in programs.items()},
    }


def alternate(width: int, *, num_rows: int, rounds: int, calls: int) -> dict[str, Any]:
    """A critic and a generator of three layers each: as turns, and by hand as two steps in one jit."""
    random = np.random.default_rng(0)

    def layers(*sizes: int) -> list[np.ndarray]:
        pairs = zip(sizes, sizes[1:], strict=False)
        return [(random.normal(size=(wide, narrow)) / wide**0.5).astype(np.float32) for wide, narrow in pairs]

    params = {"d": layers(64, width, width, 1), "g": layers(64, width, width, 64)}
    batch = {name: jnp.asarray(random.normal(size=(num_rows, 64)), jnp.float32) for name in ("x", "noise")}

    def apply(weights: Any, x: jax.Array) -> jax.Array:
        for layer in weights[:-1]:
            x = jnp.tanh(x @ layer)
        return x @ weights[-1]

    def critic(params: Any, rows: Any) -> jax.Array:
        fake = apply(params["d"], apply(params["g"], rows["noise"]))
        return jnp.mean(jax.nn.softplus(-apply(params["d"], rows["x"])) + jax.nn.softplus(fake))

    def generator(params: Any, rows: Any) -> jax.Array:
        return jnp.mean(jax.nn.softplus(-apply(params["d"], apply(params["g"], rows["noise"]))))

    losses, optimizers = {"d": critic, "g": generator}, {"d": adamw(), "g": optax.sgd(1e-2, momentum=0.9)}

    def hand(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_states = state
        found = {}
        for name in "dg":

            def loss_of(own: Any, name: str = name, params: Any = params) -> jax.Array:
                return losses[name]({**params, name: own}, batch)

            found[name], grads = jax.value_and_grad(loss_of)(params[name])
            updates, opt_state = optimizers[name].update(grads, opt_states[name], params[name])
            params = {**params, name: optax.apply_updates(params[name], updates)}
            opt_states = {**opt_states, name: opt_state}
        return (params, opt_states), found

    turns = {name: sc.update(optimizers[name]) @ sc.grad(losses[name], wrt=f"{name}/**") for name in "dg"}
    steps = {
        "alternate": sc.compile(sc.alternate(**turns)),
        "skip_nonfinite @ alternate": sc.compile(sc.skip_nonfinite() @ sc.alternate(**turns)),
    }
    by_hand = jax.jit(hand, donate_argnums=0)
    copied = jax.tree.map(jnp.array, params)
    hand_state = (copied, {name: optimizers[name].init(copied[name]) for name in "dg"})
    programs = {"by hand": by_hand.lower(hand_state, batch).compile()}
    hand_state, _ = by_hand(hand_state, batch)
    samples = {"by hand": Repeated(by_hand, hand_state, batch, calls=calls)}
    expected, difference = jax.device_get(hand_state[0]), 0.0
    for name, step in steps.items():
        state = step.init(params)
        programs[name] = step.lower(state, batch).compile().executable
        state, _ = step(state, batch)
        difference = max(difference, require_equal(jax.device_get(state.params), expected, name=name))
        samples[name] = Repeated(step, state, batch, calls=calls)
    return {
        "question": "alternate",
        "model": f"two networks of three layers of width {width}, {num_rows} rows",
        "difference": difference,
        **timed(samples, "by hand", rounds=rounds),
        "facts": {name: facts_of(one) for name, one in programs.items()},
    }


def rows(model: Model, **how: int) -> dict[str, Any]:
    """Clip the gradient of every row, or their mean."""
    batch = jax.tree.map(jnp.asarray, model.batch)

    def variant(*transforms: sc.Transform) -> Variant:
        pipeline = sc.update(adamw())
        for transform in (*transforms, sc.grad(model.make_loss())):
            pipeline = pipeline @ transform
        return Variant(sc.compile(pipeline), model.params, batch)

    variants = {"clip": variant(sc.clip(1.0)), "rows() @ clip": variant(sc.rows(), sc.clip(1.0))}
    return compare("rows", model.name, variants, "clip", is_same=False, **how)


def frozen(width: int, *, num_rows: int, devices: int, rounds: int, calls: int) -> dict[str, Any]:
    """Adapters of rank 8 beside four layers of 8 bits: `wrt="lora/**"`, and by hand a gradient of those alone."""
    random = np.random.default_rng(0)
    down, up = (random.normal(size=shape).astype(np.float32) / width for shape in ((4, width, 8), (4, 8, width)))
    base = random.integers(-100, 100, size=(4, width, width)).astype(np.int8)
    rows = {name: random.normal(size=(num_rows, width)).astype(np.float32) for name in ("x", "y")}

    def loss(params: Any, rows: Any) -> jax.Array:
        def layer(x: jax.Array, of: Any) -> tuple[jax.Array, None]:
            weights = of["base"].astype(jnp.float32) / (100 * width**0.5)
            return jnp.tanh(x @ weights + x @ of["lora"]["down"] @ of["lora"]["up"]), None

        return jnp.mean((jax.lax.scan(layer, rows["x"], params)[0] - rows["y"]) ** 2)

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    replicated, along = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    params = jax.device_put({"base": base, "lora": {"down": down, "up": up}}, replicated)
    batch = jax.device_put(rows, along)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw())

    def mean_gradient(lora: Any, base: Any, rows: Any) -> tuple[jax.Array, Any]:
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, 4, *leaf.shape[1:]).swapaxes(0, 1), rows)

        def iteration(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(
                jnp.add, total, jax.value_and_grad(lambda lora: loss({"base": base, "lora": lora}, part))(lora)
            ), None

        total, _ = jax.lax.scan(iteration, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, lora)), parts)
        return jax.tree.map(lambda leaf: leaf / (4 * devices), jax.lax.psum(total, "data"))

    reduced = jax.shard_map(
        mean_gradient, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(), check_vma=False,
    )  # fmt: skip

    def hand(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state = state
        value, grads = reduced(params["lora"], params["base"], batch)
        updates, opt_state = optimizer.update(grads, opt_state, params["lora"])
        new = {"base": params["base"], "lora": optax.apply_updates(params["lora"], updates)}
        return (new, opt_state), {"loss": value}

    by_hand = jax.jit(hand, donate_argnums=0)
    shared = sc.accumulate(4) @ sc.shard(sc.dp("data")) @ sc.grad(loss, wrt="lora/**")
    step = sc.compile(sc.update(adamw()) @ sc.clip(1.0) @ shared, mesh=mesh)
    state = step.init(params)
    copied = jax.device_put(jax.tree.map(jnp.copy, params), replicated)
    hand_state = (copied, jax.device_put(optimizer.init(copied["lora"]), replicated))
    programs = {
        "by hand": by_hand.lower(hand_state, batch).compile(),
        "wrt": step.lower(state, batch).compile().executable,
    }
    facts = {name: facts_of(one) for name, one in programs.items()}
    (state, _), (hand_state, _) = step(state, batch), by_hand(hand_state, batch)
    difference = require_equal(*jax.device_get((state.params["lora"], hand_state[0]["lora"])), name="wrt")
    samples = {
        "by hand": Repeated(by_hand, hand_state, batch, calls=calls),
        "wrt": Repeated(step, state, batch, calls=calls),
    }
    return {
        "question": "frozen",
        "model": f"4 layers of width {width} in 8 bits, adapters of rank 8, {devices} devices",
        "difference": difference,
        "trained_bytes": down.nbytes + up.nbytes,
        **timed(samples, "by hand", rounds=rounds),
        "facts": facts,
    }


def across(width: int, *, num_rows: int, devices: int, rounds: int, calls: int) -> dict[str, Any]:
    """Two towers and a temperature: by the compiler, as GradCache by hand, and the whole batch at once."""
    random, num_parts = np.random.default_rng(0), 4
    layers = random.normal(size=(2, 4, width, width)).astype(np.float32) / width**0.5
    rows = {name: random.normal(size=(num_rows, width)).astype(np.float32) for name in ("image", "text")}

    def tower(x: jax.Array, kernels: jax.Array) -> jax.Array:
        for kernel in kernels:
            x = x + jax.nn.gelu(x @ kernel)
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    def encode(params: Any, rows: Any) -> Any:
        return {name: tower(rows[name], params[name]) for name in ("image", "text")}

    def head(params: Any, z: Any) -> jax.Array:
        logits = z["image"] @ z["text"].T * jnp.exp(params["log_scale"])
        right = jnp.arange(len(logits))
        both = [optax.softmax_cross_entropy_with_integer_labels(one, right) for one in (logits, logits.T)]
        return jnp.mean(both[0] + both[1]) / 2

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    replicated, along = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    params = {"image": layers[0], "text": layers[1], "log_scale": np.float32(2.0)}
    params, batch = jax.device_put(params, replicated), jax.device_put(rows, along)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw())

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, num_parts, *leaf.shape[1:]).swapaxes(0, 1), tree)

    def gradient(params: Any, rows: Any) -> tuple[jax.Array, Any]:
        parts, num_own = split(rows), len(jax.tree.leaves(rows)[0])
        _, z = jax.lax.scan(lambda _, part: (None, encode(params, part)), None, parts)
        z = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(num_own, -1), z)
        together = jax.lax.all_gather(jnp.concatenate([z["image"], z["text"]], axis=1), "data", tiled=True)
        whole = dict(zip(("image", "text"), jnp.split(together, 2, axis=1), strict=True))

        def of_head(log_scale: jax.Array, z: Any) -> jax.Array:
            return head({"log_scale": log_scale}, z)

        value, (of_scale, cotangents) = jax.value_and_grad(of_head, argnums=(0, 1))(params["log_scale"], whole)
        place = jax.lax.axis_index("data") * num_own
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, place, num_own), cotangents)

        def again(total: Any, part: Any) -> tuple[Any, None]:
            _, pull = jax.vjp(lambda towers: encode(towers, part[0]), towers)
            return jax.tree.map(jnp.add, total, pull(part[1])[0]), None

        towers = {name: params[name] for name in ("image", "text")}
        total, _ = jax.lax.scan(again, jax.tree.map(jnp.zeros_like, towers), (parts, split(own)))
        return value, {**jax.lax.psum(total, "data"), "log_scale": of_scale}

    reduced = jax.shard_map(
        gradient, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip

    def hand(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state = state
        value, grads = reduced(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value}

    def plain(params: Any, rows: Any) -> jax.Array:
        return head(params, encode(params, rows))

    by_hand, outer = jax.jit(hand, donate_argnums=0), sc.update(adamw()) @ sc.clip(1.0)
    source = sc.accumulate(num_parts) @ sc.shard(sc.dp("data")) @ sc.grad(sc.across(head) @ encode)
    step = sc.compile(outer @ source, mesh=mesh)
    at_once = sc.compile(outer @ sc.shard(sc.dp("data"), mode="auto") @ sc.grad(plain), mesh=mesh)
    states = {"across": step.init(params), "at once": at_once.init(params)}
    copied = jax.device_put(jax.tree.map(jnp.copy, params), replicated)
    hand_state = (copied, jax.device_put(optimizer.init(copied), replicated))
    programs = {
        "by hand": by_hand.lower(hand_state, batch).compile(),
        "across": step.lower(states["across"], batch).compile().executable,
        "at once": at_once.lower(states["at once"], batch).compile().executable,
    }
    facts = {name: facts_of(one) for name, one in programs.items()}
    hand_state, _ = by_hand(hand_state, batch)
    found = {}
    for name, one in (("across", step), ("at once", at_once)):
        states[name], _ = one(states[name], batch)
        found[name] = require_equal(*jax.device_get((states[name].params, hand_state[0])), name=name)
    samples = {
        "by hand": Repeated(by_hand, hand_state, batch, calls=calls),
        "across": Repeated(step, states["across"], batch, calls=calls),
        "at once": Repeated(at_once, states["at once"], batch, calls=calls),
    }
    return {
        "question": "across",
        "model": f"two towers of 4 layers of width {width}, {num_rows} rows, k = {num_parts}, {devices} devices",
        "difference": found,
        **timed(samples, "by hand", rounds=rounds),
        "facts": facts,
    }


def sam(model: Model, *, devices: int, rounds: int, calls: int) -> dict[str, Any]:
    """Two gradients a step: `sam(0.05) @ accumulate(4)`, and by hand two scans and two sums over the devices."""
    loss, optimizer, num_parts = model.make_loss(), adamw(), 4
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    replicated, along = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    params, batch = jax.device_put(model.params, replicated), jax.device_put(model.batch, along)

    def gradient(params: Any, rows: Any) -> tuple[jax.Array, Any]:
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, num_parts, *leaf.shape[1:]).swapaxes(0, 1), rows)

        def iteration(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

        total, _ = jax.lax.scan(iteration, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)), parts)
        return jax.tree.map(lambda leaf: leaf / (num_parts * devices), jax.lax.psum(total, "data"))

    reduced = jax.shard_map(
        gradient, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip

    def hand(state: Any, batch: Any) -> tuple[Any, Any]:
        params, opt_state = state
        value, grads = reduced(params, batch)
        factor = 0.05 / optax.tree.norm(grads)
        moved = jax.tree.map(lambda leaf, grad: leaf + factor * grad, params, grads)
        updates, opt_state = optimizer.update(reduced(moved, batch)[1], opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value}

    by_hand = jax.jit(hand, donate_argnums=0)
    source = sc.sam(0.05) @ sc.accumulate(num_parts) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
    step = sc.compile(sc.update(optimizer) @ source, mesh=mesh)
    state = step.init(params)
    copied = jax.device_put(jax.tree.map(jnp.copy, params), replicated)
    hand_state = (copied, jax.device_put(optimizer.init(copied), replicated))
    programs = {
        "by hand": by_hand.lower(hand_state, batch).compile(),
        "sam": step.lower(state, batch).compile().executable,
    }
    (state, _), (hand_state, _) = step(state, batch), by_hand(hand_state, batch)
    difference = require_equal(*jax.device_get((state.params, hand_state[0])), name="sam")
    samples = {
        "by hand": Repeated(by_hand, hand_state, batch, calls=calls),
        "sam": Repeated(step, state, batch, calls=calls),
    }
    return {
        "question": "sam",
        "model": f"{model.name}, k = {num_parts}, {devices} device{'s' * (devices > 1)}",
        "difference": difference,
        **timed(samples, "by hand", rounds=rounds),
        "facts": {name: facts_of(one) for name, one in programs.items()},
    }


def tell(found: Mapping[str, Any]) -> None:
    """One table for one question and model."""
    table = [
        ("", "us a step", f"of {found['base']}", "CPU", "target", "temporaries, MB", "copies", "collectives (bytes)")
    ]
    for name, seconds in found["seconds"].items():
        if name in TARGETS:
            plot(f"{name}: {found['model']}", found["ratio"][name], TARGETS[name])
        facts, quotient = found.get("facts", {}).get(name), found["ratio"][name]
        cells, processor = ("-", "-", "-"), f"{found['cpu_ratio'][name].median:.3f}"
        if facts is not None:
            reduced = ", ".join(f"{row['kind']} {row['bytes']:,}" for row in facts["collectives"])
            cells = (f"{facts['temporary_bytes'] / 1e6:.3f}", str(facts["copies"]), reduced or "none")
        table.append((name, seconds.shown(1e6, 1), quotient.shown(1.0, 3), processor, target_of(found, name), *cells))
    show(f"{found['question']}: {found['model']}; median (quartiles)", table)


def target_of(found: Mapping[str, Any], name: str) -> str:
    """The target of a variant, and whether it is met."""
    median = found["ratio"][name].median
    if name == "repeat(32)":
        throughput = found["throughput"].median
        return f">= {REPEAT:.0f} times, {throughput:.1f} {'met' if throughput >= REPEAT else 'MISSED'}"
    return at_most(median, TARGETS[name]) if name in TARGETS else "-"


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    options = parser.parse_args()
    quick, rounds = options.quick, 3 if options.quick else options.rounds
    setting = begin("what the transforms cost that keep numbers right")
    size = gpt.Size(layers=1, width=16, heads=2, context=16) if quick else DEMO
    widths, num_rows = ((8, 16, 4), 64) if quick else ((64, 256, 256, 16), 256)
    results = []
    for measured in (
        lambda: skip(mlp(widths, rows=num_rows), rounds=rounds, calls=50),
        lambda: skip(small_gpt(size, rows=16), rounds=rounds, calls=1),
        lambda: dropout(size, num_rows=16, rounds=rounds, calls=1),
        lambda: repeat(mlp((8, 8, 8), rows=8), rounds=rounds, calls=5 if quick else 30),
        lambda: epochs(mlp(widths, rows=8 * num_rows), rounds=rounds, calls=2),
        lambda: alternate(32 if quick else 512, num_rows=num_rows, rounds=rounds, calls=2),
        lambda: rows(mlp(widths, rows=num_rows), rounds=rounds, calls=5),
        lambda: frozen(64 if quick else 512, num_rows=256, devices=1, rounds=rounds, calls=5),
        lambda: across(64 if quick else 256, num_rows=64 if quick else 512, devices=1, rounds=rounds, calls=5),
        lambda: sam(mlp(widths, rows=num_rows), devices=1, rounds=rounds, calls=20),
        lambda: terms(mlp(widths, rows=num_rows), rounds=rounds, calls=20),  # from here on there are eight devices
        lambda: frozen(64 if quick else 512, num_rows=256, devices=8, rounds=rounds, calls=5),
        lambda: across(64 if quick else 256, num_rows=64 if quick else 512, devices=8, rounds=rounds, calls=5),
        lambda: sam(mlp(widths, rows=num_rows), devices=NUM_DEVICES, rounds=rounds, calls=20),
    ):
        results.append(measured())
        tell(results[-1])
    finish("cost_of_transforms", setting, results, quick=quick, save=options.save)


if __name__ == "__main__":
    main()
