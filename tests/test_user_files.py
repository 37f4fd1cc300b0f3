"""What a user's path may name: which files are taken, which are passed over, which are refused."""

import gzip
import os
import random
from pathlib import Path

import pytest

from train.data import user_files
from train.data.prepare import open_corpus
from train.data.user_files import find_files, not_text
from train.errors import UserError

TEXT = b"Some words, a line end\n" * 3000
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(1000)
NOISE = random.Random(0).randbytes(70_000)


@pytest.fixture
def own(tmp_path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.txt").write_bytes(TEXT)
    return folder


def found(path: Path | str) -> tuple[list[str], list[str]]:
    """The names of the files taken, and the lines reported."""
    lines: list[str] = []
    return [file.name for file in find_files(str(path), report=lines.append)], lines


def test_a_folder_gives_its_texts_and_tells_what_it_passes_over(own):
    (own / "pic.png").write_bytes(PICTURE)
    (own / "noise").write_bytes(NOISE)
    (own / "wide.txt").write_bytes(TEXT.decode().encode("utf-16"))
    (own / "z.gz").write_bytes(gzip.compress(TEXT[:100]))
    (own / ".git").mkdir()
    os.mkfifo(own / "pipe")
    assert found(own) == (
        ["a.txt", "z.gz"],
        [
            "passed over, as their names begin with a dot: .git",
            "passed over, as they hold no text: noise (binary data), pic.png (a picture), pipe (a "
            "pipe, socket or device), wide.txt (UTF-16, to be converted to UTF-8)",
        ],
    )


@pytest.mark.parametrize("manifest", ['{"manifest_version": 3}', "[]"])
def test_a_folder_of_texts_may_have_a_manifest_of_its_own(own, tmp_path, manifest):
    (own / "manifest.json").write_text(manifest, encoding="utf-8")
    corpus = open_corpus(name="text", path=str(own), cache_dir=str(tmp_path / "cache"))
    assert corpus.folder.parent == tmp_path / "cache"


def test_a_folder_of_nothing_else_is_refused(own):
    (own / "a.txt").write_bytes(PICTURE)
    with pytest.raises(UserError, match="own is a folder with no file of text in it"):
        find_files(str(own))


def test_a_pattern_passes_over_what_holds_no_text(own):
    (own / "pic.png").write_bytes(PICTURE)
    names, lines = found(own / "*")
    assert names == ["a.txt"]
    assert lines == ["passed over, as they hold no text: pic.png (a picture)"]


def test_a_file_that_is_named_is_taken_with_a_warning(own):
    (own / "all.zip").write_bytes(b"PK\x03\x04" + NOISE)
    names, (lines,) = found(own / "all.zip")
    assert names == ["all.zip"]
    assert lines.startswith("warning: ") and "looks like a zip archive, not text" in lines
    assert found(own / "a.txt") == (["a.txt"], [])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"one\0two words\0" + TEXT,
        "Ilyén öt tükörfúrógép\n".encode("latin-1") * 50,
        "Привет, мир\n".encode("koi8-r") * 50,
        "文字の列\n".encode("euc-jp") * 50,
        b"\x1b[31mred\x1b[0m\r\n" * 50,
    ],
    ids=["empty", "separators", "latin_1", "koi8", "euc_jp", "colours"],
)
def test_text_of_any_encoding_in_bytes_is_text(tmp_path, text):
    (tmp_path / "file").write_bytes(text)
    assert not_text(tmp_path / "file") == ""


def denied(folder: Path, scandir=os.scandir):
    """``os.scandir`` for one who may not read a folder; root may read them all."""

    def listed(path="."):
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    return listed


def test_a_folder_that_cannot_be_read_is_refused_by_name(own, monkeypatch):
    (own / "locked").mkdir()
    (own / "locked" / "b.txt").write_bytes(TEXT)
    assert found(own)[0] == ["a.txt", "locked/b.txt"]
    monkeypatch.setattr(os, "scandir", denied(own / "locked"))
    with pytest.raises(UserError, match=r"cannot read .*/own/locked \(Permission denied\)"):
        find_files(str(own))


def test_a_disk_that_fails_in_reading_is_reported_with_the_path(own, monkeypatch):
    """Such an error has no file name."""

    def failing(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(user_files, "file_sha256", failing)
    with pytest.raises(UserError, match=r"cannot read .*/own \(Input/output error\)"):
        find_files(str(own))


def test_a_pattern_below_a_folder_that_cannot_be_read_is_refused(own, monkeypatch):
    (own / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    assert found(own / "*.txt")[0] == ["a.txt"]
    for pattern in ("*/b.txt", "**/*.txt"):
        with pytest.raises(UserError, match=r"cannot read .*/own/locked/ \(Permission denied\)"):
            find_files(str(own / pattern))


def test_a_link_to_a_folder_outside_is_refused_and_one_inside_is_not_followed(own, tmp_path):
    (own / "sub").mkdir()
    (own / "sub" / "b.txt").write_bytes(TEXT)
    (own / "again").symlink_to("sub")
    assert found(own)[0] == ["a.txt", "sub/b.txt"]
    (own / "again").unlink()
    (tmp_path / "outside").mkdir()
    (own / "again").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="holds again, a link to .*/outside outside it: remove it"):
        find_files(str(own))


def test_a_link_that_leads_nowhere_is_refused(own):
    (own / "gone").symlink_to("nowhere")
    with pytest.raises(UserError, match="holds gone, a link to .*/nowhere that is not there"):
        find_files(str(own))


def test_a_pipe_is_refused(own):
    os.mkfifo(own / "pipe")
    with pytest.raises(UserError, match="is a pipe or device, which cannot be read twice"):
        find_files(str(own / "pipe"))


def test_a_name_that_is_no_utf_8_is_taken(own, tmp_path):
    (Path(os.fsdecode(os.fsencode(own) + b"/caf\xe9.txt"))).write_bytes(b"other " * 9000)
    corpus = open_corpus(
        name="text", path=str(own), cache_dir=str(tmp_path / "cache"), progress=[].append
    )
    assert sum(info.num_bytes for info in corpus.splits.values()) == len(TEXT) + 54_000 + 2


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("x" * 300, r"config\.data\.path=x{80}\.\.\. cannot be reached \(File name too long\)"),
        ("To be, or not to be.\n" * 90, r"cannot be reached \(File name too long\)"),
        ("~nosuchuser/x", "the home folder of ~nosuchuser is not known"),
        ("a\0b", r"cannot be reached \(.*embedded null"),
    ],
    ids=["long", "pasted", "home", "null"],
)
def test_what_cannot_be_a_path_is_refused(tmp_path, path, said):
    with pytest.raises(UserError, match=said):
        open_corpus(name="text", path=path, cache_dir=str(tmp_path))


@pytest.mark.parametrize("when", ["preparing", "files"])  # before and after they are hashed
def test_files_that_change_while_they_are_read_are_not_kept_under_another_name(own, tmp_path, when):
    """The cache names a corpus by its files as they were found first."""
    cache = tmp_path / "cache"

    def written_to(line):
        if line.startswith(when):
            (own / "later.txt").write_text("more of it\n" * 500, encoding="utf-8")

    with pytest.raises(UserError, match="changed while they were read; run it again"):
        open_corpus(name="text", path=str(own), cache_dir=str(cache), progress=written_to)
    assert not list(cache.iterdir())
    assert open_corpus(name="text", path=str(own), cache_dir=str(cache)).folder.parent == cache
