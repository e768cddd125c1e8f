"""Every public optimizer and wrapper of optax: how it is made here, and what a step does with it.

The tests hold each row; `RESULTS.md` is the same table as text. A name of a later optax that is not here fails a test
until somebody has looked at it.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import isclass, isfunction, signature
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import optax.experimental
import optax.transforms

MODULES = (optax, optax.contrib, optax.transforms, optax.experimental)
RATE = 1e-2


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Args:
      make: makes it.
      refused: the first sentence of the error, without the transform; None if it equals the hand-written loop.
      tolerance: beside the largest magnitude of a leaf, the difference from the hand-written loop.
      why: where a large tolerance comes from.
    """

    make: Callable[[], Any]  # Any: an optimizer
    refused: str | None = None
    tolerance: float = 1e-5  # sums in another order round differently, and three steps amplify that
    why: str = ""


def descending(*transforms: Any) -> optax.GradientTransformation:
    """The transformations, then a step downhill: by itself `scale_by_adam` would go uphill."""
    return optax.chain(*transforms, optax.scale(-RATE))


def with_rate(name: str, **options: Any) -> Row:
    return Row(lambda: _named(name)(RATE, **options))


def scaled(name: str, *arguments: Any, **options: Any) -> Row:
    return Row(lambda: descending(_named(name)(*arguments, **options)))


def _named(name: str) -> Any:
    module, _, function = name.rpartition(".")
    return getattr({one.__name__: one for one in MODULES}[f"optax.{module}".rstrip(".")], function)


def norm(tree: Any) -> jax.Array:
    return optax.tree.norm(tree)


def is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def dimensions(params: Any) -> Any:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)


def optimistic_adam() -> optax.GradientTransformation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return optax.optimistic_adam(RATE)


def dpsgd() -> optax.GradientTransformation:
    with warnings.catch_warnings():  # it calls the one below by a deprecated name
        warnings.simplefilter("ignore", DeprecationWarning)
        return optax.contrib.dpsgd(RATE, 1.0, 1.0, 0)


def adversary() -> optax.GradientTransformation:
    return optax.chain(optax.contrib.normalize(), optax.sgd(0.05))


# Optimizers that take a learning rate first.
_WITH_RATE = (
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "fromage",
    "lamb", "lars", "lion", "nadam", "nadamw", "novograd", "optimistic_adam_v2",
    "optimistic_gradient_descent", "radam", "rmsprop", "rprop", "sgd", "sign_sgd", "signum", "sm3", "yogi",
    "contrib.ademamix", "contrib.adopt", "contrib.dadapt_adamw", "contrib.dog", "contrib.dowg", "contrib.galore",
    "contrib.madgrad", "contrib.momo", "contrib.momo_adam", "contrib.muon", "contrib.prodigy",
    "contrib.schedule_free_adamw", "contrib.schedule_free_sgd", "contrib.simplified_ademamix", "contrib.sophia",
)  # fmt: skip
# Parts of a chain that need no argument.
_SCALED = (
    "centralize", "flatten", "identity", "keep_params_nonnegative", "normalize_by_update_norm", "scale_by_adadelta",
    "scale_by_adam", "scale_by_adamax", "scale_by_adan", "scale_by_amsgrad", "scale_by_belief",
    "scale_by_distance_over_gradients", "scale_by_factored_rms", "scale_by_lion",
    "scale_by_novograd", "scale_by_optimistic_gradient", "scale_by_param_block_norm", "scale_by_param_block_rms",
    "scale_by_radam", "scale_by_rms", "scale_by_rss", "scale_by_sign", "scale_by_sm3", "scale_by_stddev",
    "scale_by_trust_ratio", "scale_by_yogi", "set_to_zero", "zero_nans", "contrib.normalize",
    "contrib.reduce_on_plateau", "contrib.scale_by_ademamix", "contrib.scale_by_adopt",
    "contrib.scale_by_cocob", "contrib.scale_by_galore",
    "contrib.scale_by_simplified_ademamix",
)  # fmt: skip

ACPROP = "it divides by the gradient of the step before, which may be a rounding error itself: see `test_acprop.py`"

ROWS: dict[str, Row] = {
    **{name: with_rate(name) for name in _WITH_RATE},
    **{name: scaled(name) for name in _SCALED if name != "flatten"},
    # With arguments of their own.
    "adaptive_grad_clip": scaled("adaptive_grad_clip", 0.1),
    "add_decayed_weights": scaled("add_decayed_weights", 0.1),
    "add_noise": scaled("add_noise", 0.1, 0.55, 0),
    "apply_every": scaled("apply_every", 2),
    "clip": scaled("clip", 0.5),
    "clip_by_block_rms": scaled("clip_by_block_rms", 0.5),
    "clip_by_global_norm": scaled("clip_by_global_norm", 0.5),
    "ema": scaled("ema", 0.9),
    "noisy_sgd": Row(lambda: optax.noisy_sgd(RATE, key=0)),
    "scale": Row(lambda: optax.scale(-RATE)),
    "optimistic_adam": Row(optimistic_adam),
    "scale_by_lbfgs": Row(
        lambda: descending(optax.scale_by_lbfgs()), tolerance=1e-4, why="it keeps differences of parameters"
    ),
    "contrib.scale_by_muon": Row(
        lambda: descending(optax.masked(optax.contrib.scale_by_muon(weight_dimension_numbers=dimensions), is_matrix))
    ),
    "scale_by_learning_rate": Row(lambda: optax.scale_by_learning_rate(RATE)),
    "scale_by_rprop": scaled("scale_by_rprop", 1e-3),
    "scale_by_schedule": Row(lambda: optax.scale_by_schedule(lambda count: -RATE / (1 + count))),
    "snapshot": scaled("snapshot", "norm", norm),
    "stateless": scaled("stateless", lambda updates, params: updates),
    "stateless_with_tree_map": scaled("stateless_with_tree_map", lambda update, param: update + 0.1 * param),
    "trace": scaled("trace", 0.9),
    "contrib.cocob": Row(lambda: optax.contrib.cocob()),
    "contrib.scale_by_madgrad": Row(lambda: optax.contrib.scale_by_madgrad(RATE)),
    "contrib.acprop": Row(lambda: optax.contrib.acprop(RATE), tolerance=1e-2, why=ACPROP),
    "contrib.scale_by_acprop": Row(lambda: descending(optax.contrib.scale_by_acprop()), tolerance=1e-2, why=ACPROP),
    "contrib.split_real_and_imaginary": Row(lambda: optax.contrib.split_real_and_imaginary(optax.adam(RATE))),
    # Wrappers.
    "apply_if_finite": Row(lambda: optax.apply_if_finite(optax.adam(RATE), 3)),
    "chain": Row(lambda: optax.chain(optax.clip(0.5), optax.adam(RATE))),
    "conditionally_mask": Row(lambda: optax.conditionally_mask(optax.adam(RATE), lambda step: step % 2 == 0)),
    "conditionally_transform": Row(lambda: optax.conditionally_transform(optax.adam(RATE), lambda step: step % 2 == 0)),
    "flatten": Row(lambda: optax.flatten(optax.adam(RATE))),
    "freeze": Row(lambda: optax.chain(optax.adam(RATE), optax.freeze({"w": False, "b": True}))),
    "inject_hyperparams": Row(lambda: optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(RATE, 10))),
    "masked": Row(lambda: optax.masked(optax.adam(RATE), is_matrix)),
    "named_chain": Row(lambda: optax.named_chain(("clip", optax.clip(0.5)), ("adam", optax.adam(RATE)))),
    "partition": Row(lambda: optax.partition({"a": optax.adam(RATE), "b": optax.set_to_zero()}, {"w": "a", "b": "b"})),
    "multi_transform": Row(
        lambda: optax.multi_transform({"a": optax.adam(RATE), "b": optax.sgd(RATE)}, {"w": "a", "b": "b"})
    ),
    "selective_transform": Row(
        lambda: optax.selective_transform(optax.adam(RATE), freeze_mask={"w": False, "b": True})
    ),
    "with_extra_args_support": Row(lambda: optax.with_extra_args_support(optax.scale(-RATE))),
    "contrib.mechanize": Row(lambda: optax.contrib.mechanize(optax.adam(RATE))),
    "contrib.schedule_free": Row(lambda: optax.contrib.schedule_free(optax.sgd(RATE), RATE)),
    "contrib.sam": Row(lambda: optax.contrib.sam(optax.sgd(RATE), adversary())),
    # Those that are given more than gradient, state and parameters.
    "lbfgs": Row(lambda: optax.lbfgs(), tolerance=1e-4, why="a line search takes more evaluations or fewer"),
    "polyak_sgd": Row(lambda: optax.polyak_sgd(RATE)),
    "scale_by_polyak": scaled("scale_by_polyak"),
    "scale_by_backtracking_linesearch": Row(
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15, store_grad=True))
    ),
    "scale_by_zoom_linesearch": Row(lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(15))),
    "contrib.hutchinson_estimator_diag_hessian": scaled("contrib.hutchinson_estimator_diag_hessian"),
    # Refused, with a remedy.
    "MultiSteps": Row(
        lambda: optax.MultiSteps(optax.sgd(RATE), 2),
        "`optax.MultiSteps` accumulates over the batches of several steps.",
    ),
    "MultiSteps.gradient_transformation": Row(lambda: optax.MultiSteps(optax.sgd(RATE), 2).gradient_transformation()),
    "lookahead": Row(
        lambda: optax.lookahead(optax.sgd(RATE), 5, 0.5),
        "`optax.lookahead` trains a pair of parameters, of which the loss takes one.",
    ),
    "measure_with_ema": Row(
        lambda: optax.measure_with_ema(norm, 0.9),
        "makes updates that do not fit the parameters",
    ),
    "monitor": Row(
        lambda: optax.chain(optax.sgd(RATE), optax.monitor({"norm": norm})),
        "returns another tree than it takes",
    ),
    "contrib.dpsgd": Row(
        dpsgd,
        "optax's DP-SGD takes the gradient of each row",
    ),
    "contrib.differentially_private_aggregate": Row(
        lambda: optax.contrib.differentially_private_aggregate(1.0, 1.0, key=0),
        "optax's DP-SGD takes the gradient of each row",
    ),
    "contrib.sam, opaque": Row(
        lambda: optax.contrib.sam(optax.sgd(RATE), adversary(), opaque_mode=True),
        "`optax.contrib.sam` with `opaque_mode=True` asks for `grad_fn`, which no step offers.",
    ),
    # Optimizers inside others, and others than optax's.
    "inject_hyperparams of adafactor": Row(
        lambda: optax.inject_hyperparams(optax.adafactor)(RATE),
        "`inject_hyperparams` made arrays of integers that decide what the optimizer does.",
    ),
    "inject_hyperparams of adafactor, integers static": Row(
        lambda: optax.inject_hyperparams(optax.adafactor, static_args=["decay_offset", "min_dim_size_to_factor"])(RATE)
    ),
    "inject_hyperparams of polyak_sgd": Row(lambda: optax.inject_hyperparams(optax.polyak_sgd)(RATE)),
    "inject_hyperparams of sophia": Row(lambda: optax.inject_hyperparams(optax.contrib.sophia)(RATE)),
    "inject_hyperparams of lbfgs": Row(
        lambda: optax.inject_hyperparams(optax.lbfgs, static_args="memory_size")(RATE), tolerance=1e-4
    ),
    "chain with sam": Row(lambda: optax.chain(optax.clip(0.5), optax.contrib.sam(optax.sgd(RATE), adversary()))),
    "chain with reduce_on_plateau": Row(
        lambda: optax.chain(optax.adam(RATE), optax.contrib.reduce_on_plateau(patience=1))
    ),
    "masked lbfgs": Row(lambda: optax.masked(optax.scale_by_lbfgs(), is_matrix)),
    "an object": Row(lambda: Momentum()),
}

# Public functions without a return annotation, and classes, that are no optimizers.
OTHERS = {
    "GradientTransformation", "GradientTransformationExtraArgs", "MaskOrFn", "OptState", "ScalarOrSchedule",
    "WrappedSchedule", "bias_correction", "matrix_inverse_pth_root", "sigmoid_binary_cross_entropy",
    "update_infinity_moment", "update_moment", "update_moment_per_elem_norm", "contrib.schedule_free_eval_params",
}  # fmt: skip
# Deprecated under this name: the same function as the one named.
ALIASES = {"inject_stateful_hyperparams": "inject_hyperparams"}


class Momentum:
    """An optimizer that is no tuple of optax, whose state is a number and a tree."""

    def init(self, params: Any) -> Any:
        return 0, jax.tree.map(jnp.zeros_like, params)

    def update(self, grads: Any, state: Any, params: Any) -> Any:
        count, trace = state
        trace = jax.tree.map(lambda leaf, grad: 0.9 * leaf + grad, trace, grads)
        return jax.tree.map(lambda leaf: -RATE * leaf / (1 + count), trace), (count + 1, trace)


def candidates() -> Iterator[str]:
    """Every public name of optax that may be an optimizer, or makes one."""
    seen: set[int] = set()
    for module in MODULES:
        for name in dir(module):
            value = getattr(module, name)
            if name.startswith("_") or id(value) in seen or not (isfunction(value) or isclass(value)):
                continue
            seen.add(id(value))
            if isclass(value):
                is_candidate = hasattr(value, "update") and hasattr(value, "init")
            else:
                returns = signature(value).return_annotation
                is_candidate = returns is signature(value).empty or "GradientTransformation" in str(returns)
            if is_candidate:
                yield f"{module.__name__}.{name}".removeprefix("optax.")


def exists(name: str) -> bool:
    """Whether the installed optax has what a row is named after."""
    path = name.split(",")[0].split(" ")[0].split(".")
    value: Any = optax
    for part in path:
        value = getattr(value, part, None)
    return value is not None or " " in name


def as_text() -> str:
    """The table as `RESULTS.md` has it."""
    lines = [
        "# Every optimizer of optax",
        "",
        "Written by `pytest --regold tests/optimizers`; a test holds each row. Equal: after three steps, parameters",
        "and state of the optimizer are those of a hand-written loop of optax, in all six settings: k = 1, k = 4,",
        "eight devices with `zero` 0, 1 and 3, and `skip_nonfinite`. Names are of the module `optax`.",
        "",
        "| optimizer | what a step does with it |",
        "|---|---|",
    ]
    for name, row in sorted(ROWS.items()):
        said = "equal" if row.refused is None else f"refused: {row.refused}"
        said += f", to {row.tolerance:g}: {row.why}" if row.why else ""
        lines.append(f"| `{name}` | {said} |")
    return "\n".join(lines) + "\n"
