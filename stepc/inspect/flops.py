"""The multiplications of a program, counted from its text; it must not trust XLA's own sum."""

import math
import re

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
