"""The scripts and the notebook of examples/ run, and show what they say they show."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest

import fsn_jax
from examples import induction

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOK = EXAMPLES / "tour.ipynb"


def test_known_continuations_are_those_that_can_be_looked_up():
    """Against loops: the rule of a sequence is its most frequent successor over a long one."""
    data = induction.draw(jax.random.key(0), batch=3, length=600)
    tokens, known = np.asarray(data.tokens), np.asarray(data.known)
    assert tokens.shape == (3, 600) and known.shape == (3, 599)
    for row, flags in zip(tokens, known, strict=True):
        pairs = list(zip(row[:-1].tolist(), row[1:].tolist(), strict=True))
        counts = np.zeros((induction.V, induction.V), int)
        np.add.at(counts, tuple(np.transpose(pairs)), 1)
        image = counts.argmax(axis=1)
        assert sorted(image) == list(range(induction.V))
        shown = set()
        for (now, later), flag in zip(pairs, flags, strict=True):
            assert flag == (image[now] == later and now in shown)
            if image[now] == later:
                shown.add(now)
        follows = np.mean([image[now] == later for now, later in pairs])
        # Three in four by the rule, and one jump in twelve lands where the rule leads.
        assert abs(follows - (1 - induction.JUMP * 11 / 12)) < 5 * np.sqrt(0.25 / 600)


@pytest.mark.slow
def test_one_layer_learns_to_look_up_with_the_delay_and_not_without():
    """150 steps: the example's own arms, far apart already."""
    correct = {}
    for name, model in induction.ARMS.items():
        _, curve = induction.train(model, steps=150)
        correct[name] = float(curve.correct[-15:].mean())
    assert correct["with the delay term"] > 0.6
    assert correct["without it"] < 0.3
    assert correct["transformer"] < 0.3


def test_the_mixer_is_a_transformer_but_for_its_lines():
    """The transformer that it starts from has at most 60 lines, of which three change."""
    source = (EXAMPLES / "mixer.py").read_text(encoding="utf-8")
    model = source[source.index("class Block") : source.index("@functools.partial")]
    assert len(model.splitlines()) <= 60
    branch = source.split("        if self.mixer:\n")[1].split("        else:\n")[0]
    assert len(branch.splitlines()) == 3


@pytest.mark.slow
def test_the_mixer_learns_to_repeat_before_the_transformer(tmp_path):
    done = subprocess.run(
        [sys.executable, "examples/mixer.py", "--steps=300", f"--output={tmp_path / 'mixer.png'}"],
        cwd=EXAMPLES.parent,
        env={**os.environ, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    transformer, mixer = done.stdout.splitlines()
    assert "90% right at step" in mixer and "90% not reached" in transformer
    assert (tmp_path / "mixer.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_induction_script_prints_a_line_an_arm():
    done = subprocess.run(
        [sys.executable, "examples/induction.py", "--steps=2"],
        cwd=EXAMPLES.parent,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    _, *rows, guess = done.stdout.splitlines()
    assert len(rows) == len(induction.ARMS) and guess.startswith("by a guess")
    assert all(row.startswith(name) for row, name in zip(rows, induction.ARMS, strict=True))


def test_the_notebook_is_small_and_was_run_in_order():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 1_000_000
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7


def test_the_models_of_the_notebook_are_those_of_its_outputs(capsys):
    """Defaults may change; the pictures that are kept stay those of the models in the cell."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (cell,) = [c for c in cells if c.cell_type == "code" and "FSNConfig(" in c.source]
    names = {"V": 96, "FSN_BLUE": "", "TRANSFORMER_ORANGE": ""}
    exec(cell.source, {**vars(fsn_jax), **names})
    assert capsys.readouterr().out == cell.outputs[0].text


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    """All of it, with a few steps of training, from its own folder."""
    from nbclient import NotebookClient

    # The kernel is a process of its own: not with the tests' eight devices, but with their code.
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    names = [line.split(" = ")[0] for line in settings.source.splitlines() if " = " in line]
    assert names == ["STEPS", "INDUCTION_STEPS"]
    settings.source = "STEPS = 8\nINDUCTION_STEPS = 4"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
