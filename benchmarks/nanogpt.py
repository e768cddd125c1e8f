"""How fast is a training step of nanoGPT's CPU configuration: stepc, JAX by hand, PyTorch?

The character model that nanoGPT's README trains on a laptop: 4 layers, 4 heads, width 128, context 64, batch 12,
vocabulary 65, no biases, no dropout; AdamW with clipping. Every variant makes the same step of the same numbers: after
one step the parameters are compared. `k` is the number of microbatches. With two devices, a CPU of two cores is
simulated as two devices, each of which takes half of every microbatch.

PyTorch is not a dependency. Without it (`pip install torch`), its rows are left out. Both libraries use all cores; a
variant has the machine for itself while it runs. The epsilon of AdamW is 1e-5 (`models.py` says why).
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from by_hand import by_hand
from measuring import (
    CPU_SECONDS,
    Repeated,
    Sample,
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

import stepc as sc

LEARNING_RATE, B2, EPSILON, WEIGHT_DECAY, MAX_NORM = 1e-3, 0.99, 1e-5, 0.1, 1.0
NORM_EPSILON = 1e-5
EAGER = "PyTorch, eager"
FLAGS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


@dataclass(frozen=True)
class Size:
    """The size of the model and of its batch."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    vocabulary: int = 65
    rows: int = 12


def init(size: Size) -> Any:  # Any: a tree of arrays
    """Parameters as nanoGPT draws them: 0.02, and less where a block writes to the stream."""
    random, width = np.random.default_rng(0), size.width

    def normal(*shape: int, std: float = 0.02) -> np.ndarray:
        return (std * random.standard_normal(shape)).astype(np.float32)

    residual = 0.02 / (2 * size.layers) ** 0.5
    return {
        "wte": normal(size.vocabulary, width),
        "wpe": normal(size.context, width),
        "layers": [
            {
                "ln_1": np.ones(width, np.float32),
                "qkv": normal(width, 3 * width),
                "out": normal(width, width, std=residual),
                "ln_2": np.ones(width, np.float32),
                "up": normal(width, 4 * width),
                "down": normal(4 * width, width, std=residual),
            }
            for _ in range(size.layers)
        ],
        "ln_f": np.ones(width, np.float32),
    }


def norm(stream: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer normalisation without an offset."""
    centred = stream - stream.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPSILON) * scale


def attention(stream: jax.Array, layer: Any, heads: int) -> jax.Array:
    """Causal self-attention."""
    batch, length, width = stream.shape
    qkv = jnp.split(stream @ layer["qkv"], 3, axis=-1)
    query, key, value = (one.reshape(batch, length, heads, -1) for one in qkv)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // heads) ** -0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(stream.shape) @ layer["out"]


def loss(params: Any, batch: Any, *, heads: int) -> jax.Array:
    """The mean cross-entropy of the next character."""
    tokens, targets = batch
    stream = params["wte"][tokens] + params["wpe"][: tokens.shape[1]]
    for layer in params["layers"]:
        stream = stream + attention(norm(stream, layer["ln_1"]), layer, heads)
        inside = jax.nn.gelu(norm(stream, layer["ln_2"]) @ layer["up"], approximate=False)
        stream = stream + inside @ layer["down"]
    logits = norm(stream, params["ln_f"]) @ params["wte"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def adamw() -> optax.GradientTransformation:
    """nanoGPT's: matrices and embeddings are decayed, scales are not."""
    return optax.adamw(
        LEARNING_RATE, b2=B2, eps=EPSILON, weight_decay=WEIGHT_DECAY,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A step with its state and batch, and its parameters in the layout of JAX."""

    step: Step
    state: Any  # Any: of any library
    batch: Any  # Any: as above
    params_of: Callable[[Any], Any]  # Any: a state; a tree of arrays


def stepc_variant(size: Size, k: int, batch: Any, **options: Any) -> Variant:
    """With stepc."""
    source = sc.accumulate(k) @ sc.grad(partial(loss, heads=size.heads))
    step = sc.compile(sc.update(adamw()) @ sc.clip(MAX_NORM) @ source, **options)
    return Variant(step, step.init(init(size)), step.put(batch), lambda state: state.params)


def hand_variant(size: Size, k: int, batch: Any) -> Variant:
    """With `jax.jit`."""
    initial, step = by_hand(partial(loss, heads=size.heads), k, adamw())
    params = jax.tree.map(jnp.array, init(size))
    return Variant(step, (params, initial(params)), jax.tree.map(jnp.asarray, batch), lambda state: state[0])


def torch_variants(size: Size, batch: Any) -> dict[str, Variant]:
    """Eager as nanoGPT runs on a CPU, with the fused AdamW, and with `torch.compile` besides; none without torch."""
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: no rows of PyTorch. Install it with `pip install torch`.\n")
        return {}
    torch, ours = importlib.import_module("torch"), importlib.import_module("nanogpt_torch")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    sizes = {name: value for name, value in asdict(size).items() if name != "rows"}
    how = {"learning_rate": LEARNING_RATE, "b2": B2, "epsilon": EPSILON, "weight_decay": WEIGHT_DECAY}
    tensors = tuple(torch.from_numpy(one.astype(np.int64)) for one in batch)
    params, found = init(size), {}
    for name, compiled, fused in (
        (EAGER, False, False),
        ("PyTorch, eager, fused AdamW", False, True),
        ("torch.compile, fused AdamW", True, True),
    ):
        model = ours.GPT(**sizes)
        model.load(params)
        step = ours.make_step(model, **how, max_norm=MAX_NORM, compiled=compiled, fused=fused)
        found[name] = Variant(step, model, tensors, lambda model: model.params())
    return found


def measure(size: Size, ks: list[int], *, rounds: int, calls: int) -> dict[str, Any]:
    """All variants in interleaved rounds."""
    random = np.random.default_rng(1)
    text = random.integers(0, size.vocabulary, (size.rows, size.context + 1)).astype(np.int32)
    batch = (text[:, :-1], text[:, 1:])
    variants = torch_variants(size, batch)
    base = next(iter(variants), f"by hand, k = {ks[0]}")
    for k in ks:
        variants[f"by hand, k = {k}"] = hand_variant(size, k, batch)
        variants[f"stepc, k = {k}"] = stepc_variant(size, k, batch)
        variants[f"stepc, k = {k}, flags"] = stepc_variant(size, k, batch, compiler_options=FLAGS)

    samples: dict[str, Sample] = {}
    expected, differences = None, {}
    for name, one in variants.items():
        state, _ = one.step(one.state, one.batch)
        params = jax.tree.map(jnp.array, one.params_of(state))
        expected = params if expected is None else expected
        differences[name] = require_equal(params, expected, name=name)
        samples[name] = Repeated(one.step, state, one.batch, calls=calls)
    taken = interleaved(samples, rounds=rounds)
    return {
        "base": base,
        "differences": differences,
        "seconds": spreads(taken),
        "cpu_seconds": spreads(taken, CPU_SECONDS),
        "ratio": {name: ratio(taken, name, base) for name in samples},
        "cpu_ratio": {name: ratio(taken, name, base, CPU_SECONDS) for name in samples},
    }


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3, 4], help="numbers of microbatches")
    parser.add_argument("--calls", type=int, default=5, help="steps in one sample (default: %(default)s)")
    options = parser.parse_args()
    setting = begin("a step of nanoGPT's CPU configuration: stepc, JAX by hand, PyTorch")
    size = Size(layers=1, width=16, context=8, rows=12) if options.quick else Size()
    rounds, calls = (3, 1) if options.quick else (options.rounds, options.calls)
    found = measure(size, options.k, rounds=rounds, calls=calls)
    rows = [("", "step, ms", f"of {found['base']}", "CPU ms", "ratio, CPU")]
    for name, seconds in found["seconds"].items():
        quotient, cpu, of_cpu = (found[what][name] for what in ("ratio", "cpu_seconds", "cpu_ratio"))
        rows.append((name, seconds.shown(1e3, 1), quotient.shown(), cpu.shown(1e3, 1), of_cpu.shown()))
        plot(name, quotient, 1.0)
    cores = len(os.sched_getaffinity(0))
    show(f"nanoGPT for a CPU on {cores} core{'s' * (cores > 1)}; median (quartiles)", rows)
    finish("nanogpt" if cores > 1 else "nanogpt_one_core", setting, found, quick=options.quick, save=options.save)


if __name__ == "__main__":
    main()
