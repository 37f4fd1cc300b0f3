"""Which module may import which: one way, from the programs down to the library.

The arrows are read from the source, also those of imports inside functions.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.__main__ import PROGRAMS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fsn_jax", "train", "configs")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(file): file for package in PACKAGES for file in (ROOT / package).rglob("*.py")}


def imported_by(source: str) -> Iterator[str]:
    """The modules that the source names in an import, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "an import names its module in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else str(node.module) for name in names)


ARROWS = {
    module: {name for name in imported_by(file.read_text(encoding="utf-8")) if name in FILES}
    for module, file in FILES.items()
}


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that import each other, directly or through others."""
    reached = {module: set(direct) for module, direct in arrows.items()}
    while True:
        wider = {m: r.union(*(reached[other] for other in r)) for m, r in reached.items()}
        if wider == reached:
            break
        reached = wider
    found: list[set[str]] = []
    for module, below in reached.items():
        if module in below and not any(module in circle for circle in found):
            found.append({other for other in below if module in reached[other]})
    return found


def test_a_circle_is_found():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(arrows) == [{"b", "c"}]


def test_no_modules_import_each_other():
    assert circles(ARROWS) == []


# What the modules of a room may import of this repository, besides the room itself.
BELOW = {
    "fsn_jax": (),
    "train.data": (
        "fsn_jax.vocabulary",
        "train.bucket",
        "train.errors",
        "train.files",
        "train.program",
    ),
    "train": ("fsn_jax",),
    "configs": ("fsn_jax", "train"),
}


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_what_is_below_it(room):
    wrong = [
        (module, name)
        for module, names in ARROWS.items()
        if is_in(module, room)
        for name in names
        if not any(is_in(name, allowed) for allowed in (room, *BELOW[room]))
    ]
    assert wrong == []


def test_only_the_end_of_a_run_and_the_ladder_import_the_analysis():
    importers = {
        module
        for module, names in ARROWS.items()
        if not is_in(module, "train.analysis")
        for name in names
        if is_in(name, "train.analysis")
    }
    assert importers == {"train.finish", "train.ladder"}


def test_the_library_reads_no_files_but_pretrained_models():
    calls = {"open", "read_text", "write_text", "read_bytes", "write_bytes"}
    for module, file in FILES.items():
        if is_in(module, "fsn_jax") and module != "fsn_jax.hub":
            names = {
                node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
            }
            assert not calls & names, module


def test_every_program_of_the_command_line_is_there_and_only_those():
    by_source = {
        module
        for module, file in FILES.items()
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "program"
            for node in ast.parse(file.read_text(encoding="utf-8")).body
        )
    }
    listed = {entry.module for entry in PROGRAMS.values()}
    assert by_source == listed | {"train.main", "train.__main__"}


def test_the_list_of_programs_imports_none_of_them():
    code = (
        "import sys; from train.__main__ import program; program(['train', '--help']); "
        "sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'train.main')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in PROGRAMS)


def opens_text(call: ast.Call) -> bool:
    """Whether a call by its name reads or writes a file as text."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = [str(a.value) for a in given if isinstance(a, ast.Constant)]
    if name in ("open", "fdopen"):
        return not given or any(re.fullmatch("[rwax][+t]*", mode) for mode in modes)
    return name in ("read_text", "write_text")


def test_text_files_are_utf_8_whatever_the_locale_is():
    """Ruff's rule for it, PLW1514, does not know which names are paths."""
    rooms = (*PACKAGES, "benchmarks", "examples", "tests", "tools")
    assert [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for room in rooms
        for file in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(node, ast.Call) and opens_text(node)
        if "encoding" not in {keyword.arg for keyword in node.keywords}
    ] == []


MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60

# A single call of a kernel, with the layout of each of its operands.
KNOWN_LONG = {"fsn_jax.kernels.tpu_tiles.call"}


def test_no_file_and_no_function_is_too_long():
    """A room holds one noun, and a reader holds a function in the head."""
    long = []
    for module, file in FILES.items():
        text = file.read_text(encoding="utf-8")
        if (count := len(text.splitlines())) > MOST_LINES:
            long.append(f"{module}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{module}.{node.name}: {count} lines")
    assert [entry for entry in long if entry.split(":")[0] not in KNOWN_LONG] == []
