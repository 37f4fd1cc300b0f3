"""Strict surroundings for every test: eight CPU devices, no silent broadcasting.

Warnings are errors and shapes are checked at run time, both set in pyproject.toml.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

if TYPE_CHECKING:
    from train.data.corpus import Corpus


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-pages",
        action="store_true",
        help="write the pages under docs/ that tests make, instead of comparing them",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Settles JAX's platform and Ctrl-C before any test module is imported."""
    # Ignored in a shell's background jobs, and so in the processes that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    marks = config.getoption("markexpr", default="")
    if "gpu" not in marks or "not gpu" in marks:
        # In the environment too, so that the programs a test starts stay on the CPU; the number
        # of devices is not, so that they see one device, as a user's would.
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")


@contextlib.contextmanager
def _quick_compiles(cache: Path) -> Iterator[None]:
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def quick_compiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles with less effort, and each program of the session once.

    For tests of what is around a model, where compiling is nearly all of the time.
    """
    with _quick_compiles(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> "Corpus":
    """A prepared corpus of some thousand characters; nobody may change its files."""
    import small_runs

    return small_runs.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="session")
def whole(corpus: "Corpus", tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder and the state of a tiny run that nothing interrupted."""
    import small_runs

    folder = tmp_path_factory.mktemp("whole") / "run"
    with _quick_compiles(tmp_path_factory.getbasetemp() / "compiled"):
        experiment = small_runs.tiny_experiment(corpus.folder, folder)
        outcome = small_runs.run_to_the_end(experiment, corpus)
    return folder, jax.device_get(outcome.state)


@pytest.fixture(scope="session")
def finished_arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs by name: an FSN of two seeds and a transformer, on one corpus."""
    import small_runs

    base = tmp_path_factory.mktemp("arms")
    with _quick_compiles(tmp_path_factory.getbasetemp() / "compiled"):
        return small_runs.finish_arms(base)
