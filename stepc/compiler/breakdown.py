"""What the memory of a compiled step is for: parameters, optimizer state, batch, accumulator, activations."""

from collections import Counter
from dataclasses import replace
from math import prod

import jax

from stepc.compiler.plan import Leaf, Plan
from stepc.inspect.hlo import Computation, Module, Shape, parse, text_of
from stepc.inspect.memory import Memory, Part

_NAMES = {"params": "parameters", "opt_state": "optimizer state"}
_REST_OF_STATE, _BATCH, _PADDING = "rest of the state", "batch", "padding"
_ACCUMULATOR, _ACTIVATIONS = "accumulator", "activations and the rest"


def broken_down(needs: Memory, plan: Plan, executable: jax.stages.Compiled) -> Memory:
    """Say what arguments and temporaries are for.

    The sizes of arguments are those of their shards; what the device needs beyond them is padding. The accumulator is
    read from the loop that carries an array for each parameter; it is left out where no such loop is found.
    """
    lying = lying_of(executable, 0)
    sizes: Counter[str] = Counter()
    for leaf, sharding in zip(plan.leaves, lying, strict=True):
        if sharding is not None:
            sizes[_NAMES.get(leaf.path.partition("/")[0], _REST_OF_STATE)] += _shard_bytes(leaf, sharding)
    sizes[_BATCH] = sum(_bytes_of_batch(executable))
    padding = needs.arguments - sum(sizes.values())
    arguments = [Part("arguments", name, bytes_) for name, bytes_ in sizes.items() if bytes_]
    if padding > 0:
        arguments.append(Part("arguments", _PADDING, padding))
    return replace(needs, parts=(*arguments, *_temporaries(needs, plan, executable)))


def _temporaries(needs: Memory, plan: Plan, executable: jax.stages.Compiled) -> tuple[Part, ...]:
    found = accumulator_bytes(executable, list(plan.accumulator)) if plan.loop_length > 1 else 0
    accumulated = min(found, needs.temporaries)
    parts = ((_ACCUMULATOR, accumulated), (_ACTIVATIONS, needs.temporaries - accumulated))
    return tuple(Part("temporaries", name, bytes_) for name, bytes_ in parts if bytes_)


def accumulator_bytes(executable: jax.stages.Compiled | str, shapes: list[tuple[int, ...]]) -> int:
    """The bytes that the outermost loop carries in main memory for arrays of these shapes; 0 if none carries all."""
    module = parse(text_of(executable))
    return _carried(module, module.computations[module.entry], shapes)


def _carried(module: Module, computation: Computation, shapes: list[tuple[int, ...]]) -> int:
    for instruction in computation.instructions.values():
        if instruction.opcode == "while" and (found := _matched(instruction.shapes, shapes)):
            return sum(shape.bytes for shape in found if shape.space == 0)
        for call in instruction.calls:
            if call.computation in module.computations and instruction.opcode in ("call", "while", "conditional"):
                inner = _carried(module, module.computations[call.computation], shapes)
                if inner:
                    return inner
    return 0


def _matched(carried: tuple[Shape, ...], shapes: list[tuple[int, ...]]) -> list[Shape]:
    """One carried array for each shape, floating, or nothing."""
    left, found = list(carried), []
    for dims in shapes:
        match = next((shape for shape in left if shape.dims == dims and shape.dtype[0] in "fb"), None)
        if match is None:
            return []
        left.remove(match)
        found.append(match)
    return found


def _shard_bytes(leaf: Leaf, sharding: jax.sharding.Sharding) -> int:
    if not prod(leaf.shape):
        return 0
    return leaf.bytes_ * prod(sharding.shard_shape(leaf.shape)) // prod(leaf.shape)


def _bytes_of_batch(executable: jax.stages.Compiled) -> list[int]:
    leaves = jax.tree.leaves(executable.args_info[0][1])
    return [
        prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(leaves, lying_of(executable, 1), strict=True)
        if sharding is not None
    ]


def lying_of(executable: jax.stages.Compiled, argument: int) -> list[jax.sharding.Sharding | None]:
    """How each leaf of an argument lies; None of one that the program does not use, and so is not given."""
    tree = jax.tree.structure(executable.args_info[0][argument])
    return tree.flatten_up_to(executable.input_shardings[0][argument])
