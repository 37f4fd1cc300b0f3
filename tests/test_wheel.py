"""The package as others get it: a wheel of the library, installed away from its source.

The programs are not in it: a user's own train.py would hide them. They run from a checkout.
"""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from train.__main__ import EXTRA_PACKAGES

ROOT = Path(__file__).resolve().parent.parent

FORWARD = """
import sys
for name in ("grain", "matplotlib", "ml_collections", "tensorboard", "tensorflow_datasets", "tqdm"):
    sys.modules[name] = None  # of the programs alone: an installation need not have them
import jax, fsn_jax, fsn_jax.generate, fsn_jax.hub, fsn_jax.readings
assert "site-packages" in fsn_jax.__file__, fsn_jax.__file__
assert fsn_jax.__version__ == VERSION, fsn_jax.__version__
model = fsn_jax.FSN(fsn_jax.FSNConfig(vocab_size=7, num_layers=1, num_phases=8, num_heads=2))
tokens = jax.numpy.zeros((2, 5), int)
logits, _ = model.init_with_output(jax.random.key(0), tokens)
assert logits.shape == (2, 5, 7) and bool(jax.numpy.isfinite(logits).all())
"""


# Five lines with the library alone; the user's own train.py is in the folder.
PRETRAINED = """
from fsn_jax import hub
trained = hub.load("model")
assert len(trained.sample("The ", num_tokens=20)) == 20
assert trained.states("abc").shape == (1, 3, 64)  # the phases that the readout reads
assert trained.logits("abc").shape == (1, 3, 205)
"""


DISTRIBUTION = {"absl": "absl-py", "orbax": "orbax-checkpoint"}
"""Of the modules that are named otherwise than the package that holds them."""


def imported(*rooms):
    """The packages of others that the code of some folders imports, by the names pip knows."""
    names = set()
    for file in (file for room in rooms for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).split(".")[0])
    others = names - sys.stdlib_module_names - {"fsn_jax", "train", "configs"}
    return {DISTRIBUTION.get(name, name).replace("_", "-") for name in others}


def test_the_library_depends_on_what_it_imports_and_the_programs_on_their_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def declared(requirements):
        return {re.match(r"[\w-]+", text)[0].replace("_", "-") for text in requirements}

    library = declared(project["dependencies"])
    extra = declared(project["optional-dependencies"]["train"])
    assert imported("fsn_jax") == library
    of_others = {"flatbuffers", "importlib-resources"}  # imported by JAX and tensorflow-datasets
    assert imported("train", "configs") - library == extra - of_others
    known = {DISTRIBUTION.get(name, name).replace("_", "-") for name in EXTRA_PACKAGES}
    assert known | {"importlib-resources"} == extra


def test_programs_without_their_packages_say_what_to_install():
    code = (
        "import runpy, sys; sys.modules['grain'] = None; runpy.run_module('train', {}, '__main__')"
    )
    done = subprocess.run(
        (sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "(grain)" in line and "pip install -e '.[train]'" in line


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_installs_and_runs_from_an_empty_folder(tmp_path):
    # A copy of what git knows of, so that the build leaves nothing in the tree.
    source, empty = tmp_path / "source", tmp_path / "empty"
    empty.mkdir()
    listed = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in run("git", *listed, cwd=ROOT).split("\0"):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path))
    run(*pip, *build, str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    version = wheel.name.split("-")[1]
    assert "fsn_jax/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"fsn_jax", f"fsn_jax-{version}.dist-info"}

    venv.create(tmp_path / "fresh", with_pip=False)
    python = str(tmp_path / "fresh" / "bin" / "python")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel), cwd=empty)
    # The locked packages, by a plain path: what is installed in editable form there stays unseen.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=empty).strip())
    (site / "locked.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run(python, "-c", FORWARD.replace("VERSION", repr(version)), cwd=empty)
    alone = (python, "-m", "fsn_jax")
    pointed = subprocess.run(alone, cwd=empty, capture_output=True, text=True, timeout=300)
    assert pointed.returncode == 1 and "run in a checkout" in pointed.stderr.splitlines()[0]
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.py").write_text(
        "raise RuntimeError('the user has a train.py')\n", encoding="utf-8"
    )
    shutil.copytree(ROOT / "pretrained" / "enwik8_projected_pocket", own / "model")
    run(python, "-c", PRETRAINED, cwd=own)
    assert "--config=configs/quickstart.py" in run(python, "-m", "train", "--help", cwd=source)
    assert "usage: python -m train" in run(python, "-m", "train", "sample", "--help", cwd=source)
