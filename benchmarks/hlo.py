"""What a compiled program says of one train step: cycles, bytes, kernels, collectives."""

import collections
import dataclasses
import math
import re

ITEM_SIZE = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}

PARTS = {
    "sum": r"causal_sum|fsn_forward|fsn_backward",
    "scores": r"/score/|attention\._(project|rotate|rotary)",
    "coupling": r"/attention[./]",
    "feed-forward": r"/feedforward/|\._feed_forward/",
    "readout": r"read_out|embedding|cross_entropy|log_softmax|window_loss",
    "model, other": r"FSN|Transformer|shard_map",
}
"""Which part of the step an operation belongs to: the first that its name matches."""

OPTIMIZER = "optimizer"
UNNAMED = "unnamed"
"""What the compiler made of no operation of the Python program."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

CORPUS_BYTES = 90_000_000
"""Size of the corpus of a step, of which a gather reads as much as its result has."""

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_ARRAY = re.compile(rf"\b({'|'.join(ITEM_SIZE)})\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of the step.

    Attributes:
      opcode: of HLO.
      part: key of ``PARTS``, ``OPTIMIZER`` or ``UNNAMED``.
      cycles: the TPU compiler's estimate, or None.
      num_bytes: of operands and results.
    """

    opcode: str
    part: str
    cycles: int | None
    num_bytes: int


def step_instructions(text: str) -> list[Instruction]:
    """The instructions of the step: the computation whose kernels read and write the most.

    Around a loop over steps there may be as many kernels, which pack and unpack the state once.
    """
    computations = [
        c
        for c in re.split(r"\n(?=%|ENTRY)", text)[1:]  # after the head of the module
        if "fused" not in c.split("(")[0]
    ]
    return max(map(_instructions, computations), key=lambda step: sum(bytes_by_part(step).values()))


def _instructions(computation: str) -> list[Instruction]:
    shapes: dict[str, str] = {}
    found = []
    for line in computation.split("\n"):
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        result, shape, opcode, rest = match.groups()
        shapes[result] = shape
        operands = [
            shapes.get(name, "") for name in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        ]
        arrays = [s for s in operands if not s.startswith("(")]
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        name = re.search(r'op_name="([^"]*)"', line)
        found.append(
            Instruction(
                opcode,
                part_of(name.group(1) if name else ""),
                int(cycles.group(1)) if cycles else None,
                _size(shape) + sum(_read(s, shape) for s in arrays),
            )
        )
    return found


def part_of(name: str) -> str:
    """The part of the step that an operation of the Python program belongs to."""
    if not name:
        return UNNAMED
    if not re.search(r"FSN|Transformer|shard_map", name):
        return OPTIMIZER
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name))


def _size(shape: str) -> int:
    return sum(
        ITEM_SIZE[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in _ARRAY.findall(shape)
    )


def _read(operand: str, result: str) -> int:
    size = _size(operand)
    return min(size, _size(result)) if operand.startswith(f"u8[{CORPUS_BYTES}]") else size


def cycles_by_part(step: list[Instruction]) -> dict[str, int]:
    """The TPU compiler's estimated cycles; kernels of ours have none."""
    found: collections.Counter[str] = collections.Counter()
    for instruction in step:
        found[instruction.part] += instruction.cycles or 0
    return dict(found.most_common())


def kernels_of(step: list[Instruction]) -> list[Instruction]:
    """What a GPU launches, each on its own."""
    return [i for i in step if i.opcode in ("fusion", "copy", "custom-call", "dot")]


def bytes_by_part(step: list[Instruction]) -> dict[str, int]:
    """Bytes that the kernels of a GPU read and write."""
    found: collections.Counter[str] = collections.Counter()
    for kernel in kernels_of(step):
        found[kernel.part] += kernel.num_bytes
    return dict(found.most_common())


def collectives(text: str) -> dict[str, int]:
    """How many collectives of each kind a program has; started and done are one."""
    return {
        kind: count
        for kind in COLLECTIVES
        if (count := len(re.findall(rf" {kind}(?:-start)?\(", text)))
    }
