"""The programs that read a finished run: evaluation, the final test, sampling."""

import json
import os
import shutil

import pytest
import small_runs

from train import evaluate, final_evaluation, sample
from train.errors import UserError
from train.interruption import interruptions
from train.metrics import read_rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run and its corpus."""
    folder = tmp_path_factory.mktemp("finished")
    corpus = small_runs.write_corpus(folder / "corpus")
    outcome = small_runs.run_to_the_end(
        small_runs.tiny_experiment(corpus.folder, folder / "run"), corpus
    )
    (folder / "run" / "summary.json").write_text("{}", encoding="utf-8")
    return folder / "run", corpus, outcome


def test_evaluation_covers_the_split_and_is_logged(finished, capsys):
    run, corpus, outcome = finished
    evaluate.program(["evaluate", str(run), "--checkpoint=latest"])
    (row,) = read_rows(run / "evaluations.jsonl")
    assert row["num_bytes"] == corpus.splits["validation"].num_bytes - 1
    assert row["step"] == outcome.step
    assert row["data_sha256"] == corpus.sha256
    # The run's own last evaluation was of the same parameters on the same split.
    last = [r for r in read_rows(run / "metrics.jsonl") if r["kind"] == "validation"][-1]
    assert row["bpc"] == pytest.approx(last["bpc"], rel=1e-6)
    assert f"{row['bpc']:.4f} BPC" in capsys.readouterr().out


def test_the_test_split_is_read_once_and_the_use_recorded(finished, capsys, monkeypatch):
    run, corpus, _ = finished
    final_evaluation.program(["test", str(run)])
    (row,) = read_rows(run / "test_reads.jsonl")
    assert row["num_bytes"] == corpus.splits["test"].num_bytes - 1
    first = capsys.readouterr().out
    assert f"{row['bpc']:.4f} BPC" in first

    with monkeypatch.context() as patched:
        patched.setattr(final_evaluation, "evaluate", None)  # to read again would fail
        final_evaluation.program(["test", str(run)])
    again = capsys.readouterr().out
    assert f"{row['bpc']:.4f} BPC, read on {row['time']}" in again
    assert len(read_rows(run / "test_reads.jsonl")) == 1

    final_evaluation.program(["test", str(run), "--stride=4"])
    assert "has been read 1 time(s) before" in capsys.readouterr().out
    assert len(read_rows(run / "test_reads.jsonl")) == 2


def test_the_test_split_of_an_unfinished_run_is_not_read(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(final_evaluation, "evaluate", None)
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        final_evaluation.program(["test", str(run)])


def test_a_loss_of_the_test_split_is_not_shown_without_a_record(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("test_reads.jsonl"))
    (run / "test_reads.jsonl").symlink_to(tmp_path / "no_folder" / "log")
    monkeypatch.setattr(final_evaluation, "evaluate", None)
    with pytest.raises(UserError, match=r"cannot write .*test_reads.jsonl \(No such file"):
        final_evaluation.program(["test", str(run)])


def test_a_sample_depends_on_its_seed_alone(finished, capfdbinary):
    run, corpus, _ = finished

    def text(*options):
        sample.program(["sample", str(run), "--prompt=abc", "--num_tokens=40", *options])
        return capfdbinary.readouterr().out

    one = text("--seed=1", "--temperature=1.0")
    assert one.startswith(b"abc") and len(one) == len(b"abc") + 40 + len(b"\n")
    assert set(one.strip()) <= set(small_runs.ALPHABET)
    assert text("--seed=1", "--temperature=1.0") == one
    assert text("--seed=2", "--temperature=1.0") != one
    assert text("--seed=1", "--temperature=0") == text("--seed=2", "--temperature=0")


def test_a_run_that_was_moved_is_sampled_without_its_data(finished, tmp_path, capfdbinary):
    run, corpus, _ = finished
    options = ["--prompt=abc", "--num_tokens=20"]
    sample.program(["sample", str(run), *options])
    expected = capfdbinary.readouterr().out
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    config = json.loads((moved / "config.json").read_text(encoding="utf-8"))
    config["data"]["path"] = "gone"
    config["evaluation"]["batch_size"] = 12  # no multiple of the devices
    (moved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sample.program(["sample", str(moved), *options])
    assert capfdbinary.readouterr().out == expected

    with pytest.raises(UserError, match="gone does not exist: .*has moved, say --data_path"):
        evaluate.program(["evaluate", str(moved)])
    evaluate.program(["evaluate", str(moved), f"--data_path={corpus.folder}"])
    assert b"BPC on" in capfdbinary.readouterr().out

    (moved / "vocabulary.json").write_text('{"unit": "bytes", "values": "6162"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"vocabulary\.json holds 2 tokens, .* has 12; restore it"):
        sample.program(["sample", str(moved), *options])
    (moved / "vocabulary.json").unlink()  # a run of an earlier version
    with pytest.raises(UserError, match="gone does not exist: .*has moved, say --data_path"):
        sample.program(["sample", str(moved), *options])
    capfdbinary.readouterr()
    sample.program(["sample", str(moved), *options, f"--data_path={corpus.folder}"])
    assert capfdbinary.readouterr().out == expected


def test_an_interrupted_sample_ends_with_the_status_of_an_interruption(finished, monkeypatch):
    monkeypatch.setattr(interruptions, "came", True)
    with pytest.raises(KeyboardInterrupt):
        sample.program(["sample", str(finished[0]), "--prompt=abc", "--num_tokens=3"])


def test_a_sample_ends_with_the_text_that_stops_it(finished, capfdbinary):
    run, *_ = finished

    def text(*options):
        arguments = ["--prompt=abc", "--num_tokens=40", "--seed=1", "--temperature=1.0"]
        sample.program(["sample", str(run), *arguments, *options])
        return capfdbinary.readouterr().out.strip()

    whole = text()
    stop = whole[20:22]
    end = whole.index(stop, len(b"abc")) + len(stop)
    assert text(f"--stop={stop.decode()}", "--stop=abcdefghijkl") == whole[:end]


def test_a_sample_says_that_a_prompt_is_longer_than_the_context(finished, capfd):
    run, *_ = finished
    prompt = "abcdefgh" * 2
    sample.program(["sample", str(run), f"--prompt={prompt}", "--num_tokens=3"])
    printed = capfd.readouterr()
    assert printed.err == "note: the prompt has 16 bytes; the model sees the last 8 (context 16)\n"
    assert printed.out.startswith(prompt) and len(printed.out) == len(prompt) + 3 + 1


def test_a_terminal_is_written_to_as_characters_come():
    """A real pseudo-terminal, read after each chunk: whole characters only, nothing that acts."""
    steps = [
        (b"caf\xc3", "caf"),
        (b"\xa9 \xe2\x82", "\u00e9 "),
        (b"\xac\r\n", "\u20ac\r\n"),  # the terminal itself writes \n as \r\n
        (b"\x1b[31m\t\xff", "\ufffd[31m\t\ufffd"),
        (b"\xe2\x82", None),
    ]
    ours, theirs = os.openpty()

    def chunks():
        for chunk, expected in steps:
            yield chunk
            if expected is not None:
                assert os.read(ours, 100).decode() == expected

    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        sample.write_as_it_comes(chunks(), terminal)
        assert os.read(ours, 100).decode() == "\ufffd\r\n"
    os.close(ours)


def test_a_pipe_gets_the_very_bytes_at_once():
    ours, theirs = os.pipe()

    def chunks():
        for chunk in (b"a\xc3", b"\xa9\x1b\r\n", b"\xff"):
            yield chunk
            assert os.read(ours, 100) == chunk
        raise KeyboardInterrupt  # what Ctrl-C does in the middle of a text

    with os.fdopen(theirs, "w", encoding="utf-8") as pipe:
        sample.write_as_it_comes(chunks(), pipe)
    assert os.read(ours, 100) == b"\n"
    os.close(ours)


def test_a_reader_may_go_away():
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w", encoding="utf-8") as pipe:
        sample.write_as_it_comes(iter([b"a", b"b"]), pipe)
        pipe.write("what is left goes nowhere")
