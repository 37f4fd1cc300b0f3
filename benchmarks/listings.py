"""What the compilers left about the fused kernels: a TPU's schedule, a GPU's registers."""

import re
import subprocess
from pathlib import Path
from typing import Any

KERNELS = ("fsn_forward", "fsn_backward")
"""Names of the TPU's kernels."""


def schedule(dumps: Path, name: str) -> list[tuple[int, str]]:
    """Address and text of each bundle (cycle) of a kernel's final schedule."""
    files = sorted(f for f in dumps.glob(f"*{name}*final_bundles.txt") if "schedule" not in f.name)
    lines = files[-1].read_text(encoding="utf-8").splitlines()
    matches = [re.match(r"\s*(?:0x([0-9a-f]+)|0)\s+(?:\w\w)?\s*:", line) for line in lines]
    return [
        (int(match.group(1) or "0", 16), line)
        for match, line in zip(matches, lines, strict=True)
        if match
    ]


def tpu_cycles(dumps: Path, name: str, num_blocks: int) -> int:
    """Cycles of a kernel for one head of one sequence, from its static schedule.

    The kernel's body has one region a kind of tile, in the order of ``fsn_jax.kernels.tpu_tiles``:
    on the diagonal in the first block of keys, on it elsewhere, below it in the first block, below
    it elsewhere. All else in the body counts once a tile, also what the kernel of the coupling does
    once a block of keys: with several blocks its cycles are a bound. Waiting for memory is not in
    the schedule.
    """
    rows = schedule(dumps, name)
    marks = [at for at, text in rows if re.search(r"sbr\.rel|^\s*\S+\s+(PF|PB|LB)", text)]
    total = rows[-1][0] + 1
    if num_blocks == 1:
        return total
    n = num_blocks
    executions = [1, n - 1, n - 1, (n - 1) * (n - 2) // 2]
    gaps = [(b - a, a) for a, b in zip(marks, [*marks[1:], total], strict=True)]
    longest = sorted(sorted(gaps, reverse=True)[: len(executions)], key=lambda gap: gap[1])
    regions = [length for length, _ in longest]
    around = total - sum(regions)
    work = sum(length * count for length, count in zip(regions, executions, strict=True))
    return work + around * n * (n + 1) // 2


def gpu_registers(dumps: Path, ptxas: Path) -> list[dict[str, Any]]:
    """Registers and spilled bytes of each of our kernels, by ``ptxas -v``.

    Returns:
      One entry a kernel: its name, registers a thread, bytes of spill stores and of spill loads,
      and how many ``wgmma`` and ``mma`` instructions its PTX has.
    """
    found = []
    for file in sorted(dumps.glob("*.ptx")):
        text = file.read_text(encoding="utf-8")
        if "fsn_" not in text:
            continue
        target = re.search(r"\.target (\w+)", text)
        assert target
        said = subprocess.run(
            [ptxas, "-v", "--gpu-name", target.group(1), file, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        for match in re.finditer(
            r"Compiling entry function '([^']+)'.*?"
            r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            said,
            re.DOTALL,
        ):
            kernel, stores, loads, registers = match.groups()
            if "fsn_" in kernel:
                found.append(
                    {
                        "kernel": re.sub(r"\W.*", "", kernel),
                        "registers": int(registers),
                        "spill_stores": int(stores),
                        "spill_loads": int(loads),
                        "wgmma": len(re.findall(r"wgmma\.mma_async", text)),
                        "mma": len(re.findall(r"mma\.sync", text)),
                    }
                )
    return found
