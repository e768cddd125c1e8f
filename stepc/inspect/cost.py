"""The work of a program, counted from its text: flops of matrix products, and bytes moved.

Counted here and not taken from XLA's `cost_analysis`, which counts the body of a loop once.
"""

import math
import re
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from stepc._text import aligned_table, readable_bytes
from stepc.inspect.hlo import Computation, Instruction, Module, Shape, parse, text_of
from stepc.inspect.loops import instruction_total, program_total


@dataclass(frozen=True)
class Cost:
    """Work on one device, loops multiplied out; None is unknown, because a loop has no known trip count.

    Attributes:
      flops: of matrix products and convolutions.
      bytes: read from and written to main memory; an upper bound.
      uncounted: the targets of custom calls, whose work the text does not show.
    """

    flops: int | None
    bytes: int | None
    uncounted: tuple[str, ...]

    @property
    def intensity(self) -> float | None:
        """Flops per byte moved; None if either is unknown, or nothing is moved."""
        return self.flops / self.bytes if self.flops is not None and self.bytes else None

    def __str__(self) -> str:
        rows = {
            "flops": "unknown" if self.flops is None else f"{self.flops:,}",
            "bytes moved": "unknown" if self.bytes is None else readable_bytes(self.bytes),
            "flops per byte": "unknown" if self.intensity is None else f"{self.intensity:.1f}",
            **({"not counted": ", ".join(self.uncounted)} if self.uncounted else {}),
        }
        return "\n".join(aligned_table(rows.items()))


def cost(compiled: jax.stages.Compiled | str) -> Cost:
    """Return the flops of a program and the bytes it moves, on one device.

    Meaning: the flops of its matrix products and convolutions, and the bytes that its instructions read and write,
      each times its number of executions.
    Why: XLA's own sum counts the body of a loop once, and so misses accumulation and layers.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or its `as_text()`.
    Units:  flops and bytes on one device; a multiplication and an addition are two flops.
    Errors: ValueError if the backend prints no HLO.
    `flops` is None if a product is in a loop of unknown trip count. A branch counts as if it were always taken.
    Element-wise work is not counted, nor is a product of two vectors on the CPU.
    Source: ours.
    """
    module = parse(text_of(compiled))
    return Cost(flops(module), traffic(module), _uncounted(module))


def flops(module: Module) -> int | None:
    """Count the flops of matrix products and convolutions, loops multiplied out.

    Meaning: two for each multiplication and addition; None if a loop around one has no known trip count.
    Why: XLA's `cost_analysis` counts the body of a loop once.

    Args:
      module: a program, as `stepc.inspect.hlo.parse` reads it.
    A product of two vectors, which the CPU compiler writes as multiply and reduce, is not counted.
    Source: convolutions are counted as in XLA, hlo_cost_analysis.cc, https://github.com/openxla/xla.
    """
    return program_total(module, _counted_flops)


def instruction_flops(module: Module, computation: Computation, instruction: Instruction) -> int | None:
    """Count the flops of one instruction and everything it runs; None if that has a loop of unknown trip count."""
    return instruction_total(module, computation, instruction, _counted_flops)


def traffic(module: Module) -> int | None:
    """Count the bytes that are read and written, loops multiplied out; None if a trip count is unknown.

    Meaning: for each instruction outside a fusion, its operands and its results; for a slice and for an update in
      place, only the part that it touches.
    Why: a step is as slow as the slower of its arithmetic and its memory, and XLA's own sum counts a loop once.

    Args:
      module: a program, as `stepc.inspect.hlo.parse` reads it.
    Units:  bytes on one device, without padding. On a TPU, the fast on-chip memory does not count.
    An upper bound: what stays in a cache between two instructions is counted twice.
    Source: after XLA, hlo_cost_analysis.cc, https://github.com/openxla/xla.
    """
    return program_total(module, partial(_moved, module), excluded=_without_traffic(module))


def instruction_traffic(module: Module, computation: Computation, instruction: Instruction) -> int | None:
    """Count the bytes that one instruction and everything it runs moves; None if a trip count is unknown."""
    return instruction_total(
        module, computation, instruction, partial(_moved, module), includes_calls=_runs_its_computations
    )


_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_GEMMS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")


def _uncounted(module: Module) -> tuple[str, ...]:
    """The targets of custom calls, which may do work that the text does not show."""
    calls = (
        re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if _flops(computation, instruction) is None
    )
    return tuple(sorted({call[1] for call in calls if call}))


def _counted_flops(computation: Computation, instruction: Instruction) -> int:
    return _flops(computation, instruction) or 0


def _flops(computation: Computation, instruction: Instruction) -> int | None:
    """The flops of one instruction by itself; None for a custom call that is not a known product."""
    match instruction.opcode:
        case "dot":
            contracted = _numbers(instruction, r"lhs_contracting_dims=\{([\d,]*)\}")
        case "convolution":
            return _convolution(computation, instruction)
        case "custom-call" if any(f'target="{name}"' in instruction.attributes for name in _GEMMS):
            contracted = _numbers(instruction, r'"lhs_contracting_dimensions":\[([\d,"]*)\]')
        case "custom-call" | "custom-call-start":
            return None
        case _:
            return 0
    left = _operand(computation, instruction, 0)
    return 2 * instruction.shapes[0].elements * math.prod(left.dims[axis] for axis in contracted)


def _convolution(computation: Computation, instruction: Instruction) -> int:
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        raise ValueError(f"`{instruction.name}` is a convolution without dim_labels.")
    inputs, kernel, output = (
        dict(zip(letters, shape.dims, strict=True))
        for letters, shape in zip(
            labels.groups(),
            (
                _operand(computation, instruction, 0),
                _operand(computation, instruction, 1),
                instruction.shapes[0],
            ),
            strict=True,
        )
    )
    batches = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    products = kernel["i"] * kernel["o"] * inputs["b"] // int(batches[1] if batches else 1)
    for position, axis in enumerate(sorted(set(kernel) - {"i", "o"})):
        products *= _valid_pairs(instruction, position, inputs[axis], kernel[axis], output[axis])
    return 2 * products


def _valid_pairs(instruction: Instruction, position: int, size: int, kernel_size: int, output_size: int) -> int:
    """How many pairs of an output and a kernel position read an input, and neither padding nor a dilation gap."""
    stride = _window(instruction, "stride", position, "1")
    low = _window(instruction, "pad", position, "0_0")
    input_step = _window(instruction, "lhs_dilate", position, "1")
    kernel_step = _window(instruction, "rhs_dilate", position, "1")
    read = np.arange(output_size)[:, None] * stride + np.arange(kernel_size) * kernel_step - low
    return int(((read >= 0) & (read < (size - 1) * input_step + 1) & (read % input_step == 0)).sum())


def _window(instruction: Instruction, name: str, position: int, default: str) -> int:
    """One number of `window={size=3x3 pad=1_1x1_1}`; for `pad`, the low one, which may be negative."""
    found = re.search(rf"window=\{{[^}}]*\b{name}=([\d_x\-]+)", instruction.attributes)
    return int((found[1].split("x")[position] if found else default).split("_")[0])


def _operand(computation: Computation, instruction: Instruction, position: int) -> Shape:
    return computation.instructions[instruction.operands[position]].shapes[0]


def _numbers(instruction: Instruction, pattern: str) -> tuple[int, ...]:
    found = re.search(pattern, instruction.attributes)
    return tuple(int(number) for number in re.findall(r"\d+", found[1])) if found else ()


# These move nothing: they name existing values, wait, or run computations that are counted themselves.
_MOVES_NOTHING = (
    "after-all", "bitcast", "bitcast-convert", "call", "conditional", "constant", "domain", "get-tuple-element",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple", "while",
)  # fmt: skip
# These read only a part of their first operand, as large as their result.
_SLICING = ("dynamic-slice", "gather", "slice")
_MAIN_MEMORY = 0


def _runs_its_computations(instruction: Instruction) -> bool:
    """Whether it runs the computations that it names instruction by instruction, unlike a fusion or a reduction."""
    return instruction.opcode in ("call", "call-start", "async-start", "while", "conditional")


def _without_traffic(module: Module) -> set[str]:
    """The computations whose instructions touch no memory themselves: bodies of fusions, reducers, comparators."""
    inner: set[str] = set()
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if not _runs_its_computations(instruction):
                inner.update(call.computation for call in instruction.calls)
    pending = list(inner)
    while pending:  # what a fusion calls may call others
        name = pending.pop()
        if name in module.computations:
            called = {call.computation for one in module.computations[name].instructions.values() for call in one.calls}
            pending += called - inner
            inner |= called
    return inner


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _MOVES_NOTHING or opcode.endswith(("-done", "-update")) or opcode in ("call-start", "async-start"):
        return 0
    operands = [computation.instructions[name].shapes for name in instruction.operands]
    if opcode == "fusion" and instruction.calls[0].computation in module.computations:
        return _fused(module.computations[instruction.calls[0].computation], instruction, operands)
    if opcode in _SLICING:
        return 2 * _bytes(instruction.shapes) + sum(map(_bytes, operands[1:]))
    if opcode == "dynamic-update-slice":
        return 2 * _bytes(operands[1])
    results, count = instruction.shapes, len(operands)
    if opcode.endswith("-start") and len(results) > count:
        results = results[count : 2 * count]  # it returns its operands, its results, and what a backend waits with
    return sum(map(_bytes, operands)) + _bytes(results)


def _fused(body: Computation, fusion: Instruction, operands: list[tuple[Shape, ...]]) -> int:
    """The bytes that a fusion reads of its operands and writes of its results."""
    parameters = {int(each.literal): each for each in body.instructions.values() if each.opcode == "parameter"}
    users: dict[str, list[Instruction]] = {}
    for each in body.instructions.values():
        for name in dict.fromkeys(each.operands):
            users.setdefault(name, []).append(each)
    total = sum(_read(users, parameters[at], shapes) for at, shapes in enumerate(operands) if at in parameters)
    root = _without_copies(body, body.root)
    names = root.operands if root.opcode == "tuple" else (root.name,)
    roots = (_without_copies(body, body.instructions[name]) for name in names)
    for shape, written in zip(fusion.shapes, roots, strict=False):
        if written.opcode == "dynamic-update-slice":
            total += _bytes(body.instructions[written.operands[1]].shapes)
        else:
            total += _bytes((shape,))
    return total


def _read(users: dict[str, list[Instruction]], parameter: Instruction, shapes: tuple[Shape, ...]) -> int:
    """The bytes that a fusion reads of one operand.

    Args:
      users: the instructions of the fusion by the names of their operands.
    """
    if not _bytes(shapes):
        return 0
    names, touched = [parameter.name], dict[str, int]()
    for name in names:  # it grows by other names of the same numbers
        for each in users.get(name, ()):
            is_first = each.operands[0] == name and each.operands.count(name) == 1
            if each.opcode in ("bitcast", "copy", "reshape") and each.shapes[0].elements == shapes[0].elements:
                names.append(each.name)
            elif is_first and each.opcode in _SLICING:
                touched[each.name] = sum(shape.bytes for shape in each.shapes)
            elif not is_first or each.opcode != "dynamic-update-slice":
                return _bytes(shapes)
    return min(sum(touched.values()), _bytes(shapes))


def _without_copies(body: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "copy") and instruction.operands:
        instruction = body.instructions[instruction.operands[0]]
    return instruction


def _bytes(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == _MAIN_MEMORY)
