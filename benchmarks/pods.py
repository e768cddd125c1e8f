"""What does a step communicate on hardware that is not here, and what does each device hold?

GPT-2-small (12 layers of width 768, 50,304 tokens, context 1,024; bfloat16 inside, float32 parameters, layers in a scan
and rematerialized), data x model = 64 x 4, k = 8, one row per microbatch and device, adamw. Compiled ahead of time for
  tpu:v5e:16x16      256 chips
  tpu:v5p:16x16x16   4,096 chips, replica x data x model = 16 x 64 x 4: sharded along data, replicated along replica
  gpu:h100:32x8      256 GPUs
by stepc with each level of `zero`, and as a GSPMD scan by hand: `jax.jit` with a sharded batch and a `lax.scan` over
strided microbatches.

A decoder like Llama 3 of 8 and of 70 billion parameters (`llama.py`; context 4,096), with k = 1 and 4, on 256 chips
and 512: by stepc with `zero=3`, and by hand, fully sharded over data and model. By hand it is reduced in bfloat16, in
which it computes, so stepc is given `reduce_dtype=jnp.bfloat16`. Three more of its kind, each by hand too: eight
experts along the axis of the model, eight experts along the axis of the rows (`mode="auto"`), and ring attention over
131,072 tokens.

No time is measured: these are the compiler's programs and memory plans. A topology whose compiler is not installed is
skipped, with the reason. Bytes are those of whole operands on one device over the data axes, times their executions in
a step, without scalars.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import llama
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measuring import arguments, begin, finish, show
from models import adamw

import stepc as sc

LAYERS, WIDTH, HEADS, TOKENS, CONTEXT, K = 12, 768, 12, 50_304, 1024, 8
PODS = {
    "gpu:h100:32x8": {"data": 64, "model": 4}, "tpu:v5e:16x16": {"data": 64, "model": 4},
    "tpu:v5p:16x16x16": {"replica": 16, "data": 64, "model": 4},
}  # fmt: skip
RULES = {
    "embedding": PartitionSpec("model"),
    "layers/qkv": PartitionSpec(None, None, None, "model"),
    "layers/out": PartitionSpec(None, "model"),
    "layers/up": PartitionSpec(None, None, "model"),
    "layers/down": PartitionSpec(None, "model"),
}


class Decoder(NamedTuple):
    """A decoder in the table: its size and sharding; of each pod the mesh and how many microbatches a step has.

    Args:
      ring: whether its attention is a ring.
    """

    size: str
    how: llama.Sharding
    pods: dict[str, tuple[dict[str, int], tuple[int, ...]]]
    ring: bool = False

    @property
    def mode(self) -> str:
        """Experts along the axis of the rows are a matter of all rows."""
        return "auto" if self.how is llama.ALONG_ROWS else "manual"


DECODERS = {
    "8B": Decoder("8B", llama.FULLY_SHARDED, {
        "gpu:h100:32x8": ({"data": 64, "model": 4}, (1, 4)), "tpu:v5e:16x16": ({"data": 64, "model": 4}, (1, 4)),
        "tpu:v5p:8x8x4": ({"data": 64, "model": 4}, (1, 4)),
    }),
    "70B": Decoder("70B", llama.FULLY_SHARDED, {
        "gpu:h100:64x8": ({"data": 128, "model": 4}, (4,)), "tpu:v5p:8x8x8": ({"data": 128, "model": 4}, (4,)),
    }),
    "experts along model": Decoder("Mixtral 8x7B", llama.ALONG_MODEL, {
        "gpu:h100:32x8": ({"data": 32, "model": 8}, (4,)), "tpu:v5p:8x8x4": ({"data": 32, "model": 8}, (4,)),
    }),
    "experts along the rows": Decoder("Mixtral 8x7B", llama.ALONG_ROWS, {
        "gpu:h100:32x8": ({"replica": 8, "data": 8, "model": 4}, (4,)),
        "tpu:v5p:8x8x4": ({"replica": 8, "data": 8, "model": 4}, (4,)),
    }),
    "ring attention": Decoder("8B, 131,072 tokens", llama.RING, {
        "gpu:h100:32x8": ({"data": 16, "seq": 16}, (4,)), "tpu:v5p:8x8x4": ({"data": 16, "seq": 16}, (4,)),
    }, ring=True),
}  # fmt: skip
GATHERS: dict[str, dict[str, Any]] = {
    "layer": {"gather": "layer"}, "layer, step": {"gather": ("layer", "step")}, "step": {"gather": "step"},
}  # fmt: skip
LEVELS: dict[str, dict[str, Any]] = {
    "zero=0": {}, "zero=1": {"zero": 1}, "zero=2": {"zero": 2}, "zero=3": {"zero": 3},
    "zero=3, layer": {"zero": 3, "gather": "layer"},
    "zero=1, bfloat16": {"zero": 1, "reduce_dtype": jnp.bfloat16},
}  # fmt: skip

Variants: TypeAlias = dict[str, Callable[[], jax.stages.Compiled]]


def shapes() -> dict[str, Any]:
    """The parameters, as shapes."""

    def one(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layers = {
        "qkv": one(LAYERS, WIDTH, 3, WIDTH), "out": one(LAYERS, WIDTH, WIDTH), "up": one(LAYERS, WIDTH, 4 * WIDTH),
        "down": one(LAYERS, 4 * WIDTH, WIDTH), "norm": one(LAYERS, 2, WIDTH),
    }  # fmt: skip
    return {"embedding": one(TOKENS, WIDTH), "position": one(CONTEXT, WIDTH), "norm": one(WIDTH), "layers": layers}


def loss(params: Any, batch: Any) -> jax.Array:
    """The mean cross-entropy of the next token."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tokens, labels = batch["tokens"][:, :-1], batch["tokens"][:, 1:]

    def norm(stream: jax.Array, gain: jax.Array) -> jax.Array:
        wide = stream.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(stream.dtype) * gain

    def heads(found: jax.Array) -> jax.Array:
        return found.reshape(*found.shape[:2], HEADS, WIDTH // HEADS)

    def block(stream: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        found = jnp.einsum("btd,dce->cbte", norm(stream, layer["norm"][0]), layer["qkv"])
        query, key, value = map(heads, found)
        scores = jnp.einsum("bthd,bshd->bhts", query, key).astype(jnp.float32) * (WIDTH // HEADS) ** -0.5
        seen = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9)).astype(stream.dtype)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, value).reshape(stream.shape)
        stream = stream + mixed @ layer["out"]
        return stream + jax.nn.gelu(norm(stream, layer["norm"][1]) @ layer["up"]) @ layer["down"], None

    stream = params["embedding"][tokens] + params["position"]
    stream, _ = jax.lax.scan(jax.checkpoint(block), stream, params["layers"])
    scores = jnp.einsum("btd,vd->btv", norm(stream, params["norm"]), params["embedding"]).astype(jnp.float32)
    return llama.mean_cross_entropy(scores, labels)


def rows_of(mesh: Mesh) -> tuple[str, ...]:
    """The data axes of the mesh."""
    return tuple(axis for axis in mesh.axis_names if axis not in ("model", "seq"))


def tokens(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """One row per microbatch and device along the data axes."""
    axes = rows_of(mesh)
    rows = prod(mesh.shape[axis] for axis in axes) * K
    by_rows = NamedSharding(mesh, PartitionSpec(axes))
    return {"tokens": jax.ShapeDtypeStruct((rows, CONTEXT + 1), jnp.int32, sharding=by_rows)}


def ours(mesh: Mesh, **level: Any) -> jax.stages.Compiled:
    """With stepc."""
    rules = sc.tp(RULES, default=PartitionSpec())
    transforms = sc.update(adamw()) @ sc.clip(1.0) @ sc.accumulate(K) @ sc.shard(sc.dp(rows_of(mesh), **level), rules)
    step = sc.compile(transforms @ sc.grad(loss), mesh=mesh)
    return step.lower(step.init(shapes()), tokens(mesh)).compile().executable


def our_decoder(decoder: Decoder, mesh: Mesh, k: int, **level: Any) -> jax.stages.Compiled:
    """With stepc."""
    model, how = llama.LLAMAS[decoder.size], decoder.how
    rules = sc.tp(dict(how.rules), default=PartitionSpec())
    if decoder.mode == "auto":
        sharded = sc.shard(sc.dp(how.rows), rules, mode="auto")
        loss = model.loss(partial(how.constrained, mesh=mesh))
    else:
        sharded = sc.shard(sc.dp(how.rows[0], zero=3, reduce_dtype=jnp.bfloat16, **level), rules)
        loss = model.loss(how.inside, mesh if decoder.ring else None)
    step = sc.compile(sc.update(adamw()) @ sc.clip(1.0) @ sc.accumulate(k) @ sharded @ sc.grad(loss), mesh=mesh)
    return step.lower(step.init(model.shapes()), llama.tokens(model, mesh, k, how.rows)).compile().executable


def decoder_by_hand(decoder: Decoder, mesh: Mesh, k: int) -> jax.stages.Compiled:
    """Sharded by constraints."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw())
    model = llama.LLAMAS[decoder.size]
    return llama.by_hand(model, optimizer, mesh, k, decoder.how, mesh if decoder.ring else None)


def gspmd_scan(mesh: Mesh) -> jax.stages.Compiled:
    """The partitioner is free to reduce where it likes; it reduces in the loop."""
    table = sc.compile(
        sc.update(adamw()) @ sc.shard(sc.tp(RULES, default=PartitionSpec())) @ sc.grad(loss), mesh=mesh
    ).init(shapes())
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw())
    state = jax.eval_shape(optimizer.init, table.params)
    moments = iter(jax.tree.leaves(table.opt_state))
    replicated = NamedSharding(mesh, PartitionSpec())
    given = jax.tree.map(lambda leaf: next(moments), state)
    split = NamedSharding(mesh, PartitionSpec(None, rows_of(mesh)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (table.params, given))

    def step(params: Any, state: Any, batch: Any) -> Any:
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, K, *leaf.shape[1:]).swapaxes(0, 1), batch)
        parts = jax.lax.with_sharding_constraint(parts, split)

        def iteration(total: Any, part: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(params, part)
            return jax.tree.map(jnp.add, total, (value, grads)), None

        start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (value, grads), _ = jax.lax.scan(iteration, start, parts)
        updates, state = optimizer.update(jax.tree.map(lambda leaf: leaf / K, grads), state, params)
        return optax.apply_updates(params, updates), state, value / K

    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, replicated))
    return jitted.lower(table.params, given, tokens(mesh)).compile()


def measured(make: Callable[[], jax.stages.Compiled], mesh: Mesh) -> dict[str, Any]:
    """Bytes of communication and memory of the compiled program; or why there is none: it does not fit."""
    start = time.perf_counter()
    try:
        compiled = make()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"does_not_fit": str(error).splitlines()[0]}
    seconds = time.perf_counter() - start
    data, model = Counter[str](), 0
    for row in sc.inspect.collectives(compiled, mesh):
        bytes_ = sum(shape.bytes for shape in row.payload if shape.elements > 1) * (row.executions or 0)
        if set(row.axes) & set(rows_of(mesh)):
            data[row.kind] += bytes_
        else:
            model += bytes_
    memory = sc.inspect.memory(compiled)
    return {
        "data_bytes": {kind: bytes_ for kind, bytes_ in data.items() if bytes_},
        "model_bytes": model,
        "argument_bytes": memory.arguments,
        "temporary_bytes": memory.temporaries,
        "compile_seconds": seconds,
    }


def shown(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table, in MB."""

    def mb(bytes_: float) -> str:
        return f"{bytes_ / 1e6:,.1f}"

    if "does_not_fit" in found:
        return (name, "does not fit", *[""] * 6)
    kinds = [mb(found["data_bytes"].get(kind, 0)) for kind in ("all-reduce", "reduce-scatter", "all-gather")]
    memory = [mb(found[f"{kind}_bytes"]) for kind in ("model", "argument", "temporary")]
    return (name, *kinds, *memory, f"{found['compile_seconds']:.0f}")


def mesh_of_pod(pod: str, axes: dict[str, int]) -> Mesh | None:
    """Its devices along these axes; None, with the reason on stderr, if its compiler is not installed."""
    try:
        return sc.topology(pod, **axes)
    except sc.ConfigError as error:
        print(f"{pod} is left out: {str(error).splitlines()[0]}\n", file=sys.stderr)
        return None


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    pods = sorted({*PODS, *(pod for decoder in DECODERS.values() for pod in decoder.pods)})
    parser.add_argument("--pod", action="append", choices=pods, help="only these; all by default")
    models_there = ["GPT-2", *DECODERS]
    parser.add_argument("--model", action="append", choices=models_there, help="only these; all of them by default")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    setting, results = begin((__doc__ or "").splitlines()[0]), {}
    head = ("", "all-reduce", "reduce-scatter", "all-gather", "model axis", "arguments", "temporaries", "compile s")

    def measure(name: str, pod: str, axes: dict[str, int], made: Callable[[Mesh], Variants]) -> None:
        if options.pod and pod not in options.pod:
            return
        mesh = mesh_of_pod(pod, axes)
        if mesh is None:
            return
        found = {variant: measured(make, mesh) for variant, make in made(mesh).items()}
        results[name] = found
        title = f"{name}: MB on one device, over the axes of the rows by kind"
        show(title, [head, *(shown(*row) for row in found.items())])

    models = options.model or models_there
    for pod, axes in PODS.items() if "GPT-2" in models else ():
        measure(f"GPT-2-small, {pod}", pod, axes, partial(gpt2_variants, quick=options.quick))
    for name in [one for one in models if one in DECODERS and not options.quick]:
        for pod, (axes, parts) in DECODERS[name].pods.items():
            for k in parts:
                what = f"{DECODERS[name].size}, {name}" if name != DECODERS[name].size else f"Llama {name}"
                measure(f"{what}, {pod}, k = {k}", pod, axes, partial(decoder_variants, DECODERS[name], k=k))
    finish("pods", setting, results, quick=options.quick, save=options.save)


def gpt2_variants(mesh: Mesh, *, quick: bool) -> Variants:
    """Each level of `zero`, and by hand."""
    made = {name: partial(ours, mesh, **level) for name, level in LEVELS.items()}
    variants = {"GSPMD scan": partial(gspmd_scan, mesh), **made}
    return {name: variants[name] for name in ("zero=0", "zero=1")} if quick else variants


def decoder_variants(decoder: Decoder, mesh: Mesh, *, k: int) -> Variants:
    """By hand, and how stepc gathers parameters."""
    made = {name: partial(our_decoder, decoder, mesh, k, **level) for name, level in GATHERS.items()}
    if decoder.mode == "auto":
        made = {"stepc": partial(our_decoder, decoder, mesh, k)}
    return {"by hand": partial(decoder_by_hand, decoder, mesh, k), **made}


if __name__ == "__main__":
    main()
