"""Paths that users write, where results go, and standard streams that fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import tiny_experiment

from train.data.corpus import default_cache
from train.errors import UserError
from train.files import (
    check_json_output,
    check_output,
    default_output,
    new_folder,
    user_path,
    write_atomically,
    write_result,
)
from train.run import create_or_resume

ROOT = Path(__file__).resolve().parent.parent


def test_a_path_has_its_home_folder_and_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("--x", "~/a/b") == tmp_path / "a" / "b"
    (tmp_path / "file").touch()
    assert user_path("--x", "~/file/below") == tmp_path / "file" / "below"
    assert check_json_output(Path("~/found.json")) == tmp_path / "found.json"


def test_a_file_is_utf_8_in_the_c_locale(tmp_path):
    code = "from train.files import *; write_atomically(Path('x'), 'a \\xb1 b')"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=plain, check=True)
    assert (tmp_path / "x").read_bytes() == "a ± b".encode()


@pytest.mark.parametrize("bucket", ["gs://bucket/a", "s3://bucket/a"])
def test_a_bucket_is_no_folder_of_that_name_here(bucket, monkeypatch):
    monkeypatch.setenv("FSN_JAX_CACHE", bucket)
    with pytest.raises(UserError, match=f"FSN_JAX_CACHE={bucket} is not on this machine"):
        default_cache()
    with pytest.raises(UserError, match=f"--output={bucket}.json is not on this machine"):
        check_json_output(f"{bucket}.json")


def test_what_a_result_cannot_be_written_for_is_one_line(tmp_path):
    """Also where the folder could be written when the work began."""

    def draw(picture):
        raise OSError(28, "No space left on device")

    output = check_output(tmp_path / "new" / "x.json", ".json")
    assert [*output.parent.iterdir()] == []
    with pytest.raises(UserError, match=r"x\.json cannot be written \(No space left on device\)"):
        write_result(output, {}, "", draw)


def test_a_path_that_may_not_be_looked_at_is_named(monkeypatch):
    def stat(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(UserError, match=r"--x=a cannot be reached \(Permission denied\)"):
        user_path("--x", "a")


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path, monkeypatch):
    stat = os.stat

    def denied(path, **options):
        if os.fspath(path).startswith(f"{tmp_path}/"):
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(UserError, match=r"--x=.* cannot be reached \(Permission denied\)"):
        user_path("--x", tmp_path)


def test_a_run_folder_whose_path_is_not_utf_8_is_refused(corpus, tmp_path):
    experiment = tiny_experiment(corpus.folder, tmp_path / "caf\udce9")
    with pytest.raises(UserError, match=r"is not UTF-8; choose another with --config\.run_dir"):
        create_or_resume(experiment, corpus)
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_folder_the_variables_are_named(monkeypatch, tmp_path):
    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FSN_JAX_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(UserError, match="set HOME, or FSN_JAX_CACHE to a folder"):
        default_cache()
    with pytest.raises(UserError, match="--x=~/a: the home folder of ~ is not known"):
        user_path("--x", "~/a")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become a user that is not known")
@pytest.mark.parametrize("arguments", [["prepare", "--help"], ["--help"]])
def test_a_user_that_is_not_known_gets_help(arguments):
    becoming = (
        "import os, sys; os.setuid(987654); from train.__main__ import program;"
        "sys.argv[0] = 'train'; program(sys.argv)"
    )
    # All is imported as root, since the files may be another's.
    imports = "import train.data.prepare, train.__main__;"
    done = subprocess.run(
        [sys.executable, "-c", imports + becoming, *arguments],
        env={k: v for k, v in os.environ.items() if k not in ("HOME", "FSN_JAX_CACHE")}
        | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("run", ["~no_such_user/run", "r" * 300])
def test_a_run_that_can_be_no_path_is_named_where_a_result_would_go(run):
    with pytest.raises(UserError, match="the run=[~r]"):
        default_output([run], "comparison.json")


def test_a_result_goes_to_the_runs_it_is_of(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "record").mkdir()
    one, other, record = (str(tmp_path / name) for name in ("one", "other", "record"))
    assert default_output([one], "x.json") == tmp_path / "one" / "x.json"
    assert default_output([one, other], "x.json") == tmp_path / "x.json"
    assert default_output([one, record], "x.json") == Path("runs/x.json")
    assert default_output(["gs://bucket/one"], "x.json") == Path("runs/x.json")


PROGRAM = """
import os, sys
from train import streams
streams.mend()
from train.program import run_program

def program(argv):
    print("caf\\u00e9 \\u00b7", flush=True)
    print("\\u00b7", file=sys.stderr, flush=True)
    made = os.open("made", os.O_CREAT | os.O_WRONLY)
    os.write(made, b"mine")
    assert made > 2, made

sys.exit(run_program(program, []))
"""


def streamed(tmp_path, redirect, **environment):
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=60,
    )
    assert (tmp_path / "made").read_bytes() == b"mine"  # the work itself was done
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("encoding", "out", "err"),
    [
        ("ascii", b"caf? ?\n", b"\\xb7\n"),
        ("latin-1", b"caf\xe9 \xb7\n", b"\xb7\n"),
        ("utf-8", "café ·\n".encode(), "·\n".encode()),
    ],
)
def test_what_an_encoding_cannot_show_is_replaced(tmp_path, encoding, out, err):
    assert streamed(tmp_path, "", PYTHONIOENCODING=encoding) == (0, out, err)


def test_a_locale_without_utf_8_is_enough(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert streamed(tmp_path, "", **plain)[:2] == (0, b"caf? ?\n")


def test_a_full_disk_under_the_output_is_reported_after_the_work(tmp_path):
    status, _, err = streamed(tmp_path, ">/dev/full", PYTHONIOENCODING="utf-8")
    said = "error: what was printed is lost (No space left on device); the work itself is done\n"
    assert (status, err.decode()) == (2, "·\n" + said)
    assert streamed(tmp_path, "2>/dev/full")[0] == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_costs_nothing(tmp_path, closed):
    """Nor does the file that is opened next take its place."""
    assert streamed(tmp_path, closed)[0] == 0


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "new") as made:
        (made / "part").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "new"):
        pass
    (tmp_path / "other").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    write_atomically(file, "before")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(os, "replace", lambda *_: 1 // 0)
        patch.setattr(Path, "replace", lambda *_: 1 // 0)
        write_atomically(file, "after")
    assert file.read_text(encoding="utf-8") == "before"


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a loss of power could leave an empty file in place of the old one."""
    synced = []

    def fsync(number: int) -> None:
        synced.append((os.fstat(number).st_size, file.exists()))

    file = tmp_path / "x.json"
    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(file, "whole")
    assert synced == [(len("whole"), False)]
    assert file.read_text(encoding="utf-8") == "whole"
