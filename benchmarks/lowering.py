"""Does it take longer to lower the step of a model than the same step by hand?

The demo's GPT, and six transformer blocks in Flax, as a module of Linen and of NNX: what is lowered is a step with clip
and adamw, k = 4, on one device and on eight simulated ones with a replicated state. By hand: a `lax.scan` over
microbatches, in a `jax.shard_map` on eight. Lowering is from a loss that jax has not seen to StableHLO, with stepc's
plan in it; no array is made. How often the loss is called is counted.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from measuring import CPU_SECONDS, arguments, begin, finish, interleaved, ratio, require_equal, show, spreads, verdict
from models import Loss, Model, adamw, small_gpt
from size import MAX_NORM, NUM_DEVICES, K, optimizer, replicated_step, staged

import stepc as sc
from examples.gpt.model import Size

TARGET = 1.10  # of by hand
WIDTH, HEADS, BLOCKS, CONTEXT, TOKENS = 64, 4, 6, 16, 65
ROWS = 2 * K * NUM_DEVICES


class LinenBlock(nn.Module):
    """Attention and two dense layers, each behind a norm."""

    @nn.compact
    def __call__(self, stream: jax.Array) -> jax.Array:
        normed = nn.LayerNorm()(stream)
        stream = stream + nn.MultiHeadDotProductAttention(num_heads=HEADS)(normed, normed)
        return stream + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(stream))))


class LinenModel(nn.Module):
    """Blocks between an embedding and a dense layer."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        stream = nn.Embed(TOKENS, WIDTH)(tokens)
        for _ in range(BLOCKS):
            stream = LinenBlock()(stream)
        return nn.Dense(TOKENS)(nn.LayerNorm()(stream))


class NNXBlock(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, stream: jax.Array) -> jax.Array:
        stream = stream + self.attention(self.norms[0](stream))
        return stream + self.down(nnx.gelu(self.up(self.norms[1](stream))))


class NNXModel(nnx.Module):
    """The same."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, TOKENS, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        stream = self.embedding(tokens)
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream))


def mean_cross_entropy(scores: Any, tokens: jax.Array) -> jax.Array:  # Any: Linen may return a tuple
    return optax.softmax_cross_entropy_with_integer_labels(scores, tokens).mean()


def models() -> list[Model]:
    """The three."""
    tokens = np.random.default_rng(0).integers(0, TOKENS, (ROWS, CONTEXT)).astype(np.int32)
    linen = LinenModel()

    def linen_loss() -> Loss:
        return lambda params, tokens: mean_cross_entropy(linen.apply(params, tokens), tokens)

    graph, params, rest = nnx.split(NNXModel(nnx.Rngs(0)), nnx.Param, ...)

    def nnx_loss() -> Loss:
        return lambda params, tokens: mean_cross_entropy(nnx.merge(graph, params, rest)(tokens), tokens)

    return [
        small_gpt(Size(layers=4, width=64, heads=4, context=128), rows=ROWS),
        Model(f"{BLOCKS} blocks, Linen", linen_loss, linen.init(jax.random.key(0), tokens[:2]), tokens),
        Model(f"{BLOCKS} blocks, NNX", nnx_loss, params, tokens),
    ]


class Counted:
    """A loss that counts its calls."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.calls = loss, 0

    def __call__(self, params: Any, rows: Any) -> jax.Array:
        self.calls += 1
        return self.loss(params, rows)


def by_stepc(loss: Loss, mesh: Mesh | None) -> sc.Step:
    gradient = sc.grad(loss) if mesh is None else sc.shard(sc.dp("data")) @ sc.grad(loss)
    return sc.compile(sc.update(adamw()) @ sc.clip(MAX_NORM) @ sc.accumulate(K) @ gradient, mesh=mesh)


def measure(model: Model, mesh: Mesh | None, *, rounds: int) -> dict[str, Any]:
    """Both steps, side by side; and whether they are the same step."""
    params, batch = (jax.eval_shape(lambda tree: tree, tree) for tree in (model.params, model.batch))
    losses: dict[str, Counted] = {}

    def ours() -> tuple[Any, Any]:
        losses["stepc"] = Counted(model.make_loss())
        step = by_stepc(losses["stepc"], mesh)
        return step, step.init(params)

    def theirs() -> tuple[Any, Any]:
        losses["by hand"] = Counted(model.make_loss())
        return replicated_step(losses["by hand"], mesh), (params, jax.eval_shape(optimizer().init, params))

    makers: dict[str, Callable[[], tuple[Any, Any]]] = {"stepc": ours, "by hand": theirs}
    samples = {name: staged(make, batch, compiles=False) for name, make in makers.items()}
    taken = {name: [one[0] for one in many] for name, many in interleaved(samples, rounds=rounds).items()}
    calls = {name: loss.calls for name, loss in losses.items()}
    step, hand = by_stepc(model.make_loss(), mesh), replicated_step(model.make_loss(), mesh)
    state, _ = step(step.init(model.params), model.batch)
    copies = jax.tree.map(jnp.copy, model.params)
    (others, _), _ = hand((copies, optimizer().init(copies)), model.batch)
    require_equal(state.params, others, name=f"stepc, {model.name},")
    return {
        "model": model.name,
        "devices": 1 if mesh is None else mesh.size,
        "cpu_seconds": spreads(taken, CPU_SECONDS),
        "ratio": ratio(taken, "stepc", "by hand", CPU_SECONDS),
        "calls_of_the_loss": calls,
    }


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_enable_compilation_cache", False)
    setting = begin(f"lowering the step of a model: stepc against by hand, k = {K}")
    eight = jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rounds = 1 if options.quick else options.rounds
    results = [measure(model, mesh, rounds=rounds) for model in models() for mesh in (None, eight)]
    rows = [("model", "devices", "stepc, CPU s", "by hand, CPU s", "ratio", "target", "calls of the loss, each")]
    for found in results:
        seconds, quotient, calls = found["cpu_seconds"], found["ratio"], found["calls_of_the_loss"]
        ours, theirs = (seconds[name].shown(1.0, 3) for name in ("stepc", "by hand"))
        met = verdict(quotient.median, TARGET)
        counted = ", ".join(str(calls[name]) for name in ("stepc", "by hand"))
        rows.append((found["model"], str(found["devices"]), ours, theirs, quotient.shown(1.0, 3), met, counted))
    show("lowering; median (quartiles)", rows)
    finish("lowering", setting, results, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
