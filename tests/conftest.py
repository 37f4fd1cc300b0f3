"""Strict surroundings for every test: eight CPU devices, no silent broadcasting.

Warnings are errors and shapes are checked at run time, both set in pyproject.toml.
"""

import functools
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Time and chance fail no test; the slow ones draw anew each time.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")

if TYPE_CHECKING:
    from train.data.corpus import Corpus


QUICK_CODE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""XLA's older code generator for CPUs, in JAX 0.10 the last time, and each program in one piece.
Small programs compile in less than half of the time. Two programs that agree to the bit need not
with this one: their tests are slow ones, which do without it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-pages",
        action="store_true",
        help="write the pages under docs/ that tests make, instead of comparing them",
    )
    parser.addoption(
        "--first-cases",
        action="store_true",
        help="of each parametrized test run the first case alone",
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
        if "not slow" in marks:
            os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
            if jax.__version_info__[:2] == (0, 10):
                flags = os.environ.get("XLA_FLAGS", "").replace(QUICK_CODE, "")
                os.environ["XLA_FLAGS"] = f"{flags} {QUICK_CODE}".strip()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    gc.set_threshold(50_000)  # tracing makes many small objects, and few of them are garbage


@pytest.hookimpl(trylast=True)  # of the cases that -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the first case of each test with ``--first-cases``."""
    if not config.getoption("--first-cases"):
        return
    first: dict[str, pytest.Item] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    config.hook.pytest_deselected(items=[x for x in items if x not in set(first.values())])
    items[:] = first.values()


@pytest.fixture(scope="session", autouse=True)
def quick_compiles(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiles each program of the session once, and on a CPU with less effort on the same HLO.

    Most of the time of the tests is tracing and compilation.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    settings = {
        "jax_disable_most_optimizations": jax.default_backend() == "cpu",
        "jax_compilation_cache_dir": str(shared / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session", autouse=True)
def quick_traces() -> Iterator[None]:
    """Traces the programs of a run once for all runs of one model, optimizer and mesh."""
    with pytest.MonkeyPatch.context() as patch:
        if "small_runs" in sys.modules:  # tests that train have imported it
            import small_runs

            for module, name in small_runs.MAKERS:
                patch.setattr(module, name, functools.cache(getattr(module, name)))
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
    experiment = small_runs.tiny_experiment(corpus.folder, folder)
    outcome = small_runs.run_to_the_end(experiment, corpus)
    return folder, jax.device_get(outcome.state)


@pytest.fixture(scope="session")
def finished_arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs by name: an FSN of two seeds and a transformer, on one corpus."""
    import small_runs

    base = tmp_path_factory.mktemp("arms")
    return small_runs.finish_arms(base)
