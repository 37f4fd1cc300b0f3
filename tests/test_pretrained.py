"""The models of pretrained/: loaded, read and sampled by the library alone."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fsn_jax
from fsn_jax import hub

ROOT = Path(__file__).resolve().parent.parent
TEXT = """\
The harbour lies at the mouth of the river and was built in the twelfth century, when salt and wool
were the main goods of the town. In 1648 a fire destroyed most of the old quarter; the church of
Saint Nicholas, whose tower had been finished in 1532, was one of the few buildings that remained.
After the fire the council decided that houses near the harbour were to be of stone, and many of
them can still be seen. The population grew to about 12,000 in 1870, after the railway had come,
and fell again when the mines in the north were closed. Today the town is known for its festival of
music, held every summer, and for the university, which has some 4,000 students. The old harbour is
now a museum. The ships that can be visited there include a lightship of 1911 and a tug.
"""
BPC = {
    "enwik8_fsn_pocket": 2.0003,
    "enwik8_projected_pocket": 1.9457,
    "enwik8_projected_1m": 1.8190,
}
"""Losses on ``TEXT``, as of the days on which the models were exported."""


@pytest.fixture(params=sorted(BPC), scope="module")
def pretrained(request):
    return request.param, hub.load(ROOT / "pretrained" / request.param)


@functools.cache
def forward(model):
    return jax.jit(model.apply)


def bits(trained, text):
    """Bits of each character of a text but the first."""
    tokens = trained.encode(text)
    padded = np.pad(tokens, (0, trained.context - len(tokens)))
    logits = forward(trained.model)({"params": trained.params}, padded[None])[:, : len(tokens)]
    nats = -jax.nn.log_softmax(logits[0, :-1])
    return np.asarray(jnp.take_along_axis(nats, tokens[1:, None], 1))[:, 0] / np.log(2)


def test_the_parts_of_the_library_need_no_import_of_their_own():
    assert fsn_jax.__getattr__("hub") is hub
    assert not hasattr(fsn_jax, "a_part_it_has_not")


def test_every_folder_is_tested():
    assert {folder.name for folder in (ROOT / "pretrained").iterdir()} == set(BPC)


def test_the_loss_on_a_fixed_text(pretrained):
    name, trained = pretrained
    windows = [TEXT[i : i + trained.context] for i in range(0, len(TEXT), trained.context)]
    losses = np.concatenate([bits(trained, window) for window in windows])
    assert losses.mean() == pytest.approx(BPC[name], abs=2e-3)


def test_it_copies_what_it_has_read(pretrained):
    """Random letters that come again cost less than half the bits of the first time."""
    _, trained = pretrained
    word = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnop"), 60))
    losses = bits(trained, f"{word} {word}")
    assert losses[:60].mean() > 5 and losses[-50:].mean() < 3


def test_it_samples_and_embeds(pretrained):
    _, trained = pretrained
    text = trained.sample("The ", num_tokens=60, seed=1)
    assert text == trained.sample("The ", num_tokens=60, seed=1) and len(text.split()) > 5
    assert trained.states("The ").shape == (1, 4, trained.model.config.num_phases)


def test_its_card_has_the_recorded_loss(pretrained):
    name, _ = pretrained
    folder = ROOT / "pretrained" / name
    run = json.loads((folder / hub.CONFIG).read_text(encoding="utf-8"))["run"]
    record = ROOT / "results" / f"{run['name']}"
    rows = [
        json.loads(row)
        for row in (record / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert run["step"] == rows[-1]["step"] and run["data_sha256"] == rows[-1]["data_sha256"]
    assert f"{rows[-1]['bpc']:.4f} bits per character" in (folder / "README.md").read_text(
        encoding="utf-8"
    )
