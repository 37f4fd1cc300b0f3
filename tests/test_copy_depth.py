"""Loss by copy depth: exact tables of models whose losses are known, intervals, the program."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
import test_induction
from test_suffix_match import by_definition

from fsn_jax import FSN, FSNConfig
from train.analysis import copy_depth
from train.analysis.copy_depth import BUCKETS, find_cell, tabulate
from train.analysis.windows import spread_windows
from train.data.suffix_match import SuffixMatch, match_suffixes
from train.errors import UserError
from train.load import load
from train.step import make_window_losses, window_loss

LETTERS = 4
RIGHT = 0.9  # what the copier below gives to the character it expects


def test_seeds_of_an_arm_share_one_program():
    one, other = (
        make_window_losses(FSN(FSNConfig(num_layers=2)), mesh=small_runs.mesh_of(1))
        for _ in range(2)
    )
    assert one is other


def some_windows(count=40, length=150):
    """Random text in which long pieces come again, near and far."""
    rng = np.random.default_rng(1)
    text = rng.integers(LETTERS, size=(count, length + 1)).astype(np.uint8)
    text[:, 100:130] = text[:, 10:40]
    text[:, 60:64] = text[:, 50:54]
    return text


def copier(window):
    """Bits of each prediction of a model that expects the source's successor, if there is one."""
    depth, _, is_copy = by_definition(window)
    wrong = (1 - RIGHT) / (LETTERS - 1)
    return -np.log2(np.where(depth == 0, 1 / LETTERS, np.where(is_copy, RIGHT, wrong)))


def test_the_table_of_a_copier_is_known_to_the_bit():
    windows = some_windows()
    match = match_suffixes(windows)
    uniform = np.full(match.depth.shape, np.log2(LETTERS))
    losses = {"copier": [np.stack([copier(w) for w in windows])], "uniform": [uniform]}
    arms = tabulate(match, losses, reference="uniform", num_resamples=50)
    wrong = -np.log2((1 - RIGHT) / (LETTERS - 1))
    for events, bits in (("copy", -np.log2(RIGHT)), ("other", wrong)):
        for distance in ("near", "far"):
            for bucket in BUCKETS[1:]:
                cell = find_cell(arms["copier"]["loss"], events, distance, bucket)
                apart = find_cell(arms["copier"]["difference"], events, distance, bucket)
                if not cell["n"]:
                    assert cell["mean"] is None and apart["low"] is None
                    continue
                # Every prediction of the cell has one loss, so that no resample moves the mean.
                for name in ("mean", "low", "high"):
                    assert cell[name] == pytest.approx(bits)
                    assert apart[name] == pytest.approx(bits - np.log2(LETTERS))
    assert find_cell(arms["copier"]["loss"], "copy", "far", "16+")["n"] > 100
    first = find_cell(arms["copier"]["loss"], "all", "any", "0")
    assert first["mean"] == pytest.approx(np.log2(LETTERS))
    assert arms["uniform"]["difference"] == []


def test_cells_add_up():
    match = match_suffixes(some_windows())
    losses = {"one": [np.random.default_rng(0).random(match.depth.shape)]}
    cells = tabulate(match, losses, reference="one", num_resamples=20)["one"]["loss"]

    def number(*key):
        return find_cell(cells, *key)["n"]

    assert number("all", "any", "all") == match.depth.size
    for bucket, (least, most) in zip(
        BUCKETS, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 7), (8, 15), (16, 999)], strict=True
    ):
        inside = (match.depth >= least) & (match.depth <= most)
        assert number("all", "any", bucket) == inside.sum()
        assert number("copy", "any", bucket) == (inside & match.is_copy).sum()
        assert number("other", "any", bucket) == (inside & ~match.is_copy).sum()
        assert (
            number("copy", "far", bucket)
            == (inside & match.is_copy & (match.distance > copy_depth.FAR)).sum()
        )
        if least:
            assert number("all", "near", bucket) + number("all", "far", bucket) == inside.sum()
    whole = find_cell(cells, "all", "any", "all")
    assert whole["mean"] == pytest.approx(losses["one"][0].mean())


def test_intervals_are_as_wide_as_theory_has_it():
    """Windows of one prediction each, independent: 1.96 standard errors, to a few percent."""
    count = 400
    rng = np.random.default_rng(3)
    zeros = np.zeros((count, 1), np.int32)
    match = SuffixMatch(zeros, zeros, zeros.astype(bool))
    noise = rng.normal(size=(count, 1))
    losses = {"a": [5 + 10 * noise], "b": [5 + 10 * noise + rng.normal(size=(count, 1))]}
    arms = tabulate(match, losses, reference="b", num_resamples=4000)
    own = find_cell(arms["a"]["loss"], "all", "any", "0")
    apart = find_cell(arms["a"]["difference"], "all", "any", "0")
    for cell, values in ((own, losses["a"][0]), (apart, losses["a"][0] - losses["b"][0])):
        half = (cell["high"] - cell["low"]) / 2
        expected = 1.96 * values.std() / np.sqrt(count)
        assert half == pytest.approx(expected, rel=0.08)
        assert cell["low"] < cell["mean"] < cell["high"]


def test_seeds_are_averaged_and_their_spread_reported():
    match = match_suffixes(some_windows(4))
    ones = np.ones(match.depth.shape)
    losses = {"a": [ones, 3 * ones], "b": [ones]}
    arms = tabulate(match, losses, reference="b", num_resamples=10)
    cell = find_cell(arms["a"]["loss"], "all", "any", "all")
    assert cell["mean"] == pytest.approx(2) and cell["seeds"] == pytest.approx([1, 3])
    assert cell["seed_deviation"] == pytest.approx(np.sqrt(2))
    assert find_cell(arms["a"]["difference"], "all", "any", "all")["mean"] == pytest.approx(1)
    assert find_cell(arms["b"]["loss"], "all", "any", "all")["seed_deviation"] is None


def test_a_layer_built_to_copy_is_seen_to_copy():
    """The positive control: the hand-made induction layer, and the base layer that cannot."""
    sequences = np.asarray(test_induction.TOKENS)
    answers = test_induction.ANSWERS
    others = (answers + 1) % test_induction.V
    windows = np.concatenate(
        [np.column_stack([sequences, last]) for last in (answers, others)]
    ).astype(np.uint8)
    losses = {}
    for name, switches in (("copies", test_induction.WITH_DELAY), ("base", test_induction.BASE)):
        model = FSN(FSNConfig(**switches))
        params = test_induction.built_by_hand(delay=name == "copies")
        mesh = small_runs.mesh_of(1)
        losses[name] = [copy_depth.bits_of_windows(model, params, windows, mesh=mesh)]
    arms = tabulate(match_suffixes(windows), losses, reference="base", num_resamples=50)
    copied = find_cell(arms["copies"]["loss"], "copy", "near", "1")
    assert copied["n"] == len(answers) and copied["mean"] < 1e-5
    assert find_cell(arms["copies"]["loss"], "other", "near", "1")["mean"] > 10
    assert find_cell(arms["base"]["loss"], "copy", "near", "1")["mean"] >= np.log2(3) - 1e-3
    assert find_cell(arms["copies"]["difference"], "copy", "near", "1")["high"] < -1


def test_windows_cover_the_split_from_end_to_end():
    starts = spread_windows(num_tokens=1001, length=100, count=10)
    assert starts[0] == 0 and starts[-1] + 101 == 1001
    assert (np.diff(starts) >= 100).all()
    with pytest.raises(UserError, match="must be from 1 to 10"):
        spread_windows(1001, 100, 11)


def test_the_program_writes_table_json_and_figure(finished_arms, tmp_path, capsys):
    target = tmp_path / "depth.json"
    runs = [str(folder) for folder in finished_arms.values()]
    options = ["--windows=10", "--resamples=100", f"--output={target}"]
    copy_depth.program(["copy_depth", *runs, *options])
    result = json.loads(target.read_text(encoding="utf-8"))
    assert list(result["arms"]) == ["fsn", "transformer"]
    assert result["reference"] == "transformer"
    assert [run["seed"] for run in result["arms"]["fsn"]["runs"]] == [0, 1]
    assert result["provenance"]["data"]["sha256"]
    assert target.with_suffix(".png").stat().st_size > 1000
    assert "transformer" in capsys.readouterr().out
    # Ten windows from end to end of the 300 characters, of the last checkpoint.
    whole = find_cell(result["arms"]["transformer"]["loss"], "all", "any", "all")
    assert whole["n"] == 10 * small_runs.CONTEXT
    trained = load(finished_arms["transformer"], which="latest")
    starts = [0, 31, 62, 94, 125, 157, 188, 220, 251, 283]
    windows = np.stack([trained.corpus.tokens("validation")[s : s + 17] for s in starts])
    nats = jax.jit(functools.partial(window_loss, trained.model))(trained.params, windows)
    bits = float(nats.mean()) / np.log(2)
    assert whole["mean"] == pytest.approx(bits, rel=small_runs.SAME_LOSS)
    # As many windows as there are, if no number is given and there are fewer than usual.
    copy_depth.program(["copy_depth", runs[0], "--resamples=100", f"--output={target}"])
    assert json.loads(target.read_text(encoding="utf-8"))["windows"] == 18


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--reference=nobody", "--reference must be one of fsn, transformer"),
        ("--length=17", "--length must be from 1 to the shortest context, 16"),
        ("--windows=-1", "--windows must be from 1"),
        ("--output=table.csv", "must be a file whose name ends in .json"),
        ("--resamples=99", "--resamples must be at least 100"),
    ],
)
def test_mistakes_are_one_line(finished_arms, option, message):
    runs = [str(finished_arms["fsn"]), str(finished_arms["transformer"])]
    with pytest.raises(UserError, match=message):
        copy_depth.program(["copy_depth", *runs, option])


def test_no_window_is_longer_than_copy_events_are_found_in(finished_arms, tmp_path, monkeypatch):
    monkeypatch.setattr(copy_depth, "LONGEST", 8)
    runs, output = [str(finished_arms["fsn"])], f"--output={tmp_path / 'x.json'}"
    with pytest.raises(UserError, match="from 1 to what copy events are found in, 8; got 9"):
        copy_depth.program(["copy_depth", *runs, "--length=9", output])
    copy_depth.program(["copy_depth", *runs, "--resamples=100", output])
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["length"] == 8


def test_bits_are_those_of_the_logits():
    model_bits = np.array([[0.5, 0.5], [0.25, 0.75]])

    class Fixed(FSN):
        def __call__(self, tokens):
            return jnp.log(jnp.asarray(model_bits, jnp.float32))[tokens]

    windows = np.array([[0, 1, 0], [1, 1, 0]], np.uint8)
    bits = copy_depth.bits_of_windows(
        Fixed(FSNConfig(vocab_size=2)), {}, windows, mesh=small_runs.mesh_of(2)
    )
    expected = -np.log2([[0.5, 0.25], [0.75, 0.25]])
    np.testing.assert_allclose(bits, expected, rtol=1e-6)
