"""The example steps by hand, in plain JAX and optax on one device: what the compiled steps must equal.

Each is a generator: after every step it yields what the step's state and metrics must hold, by name. Most take the
whole batch at once, because their result does not depend on how it is split. Those whose result does are loops over
the parts: microbatch j has the rows j, j + k, ..., and device i the i-th contiguous part of them.
"""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.steps import (
    byol,
    clip_two_towers,
    diffusion,
    dp_sgd,
    dqn,
    equinox_state,
    fp16_loss_scale,
    frozen_embeddings,
    frozen_encoder,
    gan,
    haiku_state,
    lbfgs,
    linen_batch_stats,
    lora,
    moe,
    moe_all_to_all,
    nnx_dropout_batchnorm,
    packed_tokens,
    ppo,
    qlora,
    sam,
    tbptt,
    vae,
)

Tree: TypeAlias = Any  # Any: trees of arrays
Found: TypeAlias = dict[str, Tree]
Optimizer: TypeAlias = optax.GradientTransformation
KEY = jax.random.key(0)  # of the parameters, and of the state with seed 0
NUM_ROWS = 64  # of a batch whose rows are numbered


def keys_of_rows(step: int) -> jax.Array:
    """A key for each row of the batch: folded from the seed, the step and the number of the row."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(KEY, step), jnp.arange(NUM_ROWS))


def rollout() -> Tree:
    """The batch of `ppo`, which acts by its parameters."""
    return jax.device_get(ppo.rollout(ppo.init(KEY), jax.random.key(1)))


def parts_of(batch: Tree, k: int, devices: int) -> list[list[tuple[Tree, int]]]:
    """For each microbatch, the rows of each device, and the number of the first of them."""

    numbers = np.arange(len(jax.tree.leaves(batch)[0]))

    def part(j: int, i: int) -> tuple[Tree, int]:
        rows, numbers_of = jax.tree.map(lambda leaf: np.split(leaf[j::k], devices)[i], (batch, numbers))
        return rows, numbers_of[0]

    return [[part(j, i) for i in range(devices)] for j in range(k)]


def mean(trees: list[Tree]) -> Tree:
    """The mean of trees. Keys and whole numbers do not depend on the rows: they are the same in all."""

    def mean_of(*leaves: Any) -> Any:
        return sum(leaves) / len(leaves) if jnp.issubdtype(leaves[0].dtype, jnp.floating) else leaves[0]

    return jax.tree.map(mean_of, *trees)


def trained_part(example: ModuleType, trained: tuple[str, ...], *, has_average: bool = False) -> Iterator[Found]:
    """A gradient with respect to a part of the parameters, and an average of that part."""
    params, batch = example.init(KEY), example.batch()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    own = {name: params[name] for name in trained}
    average, opt_state = own, optimizer.init(own)

    @jax.jit
    def step(own: Tree, opt_state: Tree, average: Tree) -> tuple[Tree, Tree, Tree, jax.Array]:
        loss, grads = jax.value_and_grad(lambda own: example.loss({**params, **own}, batch))(own)
        updates, opt_state = optimizer.update(grads, opt_state, own)
        own = optax.apply_updates(own, updates)
        return own, opt_state, jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, average, own), loss

    while True:
        own, opt_state, average, loss = step(own, opt_state, average)
        yield {"params": {**params, **own}, "loss": loss} | ({"ema": average} if has_average else {})


def trained_adapters() -> Iterator[Found]:
    """LoRA in Flax NNX: the adapters are a type of variable."""
    adapters, base = nnx.split_state(lora.init(KEY), nnx.LoRAParam, ...)
    batch, optimizer = lora.batch(), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = optimizer.init(adapters)

    @jax.jit
    def step(adapters: Tree, opt_state: Tree) -> tuple[Tree, Tree, jax.Array]:
        loss_of = lambda adapters: lora.loss(nnx.merge_state(adapters, base), batch)  # noqa: E731
        loss, grads = jax.value_and_grad(loss_of)(adapters)
        updates, opt_state = optimizer.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, loss

    while True:
        adapters, opt_state, loss = step(adapters, opt_state)
        yield {"params": nnx.merge_state(adapters, base), "loss": loss}


def model_state(example: ModuleType, optimizer: Optimizer, k: int, devices: int) -> Iterator[Found]:
    """It goes through the microbatches in order. Every device returns one, and the next is their mean."""
    params, state = example.init(KEY)
    opt_state, parts = optimizer.init(params), parts_of(example.batch(), k, devices)

    def loss_of(params: Tree, rows: Tree, state: Tree) -> tuple[jax.Array, Tree]:
        return example.loss(params, rows, jax.tree.map(lambda leaf: leaf, state))  # NNX: nodes of this trace

    value_and_grad = jax.jit(jax.value_and_grad(loss_of, has_aux=True))

    def with_keys(state: Tree, keys: Tree, number: int) -> Tree:
        """The state, its keys those of `keys` folded with a number."""
        is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
        return jax.tree.map(lambda leaf, key: jax.random.fold_in(key, number) if is_key(leaf) else leaf, state, keys)

    while True:
        before, losses, grads = state, [], []
        for microbatch in parts:
            results = [value_and_grad(params, rows, with_keys(state, before, first)) for rows, first in microbatch]
            state = mean([state for (_, state), _ in results])
            losses += [loss for (loss, _), _ in results]
            grads += [grad for _, grad in results]
        state = with_keys(state, before, 2**31)  # the keys advance once a step
        updates, opt_state = optimizer.update(mean(grads), opt_state, params)
        params = optax.apply_updates(params, updates)
        yield {"params": params, "model_state": state, "loss": mean(losses)}


def online_and_teacher() -> Iterator[Found]:
    """BYOL: the teacher moves after the step."""
    params, batch, optimizer = byol.init(KEY), byol.batch(), optax.sgd(0.1, momentum=0.9)
    teacher, opt_state = params, optimizer.init(params)

    @jax.jit
    def step(params: Tree, opt_state: Tree, teacher: Tree, keys: jax.Array) -> tuple[Tree, Tree, Tree, jax.Array]:
        loss, grads = jax.value_and_grad(byol.loss)(params, batch, keys, ema=teacher)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, teacher, params), loss

    number = 0
    while True:
        params, opt_state, teacher, loss = step(params, opt_state, teacher, keys_of_rows(number))
        number += 1
        yield {"params": params, "ema": teacher, "loss": loss}


def value_and_target() -> Iterator[Found]:
    """DQN: the target network is copied after every second step."""
    params, batch = dqn.init(KEY), dqn.batch()
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(1e-3))
    target, opt_state = params, optimizer.init(params)

    @jax.jit
    def step(params: Tree, opt_state: Tree, target: Tree) -> tuple[Tree, Tree, jax.Array]:
        loss, grads = jax.value_and_grad(dqn.loss)(params, batch, ema=target)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    number = 0
    while True:
        params, opt_state, loss = step(params, opt_state, target)
        number += 1
        target = params if number % 2 == 0 else target
        yield {"params": params, "ema": target, "loss": loss}


def sharpness_aware() -> Iterator[Found]:
    """SAM: the second gradient is that at the moved parameters."""
    params, batch, optimizer = sam.init(KEY), sam.batch(), optax.sgd(0.1, momentum=0.9)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params: Tree, opt_state: Tree) -> tuple[Tree, Tree, jax.Array]:
        loss, grads = jax.value_and_grad(sam.loss)(params, batch)
        factor = 0.05 / optax.tree.norm(grads)
        moved = jax.tree.map(lambda leaf, grad: leaf + factor * grad, params, grads)
        updates, opt_state = optimizer.update(jax.grad(sam.loss)(moved, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    while True:
        params, opt_state, loss = step(params, opt_state)
        yield {"params": params, "loss": loss}


def denoised() -> Iterator[Found]:
    """The diffusion model, with the keys of the rows."""
    params, batch = diffusion.init(KEY), diffusion.batch()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    average, opt_state = params, optimizer.init(params)

    @jax.jit
    def step(params: Tree, opt_state: Tree, average: Tree, keys: jax.Array) -> tuple[Tree, Tree, Tree, jax.Array]:
        loss, grads = jax.value_and_grad(diffusion.loss)(params, batch, keys)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, average, params), loss

    number = 0
    while True:
        params, opt_state, average, loss = step(params, opt_state, average, keys_of_rows(number))
        number += 1
        yield {"params": params, "ema": average, "loss": loss}


def hidden_states() -> Iterator[Found]:
    """Truncated backpropagation: the hidden states of the whole batch."""
    (params, carried), batch = tbptt.init(KEY), tbptt.batch()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params: Tree, opt_state: Tree, carried: Tree) -> tuple[Tree, Tree, Tree, jax.Array]:
        (loss, carried), grads = jax.value_and_grad(tbptt.loss, has_aux=True)(params, batch, carried)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, carried, loss

    while True:
        params, opt_state, carried, loss = step(params, opt_state, carried)
        yield {"params": params, "model_state": carried, "loss": loss}


def means_over_tokens() -> Iterator[Found]:
    """Packed sequences: the tokens that count are selected, and each term is their plain mean."""
    params, batch = packed_tokens.init(KEY), packed_tokens.batch()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state, tokens, texts = optimizer.init(params), batch["tokens"], batch["texts"]

    def loss_of(params: Tree) -> jax.Array:
        logits = packed_tokens.Decoder().apply(params, tokens, texts)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        within = (texts[:, 1:] == texts[:, :-1]) & (texts[:, 1:] > 0)
        return nll[within].mean() + 1e-4 * (jax.nn.logsumexp(logits, axis=-1)[texts > 0] ** 2).mean()

    @jax.jit
    def step(params: Tree, opt_state: Tree) -> tuple[Tree, Tree, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    while True:
        params, opt_state, loss = step(params, opt_state)
        yield {"params": params, "loss": loss}


def scaled_float16(k: int, devices: int) -> Iterator[Found]:
    """Each part's gradient is rounded to float16; their mean is taken in float32. An overflow halves the scale."""
    params, parts, scale = fp16_loss_scale.init(KEY), parts_of(fp16_loss_scale.batch(), k, devices), 2.0**13
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4))
    opt_state = optimizer.init(params)

    def scaled_loss(params: Tree, rows: Tree, scale: float) -> tuple[jax.Array, jax.Array]:
        loss = fp16_loss_scale.loss(*jax.tree.map(lambda leaf: leaf.astype(jnp.float16), (params, rows)))
        return loss * scale, loss

    value_and_grad = jax.jit(jax.value_and_grad(scaled_loss, has_aux=True))
    while True:
        results = [value_and_grad(params, rows, scale) for microbatch in parts for rows, _ in microbatch]
        loss, used = mean([loss for (_, loss), _ in results]), scale
        grads = jax.tree.map(lambda leaf, used=used: leaf / used, mean([grads for _, grads in results]))
        is_finite = bool(jnp.isfinite(optax.tree.norm(grads)))
        if is_finite:
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        else:
            scale = scale / 2
        yield {"params": params, "loss": loss, "loss_scale": used, "skipped": not is_finite}


def line_search() -> Iterator[Found]:
    """L-BFGS as optax's own documentation writes it."""
    params, batch, optimizer = lbfgs.init(KEY), lbfgs.batch(), optax.lbfgs()
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params: Tree, opt_state: Tree) -> tuple[Tree, Tree, jax.Array]:
        loss_of = lambda params: lbfgs.loss(params, batch)  # noqa: E731
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss, grad=grads, value_fn=loss_of)
        return optax.apply_updates(params, updates), opt_state, loss

    while True:
        params, opt_state, loss = step(params, opt_state)
        yield {"params": params, "loss": loss}


def private() -> Iterator[Found]:
    """DP-SGD: the noise is drawn with a key of the step and of the transform, one for each leaf."""
    params, batch, optimizer = dp_sgd.init(KEY), dp_sgd.batch(), optax.sgd(0.5)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params: Tree, opt_state: Tree, key: jax.Array) -> tuple[Tree, Tree, jax.Array]:
        def clipped(row: Tree) -> tuple[jax.Array, Tree]:
            loss, grads = jax.value_and_grad(dp_sgd.loss)(params, jax.tree.map(lambda leaf: leaf[None], row))
            factor = jnp.minimum(1, 0.5 / optax.tree.norm(grads))
            return loss, jax.tree.map(lambda leaf: leaf * factor, grads)

        loss, grads = jax.tree.map(lambda leaf: leaf.mean(axis=0), jax.vmap(clipped)(batch))
        leaves, tree = jax.tree.flatten(grads)
        for number, leaf in enumerate(leaves):
            leaves[number] = leaf + 0.5 / NUM_ROWS * jax.random.normal(jax.random.fold_in(key, number), leaf.shape)
        updates, opt_state = optimizer.update(tree.unflatten(leaves), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    number = 0
    while True:
        key = jax.random.fold_in(jax.random.fold_in(KEY, number), zlib.crc32(b"noise") | 2**31)
        params, opt_state, loss = step(params, opt_state, jax.random.fold_in(key, 0))
        number += 1
        yield {"params": params, "loss": loss}


def annealed() -> Iterator[Found]:
    """The autoencoder: the loss takes the number of the step."""
    params, batch, optimizer = vae.init(KEY), vae.batch(), optax.adam(1e-3)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params: Tree, opt_state: Tree, keys: jax.Array, number: int) -> tuple[Tree, Tree, Found]:
        (loss, parts), grads = jax.value_and_grad(vae.loss, has_aux=True)(params, batch, keys, step=number)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **parts}

    number = 0
    while True:
        params, opt_state, metrics = step(params, opt_state, keys_of_rows(number), number)
        number += 1
        yield {"params": params, **metrics}


def epochs() -> Iterator[Found]:
    """PPO: the minibatches of each epoch are those of a permutation drawn for it."""
    params, batch = ppo.init(KEY), rollout()
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(3e-3))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params: Tree, opt_state: Tree, rows: Tree) -> tuple[Tree, Tree, Found]:
        (loss, parts), grads = jax.value_and_grad(ppo.loss, has_aux=True)(params, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **parts}

    number = 0
    while True:
        key, metrics = jax.random.fold_in(jax.random.fold_in(KEY, number), zlib.crc32(b"epochs") | 2**31), []
        for epoch in range(4):
            order = jax.random.permutation(jax.random.fold_in(key, epoch), 256)
            for numbers in np.split(np.asarray(order), 4):
                rows = jax.tree.map(lambda leaf, numbers=numbers: leaf[numbers], batch)
                params, opt_state, found = step(params, opt_state, rows)
                metrics.append(found)
        number += 16
        yield {"params": params, **{name: np.stack([one[name] for one in metrics]) for name in metrics[0]}}


def critic_and_generator() -> Iterator[Found]:
    """A step of the critic, and in every second step one of the generator, which sees what the critic has become."""
    params, batch = gan.init(KEY), gan.batch()
    losses = {"d": lambda *given: gan.critic_loss(*given)[0], "g": gan.generator_loss}
    optimizers = {"d": optax.adam(2e-3, b1=0.5), "g": optax.adam(1e-3, b1=0.5)}
    opt_states, average = {name: optimizers[name].init(params[name]) for name in "dg"}, params

    @partial(jax.jit, static_argnums=0)
    def step(name: str, params: Tree, opt_state: Tree, keys: jax.Array) -> tuple[Tree, Tree, jax.Array]:
        loss, grads = jax.value_and_grad(lambda own: losses[name]({**params, name: own}, batch, keys))(params[name])
        updates, opt_state = optimizers[name].update(grads, opt_state)
        return {**params, name: optax.apply_updates(params[name], updates)}, opt_state, loss

    number = 0
    while True:
        found: Found = {}
        for name in "dg" if number % 2 else "d":
            key = jax.random.fold_in(jax.random.fold_in(KEY, zlib.crc32(name.encode()) | 2**31), number)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(NUM_ROWS))
            params, opt_states[name], found[f"{name}/loss"] = step(name, params, opt_states[name], keys)
        average = jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, average, params)
        number += 1
        yield {"params": params, "ema": average, "loss": sum(found.values()), **found}


def all_pairs() -> Iterator[Found]:
    """Every image against every text of the batch."""
    params, batch = clip_two_towers.init(KEY), clip_two_towers.batch()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    opt_state = optimizer.init(params)

    def loss(params: Tree) -> jax.Array:
        image, text = (jnp.tanh(batch[name] @ params[name]) for name in ("image", "text"))
        image, text = (z / jnp.sqrt(jnp.sum(z * z, axis=1, keepdims=True)) for z in (image, text))
        logits = image @ text.T / jnp.exp(params["log_temperature"])
        both = jax.nn.logsumexp(logits, axis=0) + jax.nn.logsumexp(logits, axis=1)
        return jnp.mean(both / 2 - jnp.diagonal(logits))

    while True:
        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield {"params": params, "loss": value}


def balanced_experts() -> Iterator[Found]:
    """The balance is a product of means over the whole batch."""
    params, batch = moe.init(KEY), moe.batch()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    opt_state = optimizer.init(params)

    def loss(params: Tree) -> tuple[jax.Array, jax.Array]:
        gates = jax.nn.softmax(batch["x"] @ params["router"])
        chosen = jax.nn.one_hot(jnp.argmax(gates, axis=1), moe.EXPERTS)
        predicted = jnp.einsum("ni,eij,ne->nj", batch["x"], params["experts"], gates * chosen)
        balance = moe.EXPERTS * jnp.sum(chosen.mean(axis=0) * gates.mean(axis=0))
        return jnp.mean((predicted - batch["y"]) ** 2) + 0.01 * balance, balance

    while True:
        (value, balance), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield {"params": params, "loss": value, "balance": balance}


def experts_on_one_device() -> Iterator[Found]:
    params, batch = moe_all_to_all.init(KEY), moe_all_to_all.batch()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    opt_state = optimizer.init(params)

    def loss(params: Tree) -> jax.Array:
        scores, chosen = jax.lax.top_k(batch["x"] @ params["router"], moe_all_to_all.CHOSEN)
        gate, up, down = (params["experts"][name] for name in ("gate", "up", "down"))
        made = (jax.nn.silu(batch["x"] @ gate) * (batch["x"] @ up)) @ down  # by every expert
        picked = made[chosen, jnp.arange(len(chosen))[:, None]]
        return jnp.mean((jnp.einsum("nc,nci->ni", jax.nn.softmax(scores), picked) - batch["y"]) ** 2)

    while True:
        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield {"params": params, "loss": value}


SGD = optax.sgd(0.1, momentum=0.9)
# Of the whole batch, whatever k and the mesh are.
OF_THE_BATCH: dict[str, Callable[[], Iterator[Found]]] = {
    "qlora": partial(trained_part, qlora, ("lora",)),
    "frozen_encoder": partial(trained_part, frozen_encoder, ("head",)),
    "frozen_embeddings": partial(trained_part, frozen_embeddings, ("mix", "head"), has_average=True),
    "lora": trained_adapters,
    "byol": online_and_teacher,
    "dqn": value_and_target,
    "sam": sharpness_aware,
    "diffusion": denoised,
    "tbptt": hidden_states,
    "packed_tokens": means_over_tokens,
    "lbfgs": line_search,
    "dp_sgd": private,
    "vae": annealed,
    "ppo": epochs,
    "gan": critic_and_generator,
    "clip_two_towers": all_pairs,
    "moe": balanced_experts,
    "moe_all_to_all": experts_on_one_device,
}
# Of k microbatches on some devices.
OF_PARTS: dict[str, Callable[[int, int], Iterator[Found]]] = {
    "nnx_dropout_batchnorm": partial(model_state, nnx_dropout_batchnorm, optax.adamw(1e-3)),
    "linen_batch_stats": partial(model_state, linen_batch_stats, SGD),
    "equinox_state": partial(model_state, equinox_state, SGD),
    "haiku_state": partial(model_state, haiku_state, optax.chain(optax.clip_by_global_norm(1.0), SGD)),
    "fp16_loss_scale": scaled_float16,
}
