"""What a program does between the start and the end of an asynchronous collective."""

from dataclasses import dataclass

from stepc.inspect.flops import flops_of
from stepc.inspect.hlo import Computation, Instruction, Module

# These take no time of their own: they name parts of what is there, or wait.
_FREE = ("bitcast", "constant", "get-tuple-element", "parameter", "tuple", "opt-barrier", "after-all")


@dataclass(frozen=True)
class Between:
    """What is scheduled between a start and its done.

    Attributes:
      instructions: the names of the instructions that do work.
      flops: of their matrix products and convolutions; None if a loop of unknown length is among them.
    """

    instructions: tuple[str, ...]
    flops: int | None

    def __str__(self) -> str:
        if not self.instructions:
            return "nothing"
        many = f"{len(self.instructions)} instruction{'s' if len(self.instructions) > 1 else ''}"
        return f"{many}, {'unknown' if self.flops is None else f'{self.flops:,}'} flops"


def continues(instruction: Instruction) -> bool:
    """Whether this is a later part of an asynchronous TPU fusion, whose start holds the same collective."""
    if instruction.opcode != "fusion":
        return False
    names = " ".join([instruction.name, *(call.computation for call in instruction.calls)]).replace("_", "-")
    return "async-collective" in names and "start" not in names


def between(module: Module, computation: Computation, start: Instruction) -> Between | None:
    """List what stands between a start and its done in the order of the text; None if no done is found.

    Meaning: the instructions after `start` and before the last one that waits for it.
    Why: a collective is hidden only by what is scheduled while it runs; a pair with nothing between hides nothing.

    Args:
      computation: where `start` stands. Its text is in the order of execution if the program is scheduled, as
        compiled programs are.
    Source: ours.
    """
    following = list(computation.instructions.values())
    following = following[following.index(start) + 1 :]
    waiting, end = {start.name}, None
    for at, instruction in enumerate(following):
        if not waiting & set(instruction.operands):
            continue
        if instruction.opcode.endswith(("-done", "-update")) or continues(instruction):
            end = at
        if (
            instruction.opcode.endswith("-update")
            or instruction.opcode == "get-tuple-element"
            or continues(instruction)
        ):
            waiting.add(instruction.name)
    if end is None:
        return None
    # The middle part of a TPU fusion is work itself: it computes while the collective runs.
    work = [each for each in following[:end] if _works(each)]
    counts = [flops_of(module, computation, each) for each in work]
    known = [count for count in counts if count is not None]
    return Between(tuple(each.name for each in work), sum(known) if len(known) == len(counts) else None)


def _works(instruction: Instruction) -> bool:
    return instruction.opcode not in _FREE and not instruction.opcode.endswith(("-start", "-done", "-update"))
