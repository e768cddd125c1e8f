"""What an optimizer is, which extra arguments its `update` takes, and the optimizers that a step refuses.

It knows no transform and no pass: the reference, the evaluator and the lowering all call an optimizer through it.
"""

import gc
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from stepc._language.kinds import Grads, Params
from stepc._language.state import ARRAY_LIKE, describe_leaf, have_same_shapes, leaves_by_path
from stepc.errors import ConfigError, FieldTypeError, faults_in_one, leaf_text

# Functions of the parameters that a step has to offer to the `update` of an optimizer: the loss of the whole batch.
WHOLE_BATCH_LOSSES = ("value_fn", "obj_fn")
# All that it has to offer, beside gradient, state and parameters.
EXTRA_ARGUMENTS = ("value", "grad", *WHOLE_BATCH_LOSSES)

# Runs an `update` with gradient, state, parameters and extra arguments. Any: as of `Optimizer`, and those arguments.
UpdateRunner: TypeAlias = Callable[[Callable[..., Any], Grads, Any, Params, Mapping[str, Any]], tuple[Grads, Any]]


@runtime_checkable
class Optimizer(Protocol):
    """Anything with optax's two functions: a `GradientTransformation`, or an object of your own."""

    @property
    def init(self) -> Callable[[Params], Any]: ...  # Any: the optimizer's own tree

    @property
    def update(self) -> Callable[..., tuple[Grads, Any]]: ...  # Any: as above


def check_optimizer(value: object, written: str) -> None:
    """Refuse what is no optimizer. Errors: FieldTypeError, with the remedy of a known mistake."""
    what, suggestion = f"`update({written})`: this is not an optimizer.", None
    match value:
        case optax.MultiSteps():
            what = f"`update({written})`: `optax.MultiSteps` accumulates over the batches of several steps."
            suggestion = (
                "Write `update(optimizer) @ accumulate(k)` for microbatches of one batch, or "
                f"`update({written}.gradient_transformation())` for several batches."
            )
        case type():
            is_optimizer = isinstance(value, Optimizer) and not issubclass(value, tuple)
            suggestion = f"This is a class: write `update({written}())`." if is_optimizer else None
        case Optimizer():
            if unknown := _required_by(value):
                names = ", ".join(f"`{name}`" for name in unknown)
                facts = (("offered", ", ".join(EXTRA_ARGUMENTS)),)
                raise FieldTypeError(f"`update({written})`: it asks for {names}, which no step offers.", facts=facts)
            return
        case FunctionType():
            suggestion = _remedy_of_function(value, written)
        case _:
            pass
    facts = (("expected", "an optimizer, with `init` and `update`"), ("got", type(value).__name__))
    raise FieldTypeError(what, facts=facts, suggestion=suggestion)


def _required_by(optimizer: Optimizer) -> list[str]:
    parameters = inspect.signature(optimizer.update).parameters.values()
    required = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    return [name for name in required if name not in EXTRA_ARGUMENTS]


def _remedy_of_function(function: FunctionType, written: str) -> str:
    schedule = f"`update(optax.sgd({written}))`"
    if function.__module__.startswith("optax.schedules"):
        return f"This is a schedule: write {schedule}, or another optimizer with it."
    if function.__module__.startswith("optax"):
        required = [one.name for one in inspect.signature(function).parameters.values() if one.default is one.empty]
        return f"Call it: write `update({written}({', '.join(required)}))`."
    return f"Call it if it makes an optimizer; write {schedule} if it is a schedule."


def initial_state(optimizer: Optimizer, params: Params, written: str) -> Any:  # Any: the optimizer's own tree
    """A fresh state of an optimizer. Errors: ConfigError, with the remedy, for one that no step can run."""
    state = _with_strong_types(_called(optimizer, lambda: optimizer.init(params), written))
    what = suggestion = None
    if _parts(state, optax.contrib.DifferentiallyPrivateAggregateState):
        what = "optax's DP-SGD takes the gradient of each row; of a mean, it would take the first axis for the rows"
        suggestion = 'Write `update(optimizer) @ noise(s) @ rows() @ clip(c, nonfinite="zero") @ grad(loss)`.'
    elif _parts(state, optax.LookaheadState):
        what = "`optax.lookahead` trains a pair of parameters, of which the loss takes one"
        suggestion = "Write `ema(decay) @ update(optimizer)`: it keeps slow parameters beside those that are trained."
    elif any(part.cache is None for part in _parts(state, optax.contrib.SAMState)):
        what = "`optax.contrib.sam` with `opaque_mode=True` asks for `grad_fn`, which no step offers"
        suggestion = "Leave `opaque_mode` out: then each of the two gradients is that of a step."
    if what is not None:
        raise ConfigError(f"`{written}`: {what}.", suggestion=suggestion)
    return state


def extra_arguments(optimizer: Optimizer) -> tuple[str, ...]:
    """Which of `EXTRA_ARGUMENTS` the `update` of an optimizer takes, by its signature.

    One that takes any keyword passes them on: it is given `value` and `grad`, and what the optimizers inside it name.
    """
    parameters = inspect.signature(optimizer.update).parameters.values()
    named = set(_after_params([one.name for one in parameters if one.kind is not one.VAR_KEYWORD]))
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        inner = (code for function in _functions_in(optimizer.update, set()) for code in _codes_in(function.__code__))
        named |= {"value", "grad", *(name for code in inner for name in _after_params(_arguments_of(code)))}
    return tuple(name for name in EXTRA_ARGUMENTS if name in named)


def evaluates_loss(optimizer: Optimizer) -> bool:
    """Whether an optimizer asks for the loss of the whole batch at other parameters, as a line search does."""
    return not set(extra_arguments(optimizer)).isdisjoint(WHOLE_BATCH_LOSSES)


def run_optimizer(
    optimizer: Optimizer,
    grads: Grads,
    opt_state: Any,  # Any: the optimizer's own tree
    params: Params,
    offered: Mapping[str, Any],  # Any: by the name of the extra argument
    written: str,
    run: UpdateRunner | None = None,
) -> tuple[Grads, Any]:  # Any: as above
    """The updates and the new state. Of what is offered, `update` is given what it takes; `run` may run it otherwise.

    Errors: ConfigError with every leaf of the updates that does not fit the parameters, and of the new state that was
      not in the old one.
    """
    taken = {name: offered[name] for name in extra_arguments(optimizer)}

    def call() -> tuple[Grads, Any]:
        while True:
            try:
                if run is not None:
                    return run(optimizer.update, grads, opt_state, params, taken)
                return optimizer.update(grads, opt_state, params, **taken)
            except TypeError as error:  # one inside takes fewer than the `update` that passes any keyword on
                refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
                if refused is None or refused[1] not in taken:
                    raise
                del taken[refused[1]]

    updates, new = _called(optimizer, call, written)
    new = _with_strong_types(new)
    _check_updates(updates, params, written)
    _check_state(new, opt_state, written)
    return updates, new


def injected_hyperparameters(opt_state: Any) -> dict[str, jax.Array]:  # Any: the optimizer's own tree
    """The hyperparameters that `optax.inject_hyperparams` keeps in a state, by name.

    A name that several of a chain or a partition inject stands after the place of each: `head/learning_rate`.
    """
    places = optax.tree_utils.tree_get_all_with_path(opt_state, "hyperparams")
    found = [
        (_place_of(path), name, value)
        for path, hyperparameters in places
        if isinstance(hyperparameters, Mapping)  # and no parameter of this name
        for name, value in hyperparameters.items()
        if isinstance(value, ARRAY_LIKE)
    ]
    times = Counter(name for _, name, _ in found)
    return {name if times[name] == 1 else f"{place}/{name}": jnp.asarray(value) for place, name, value in found}


def _place_of(path: tuple[Any, ...]) -> str:  # Any: the key types of jax.tree_util and optax
    """Where an optimizer stands: the labels of partitions, and the positions in chains."""
    keys = (getattr(key, "key", getattr(key, "idx", None)) for key in path)
    return "/".join(str(key) for key in keys if key is not None)


def _called(optimizer: Optimizer, function: Callable[[], Any], written: str) -> Any:  # Any: trees of the optimizer
    try:
        return function()
    except jax.errors.ConcretizationTypeError as error:
        names = sorted(set(_injected_integers(optimizer)))
        if not names:
            error.add_note(f"stepc: raised by the optimizer of `{written}` while it was traced")
            raise
        static = ", ".join(f'"{name}"' for name in names)
        raise ConfigError(
            f"`{written}`: `inject_hyperparams` made arrays of integers that decide what the optimizer does.",
            facts=(("integers", ", ".join(names)),),
            suggestion=f"Write `optax.inject_hyperparams(factory, static_args=[{static}])`.",
        ) from error


def _injected_integers(optimizer: Optimizer) -> Iterator[str]:
    for function in _functions_in(optimizer.init, set()):
        hyperparameters = inspect.getclosurevars(function).nonlocals.get("numeric_hps", {})
        yield from (name for name, value in hyperparameters.items() if isinstance(value, int))


def _check_updates(updates: Grads, params: Params, written: str) -> None:
    if have_same_shapes(updates, params):
        return
    wanted, found = ({path: jnp.shape(leaf) for path, leaf in leaves_by_path(tree)} for tree in (params, updates))
    faults = [f"{leaf_text(path, 'the parameter')} has no update." for path in wanted if path not in found]
    faults += [
        f"`{path}` is no parameter." if path else "one array is returned in place of a tree."
        for path in found
        if path not in wanted
    ]
    faults += [
        f"{leaf_text(path, 'the parameter')} is {list(wanted[path])}, and its update {list(found[path])}."
        for path in wanted
        if path in found and wanted[path] != found[path]
    ]
    if faults:
        scalars = all(
            wanted[path] == () and found.get(path) == (1,) for path in wanted if wanted[path] != found.get(path)
        )
        suggestion = "Give the parameter an axis of size 1: `jnp.reshape(leaf, (1,))`." if scalars else None
        what = faults_in_one(faults, of="the updates")
        raise ConfigError(f"`{written}` makes updates that do not fit the parameters: {what}", suggestion=suggestion)


def _check_state(new: Any, old: Any, written: str) -> None:  # Any, twice: the optimizer's own tree
    if jax.tree.structure(new) == jax.tree.structure(old):
        return
    before, after = (dict(leaves_by_path(tree)) for tree in (old, new))
    faults = [
        f"`opt_state/{path}` is {describe_leaf(after[path])}, and was not there." for path in after.keys() - before
    ]
    faults += [f"`opt_state/{path}` is gone." for path in before.keys() - after]
    if faults:
        suggestion = None
        if _parts(old, optax.MonitorState):
            suggestion = "Write `optax.snapshot(name, measure)` in place of `optax.monitor`: its state keeps its tree."
        what = faults_in_one(sorted(faults), of="the state of the optimizer")
        facts = (("reason", "a state whose tree changes is retraced every step"),)
        raise ConfigError(f"`{written}` returns another tree than it takes: {what}", facts=facts, suggestion=suggestion)


def _with_strong_types(state: Any) -> Any:  # Any: the optimizer's own tree
    """The state as arrays of strong types: a weak one that a step returns strong is another signature."""

    def strong(leaf: Any) -> jax.Array:  # Any: an array, or a number
        if isinstance(leaf, jax.Array) and not jax.typeof(leaf).weak_type:
            return leaf
        return jnp.asarray(leaf, jnp.result_type(leaf))

    return jax.tree.map(strong, state)


def _parts(state: Any, kind: type) -> list[Any]:  # Any: the optimizer's own tree
    """The states of one kind in an optimizer's state, at any depth."""
    leaves = jax.tree.leaves(state, is_leaf=lambda one: isinstance(one, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def _after_params(names: list[str]) -> list[str]:
    """The arguments of an `update` after gradient, state and params."""
    return names[3:]


def _arguments_of(code: CodeType) -> list[str]:
    return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and that of the functions it defines: a factory defines its `update`."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)


def _functions_in(value: Any, seen: set[int]) -> Iterator[FunctionType]:  # Any: what a closure may hold
    """The functions that a function holds: in its closure, its defaults, and in the optimizers and containers there."""
    if id(value) in seen:
        return
    seen.add(id(value))
    held: tuple[Any, ...] = ()
    match value:
        case FunctionType():
            yield value
            nonlocals = inspect.getclosurevars(value).nonlocals.values()
            held = (*nonlocals, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        case MethodType():
            held = (value.__func__, *gc.get_referents(value.__self__))  # whatever keeps them: a dict, slots, a tuple
        case partial():
            held = (value.func, *value.args, *value.keywords.values())
        case dict():
            held = tuple(value.values())
        case tuple() | list():
            held = tuple(value)
        case Optimizer():
            held = (value.update,)
        case _:
            pass
    for one in held:
        yield from _functions_in(one, seen)
