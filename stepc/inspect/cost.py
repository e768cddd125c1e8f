"""The multiplications of a program, counted from its text; it must not trust XLA's own sum."""

import math
import re
from functools import partial

import numpy as np

from stepc.inspect.hlo import Computation, Instruction, Module, Shape
from stepc.inspect.loops import over_instruction, over_program

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_GEMMS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")


def flops(module: Module) -> int | None:
    """Count the flops of matrix products and convolutions, loops multiplied out.

    Meaning: two for each multiplication and addition; None if a loop around one has no known trip count.
    Why: XLA's `cost_analysis` counts the body of a loop once.

    Args:
      module: a program, as `stepc.inspect.hlo.parse` reads it.
    A product of two vectors, which the CPU compiler writes as multiply and reduce, is not counted.
    Source: convolutions are counted as in XLA, hlo_cost_analysis.cc, https://github.com/openxla/xla.
    """
    return over_program(module, _known)


def flops_of(module: Module, computation: Computation, instruction: Instruction) -> int | None:
    """Count the flops of one instruction and of all that it runs; None if it holds a loop of unknown length."""
    return over_instruction(module, computation, instruction, _known)


def uncounted(module: Module) -> tuple[str, ...]:
    """The targets of custom calls, which may do work that the text does not show."""
    calls = (
        re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if _flops(computation, instruction) is None
    )
    return tuple(sorted({call[1] for call in calls if call}))


def _known(computation: Computation, instruction: Instruction) -> int:
    return _flops(computation, instruction) or 0


def _flops(computation: Computation, instruction: Instruction) -> int | None:
    """The flops of one instruction by itself; None if it is a call into the unknown."""
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
        products *= _valid(instruction, position, inputs[axis], kernel[axis], output[axis])
    return 2 * products


def _valid(instruction: Instruction, position: int, size: int, kernel_size: int, output_size: int) -> int:
    """How many pairs of an output and a kernel position meet an input, and neither padding nor a hole."""
    stride = _window(instruction, "stride", position, "1")
    low = _window(instruction, "pad", position, "0_0")
    input_step = _window(instruction, "lhs_dilate", position, "1")
    kernel_step = _window(instruction, "rhs_dilate", position, "1")
    met = np.arange(output_size)[:, None] * stride + np.arange(kernel_size) * kernel_step - low
    return int(((met >= 0) & (met < (size - 1) * input_step + 1) & (met % input_step == 0)).sum())


def _window(instruction: Instruction, name: str, position: int, otherwise: str) -> int:
    """One number of `window={size=3x3 pad=1_1x1_1}`; of a padding, the low one, which may be negative."""
    found = re.search(rf"window=\{{[^}}]*\b{name}=([\d_x\-]+)", instruction.attributes)
    return int((found[1].split("x")[position] if found else otherwise).split("_")[0])


def _operand(computation: Computation, instruction: Instruction, position: int) -> Shape:
    return computation.instructions[instruction.operands[position]].shapes[0]


def _numbers(instruction: Instruction, pattern: str) -> tuple[int, ...]:
    found = re.search(pattern, instruction.attributes)
    return tuple(int(number) for number in re.findall(r"\d+", found[1])) if found else ()


# These move nothing: they name what is there, wait, or run computations that are counted themselves.
_STILL = (
    "after-all", "bitcast", "bitcast-convert", "call", "conditional", "constant", "domain", "get-tuple-element",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple", "while",
)  # fmt: skip
# These look at a part of their first operand, as large as their result.
_SLICING = ("dynamic-slice", "gather", "slice")
_MAIN = 0


def traffic(module: Module) -> int | None:
    """Count the bytes that are read and written, loops multiplied out; None if a loop hides how often.

    Meaning: of each instruction that stands outside a fusion, its operands and its results; of a slice, and of an
      update in place, the part that is touched.
    Why: a step is as slow as the slower of its arithmetic and its memory, and XLA's own sum counts a loop once.

    Args:
      module: a program, as `stepc.inspect.hlo.parse` reads it.
    Units:  bytes on one device, without padding. On a TPU, what lies in the fast memory does not count.
    What stays in a cache between two instructions is counted twice: it is a bound from above.
    Source: after XLA, hlo_cost_analysis.cc, https://github.com/openxla/xla.
    """
    return over_program(module, partial(_moved, module), apart=_inside(module))


def moved_by(module: Module, computation: Computation, instruction: Instruction) -> int | None:
    """Count the bytes that one instruction moves, with all that it runs; None if it hides how often it runs it."""
    return over_instruction(module, computation, instruction, partial(_moved, module), runs=_runs)


def _runs(instruction: Instruction) -> bool:
    """Whether the computations it names run as they stand, and are not the inside of a fusion, or a reducer."""
    return instruction.opcode in ("call", "call-start", "async-start", "while", "conditional")


def _inside(module: Module) -> set[str]:
    """The computations whose instructions never touch memory on their own: bodies of fusions, reducers, comparators."""
    inner: set[str] = set()
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if not _runs(instruction):
                inner.update(call.computation for call in instruction.calls)
    # What a fusion calls may call others.
    while (
        more := {
            call.computation
            for name in inner & set(module.computations)
            for instruction in module.computations[name].instructions.values()
            for call in instruction.calls
        }
        - inner
    ):
        inner |= more
    return inner


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _STILL or opcode.endswith(("-done", "-update")) or opcode in ("call-start", "async-start"):
        return 0
    given = [computation.instructions[name].shapes for name in instruction.operands]
    if opcode == "fusion" and instruction.calls[0].computation in module.computations:
        return _fused(module.computations[instruction.calls[0].computation], instruction, given)
    if opcode in _SLICING:
        return 2 * _bytes(instruction.shapes) + sum(map(_bytes, given[1:]))
    if opcode == "dynamic-update-slice":
        return 2 * _bytes(given[1])
    results = instruction.shapes
    if opcode.endswith("-start"):  # it returns what it was given, its result, and what it waits with
        results = instruction.shapes[len(given) : 2 * len(given)] if len(instruction.shapes) > len(given) else results
    return sum(map(_bytes, given)) + _bytes(results)


def _fused(body: Computation, fusion: Instruction, given: list[tuple[Shape, ...]]) -> int:
    """What a fusion reads of its operands, and writes of its results."""
    parameters = {int(each.literal): each for each in body.instructions.values() if each.opcode == "parameter"}
    total = sum(_read(body, parameters[at], shapes) for at, shapes in enumerate(given) if at in parameters)
    root = _through(body, body.root)
    roots = [_through(body, body.instructions[name]) for name in root.operands] if root.opcode == "tuple" else [root]
    for shape, written in zip(fusion.shapes, roots, strict=False):
        if written.opcode == "dynamic-update-slice":
            total += _bytes(body.instructions[written.operands[1]].shapes)
        else:
            total += _bytes((shape,))
    return total


def _read(body: Computation, parameter: Instruction, shapes: tuple[Shape, ...]) -> int:
    """The bytes of one operand that are looked at."""
    if not _bytes(shapes):
        return 0
    names, touched = [parameter.name], 0
    for each in body.instructions.values():
        used = [at for at, name in enumerate(each.operands) if name in names]
        if not used:
            continue
        if each.opcode in ("bitcast", "copy", "reshape") and each.shapes[0].elements == shapes[0].elements:
            names.append(each.name)
        elif used == [0] and each.opcode in _SLICING:
            touched += sum(shape.bytes for shape in each.shapes)
        elif used != [0] or each.opcode != "dynamic-update-slice":
            return _bytes(shapes)
    return min(touched, _bytes(shapes))


def _through(body: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "copy") and instruction.operands:
        instruction = body.instructions[instruction.operands[0]]
    return instruction


def _bytes(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == _MAIN)
