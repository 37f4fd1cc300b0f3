"""The runner of a file of arms: what is planned, skipped, resumed, reported and fitted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import small_runs

from train import finish, ladder
from train import main as train_main
from train.analysis.records import read_run
from train.errors import TryAgain, UserError
from train.metrics import read_rows
from train.program import num_cores, run_program

ROOT = Path(__file__).resolve().parent.parent
FILE = """
import sys
sys.path.insert(0, {tests!r})
import small_runs
from pathlib import Path

MODELS = {{"fsn": small_runs.TINY_FSN, "transformer": small_runs.TINY_TRANSFORMER}}
ARMS = ("fsn", "transformer")

def get_config(arm="fsn"):
    config = small_runs.tiny_config(Path({corpus!r}), "", MODELS[arm])
    config.name = "tiny_" + arm
    return config
"""

two_cores = pytest.mark.skipif(num_cores() < 2, reason="one core has no two shares")


@pytest.fixture
def arms(tmp_path, monkeypatch):
    """A file of two tiny arms, in a folder where runs/ will be."""
    corpus = small_runs.write_corpus(tmp_path / "corpus")
    file = tmp_path / "arms.py"
    file.write_text(
        FILE.format(tests=str(ROOT / "tests"), corpus=str(corpus.folder)), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    return file


@pytest.mark.parametrize("seeds", [[0, 1], [1]])
def test_a_seed_for_one_run_is_refused(arms, seeds):
    with pytest.raises(UserError, match=r"--config.seed=3 is for one run; write --seeds"):
        ladder.plan(str(arms), [], seeds, ["--config.seed=3"])


@pytest.fixture
def in_process(monkeypatch):
    """Trains in this process, without drawing a sample; counts the runs."""
    trained = []

    def train(job, share, log):
        assert share == ladder.Share() and log is None
        trained.append(job.name)
        return run_program(train_main.program, ["train", *job.arguments])

    monkeypatch.setattr(ladder, "train_one", train)
    monkeypatch.setattr(finish, "_sample", lambda *_: b"a sample")
    return trained


def test_a_failed_arm_is_reported_the_rest_run_on_and_a_finished_one_is_skipped(
    arms, in_process, capsys
):
    command = ["ladder", f"--config={arms}", "--output=out.json"]
    # Where the transformer's run folder should be there is a file.
    Path("runs").mkdir()
    Path("runs/tiny_fsn").write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match=r"1 of 2 runs failed: tiny_fsn \(exit status 2\)"):
        ladder.program(command)
    assert in_process == ["tiny_fsn", "tiny_transformer"]
    partial = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert [row["arm"] for row in partial["arms"]] == ["tiny_transformer"]
    assert partial["failed"] == {"tiny_fsn": "exit status 2"}

    # Or a folder of which it cannot be said whether the run has finished.
    Path("runs/tiny_fsn").unlink()
    Path("runs/tiny_fsn").mkdir()
    for name in ("config.json", "summary.json"):
        Path("runs/tiny_fsn", name).write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"1 of 2 runs failed: tiny_fsn \(.*config\.json"):
        ladder.program(command)
    shutil.rmtree("runs/tiny_fsn")
    in_process.clear()
    ladder.program(command)
    assert in_process == ["tiny_fsn"]
    assert "tiny_transformer: finished before" in capsys.readouterr().out
    found = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert [row["architecture"] for row in found["arms"]] == ["fsn", "transformer"]
    for row in found["arms"]:
        summary = read_run(f"runs/{row['arm']}").summary
        assert row["bpc"] == summary["validation"]["bpc"]
        assert row["training_flops"] == summary["training_flops"]
    assert found["failed"] == {}
    assert Path("out.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("status", "error"),
    [(75, TryAgain), (-15, TryAgain), (130, KeyboardInterrupt), (-2, KeyboardInterrupt)],
)
def test_a_stopped_run_stops_the_ladder(arms, monkeypatch, status, error):
    """Not a failure of the arm: the others must not begin on a machine that is wanted back."""
    begun = []
    monkeypatch.setattr(ladder, "train_one", lambda job, *_: begun.append(job.name) or status)
    with pytest.raises(error):
        ladder.program(["ladder", f"--config={arms}", "--output=out.json"])
    assert begun == ["tiny_fsn"]


def test_the_plan_states_sizes_and_budgets_and_trains_nothing(arms, in_process, capsys):
    ladder.program(["ladder", f"--config={arms}", "--plan", "--seeds=0,3", "--arms=fsn"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "tiny_fsn", "tiny_fsn_seed3"]
    parameters, steps, characters, flops = lines[1].split()[1:]
    model = small_runs.TINY_FSN
    assert parameters == f"{model.num_params():,}" and steps == "30"
    seen = 30 * small_runs.BATCH * small_runs.CONTEXT
    assert characters == f"{seen:,}"
    assert float(flops) == pytest.approx(seen * model.flops_per_token(small_runs.CONTEXT), rel=0.01)
    assert in_process == [] and not Path("runs").exists()


def test_the_plan_has_sizes_that_are_matched_where_the_corpus_decides_them(capsys):
    config = f"--config={ROOT / 'configs' / 'text.py'}"
    ladder.program(["ladder", config, "--plan", "--config.data.path=a.txt"])
    lines = capsys.readouterr().out.splitlines()[1:]
    sizes = {
        line.split()[0].rpartition("_")[2]: int(line.split()[1].replace(",", "")) for line in lines
    }
    assert len(sizes) >= 2
    assert max(sizes.values()) == pytest.approx(min(sizes.values()), rel=0.006)


def test_seeds_and_settings_reach_every_arm(arms):
    jobs = ladder.plan(str(arms), [], [0, 2], ["--config.training.num_steps=10"])
    assert [job.name for job in jobs] == [
        "tiny_fsn", "tiny_fsn_seed2", "tiny_transformer", "tiny_transformer_seed2",
    ]  # fmt: skip
    assert [job.experiment.seed for job in jobs] == [0, 2, 0, 2]
    assert {job.experiment.training.num_steps for job in jobs} == {10}


def test_seed_0_is_one_that_was_asked_for(arms):
    arms.write_text(
        arms.read_text(encoding="utf-8").replace("return config", "config.seed = 1; return config"),
        encoding="utf-8",
    )
    jobs = ladder.plan(str(arms), ["fsn"], [0, 1], [])
    assert [(job.name, job.experiment.seed) for job in jobs] == [
        ("tiny_fsn", 0),
        ("tiny_fsn_seed1", 1),
    ]


def test_an_end_without_a_summary_is_a_failure(arms, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "train_one", lambda *_: 0)
    failed = ladder.run_all(ladder.plan(str(arms), ["fsn"], [0], []))
    assert failed == {"tiny_fsn": "it ended without a summary of these settings"}


def test_arms_of_two_corpora_are_not_one_ladder(in_process, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["ladder", f"--config={ROOT / 'configs' / 'long.py'}", "--seeds=1"]
    ladder.program([*command, "--plan"])
    with pytest.raises(UserError, match="enwik8_.* and pycode_.* are of different data.*--arms"):
        ladder.program(command)
    assert in_process == []


def test_each_run_side_by_side_has_its_own_log(arms, monkeypatch):
    logs = []
    monkeypatch.setattr(ladder, "train_one", lambda job, share, log: logs.append(log) or 1)
    monkeypatch.setattr(
        ladder, "shares_of_machine", lambda at_once: [ladder.Share("0"), ladder.Share("1")]
    )
    ladder.run_all(ladder.plan(str(arms), ["fsn"], [1, 2], ["--config.name=lr_0.01"]), 2)
    assert sorted(map(str, logs)) == ["runs/lr_0.01_seed1.log", "runs/lr_0.01_seed2.log"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--arms=nobody", "--arms must be among fsn, transformer"),
        ("--seeds=one", "--seeds must be whole numbers"),
        ("--seeds=²", "--seeds must be whole numbers"),
        ("--output=table.csv", "must be a file whose name ends in .json"),
        ("--config.nobody=1", "there is no setting --config.nobody"),
        ("--nobody", "there is no setting --nobody"),
        ("--at_once=0", "--at_once must be from 1 to the"),
        ("--at_once=1000", "--at_once must be from 1 to the"),
        ("--config=nobody.py", "there is no file nobody.py"),
        ("--config=a.py:fsn", "names an arm; write --config=a.py --arms=fsn"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(arms, in_process, option, message):
    with pytest.raises(UserError, match=message):
        ladder.program(["ladder", f"--config={arms}", option])
    assert in_process == []


@pytest.mark.parametrize(
    "options", [["--seeds=1,1"], ["--config.run_dir=one"], ["--config.name=one"]]
)
def test_two_runs_of_one_folder_are_refused_before_anything_is_trained(arms, in_process, options):
    with pytest.raises(UserError, match=r"would both be the run (one|runs/\w+); name each arm"):
        ladder.program(["ladder", f"--config={arms}", *options])
    assert in_process == []


def test_a_vocabulary_taken_from_the_corpus_is_finished_too(arms, in_process):
    command = ["ladder", f"--config={arms}", "--arms=fsn", "--config.model.vocab_size=0"]
    for _ in range(2):
        ladder.program([*command, "--output=made/out.json"])
    assert in_process == ["tiny_fsn"]
    assert [
        row["arm"] for row in json.loads(Path("made/out.json").read_text(encoding="utf-8"))["arms"]
    ] == ["tiny_fsn"]


def test_a_matched_size_is_finished_and_planned_as_it_is_trained(arms, in_process, capsys):
    """Also where the vocabulary is named, so that the corpus does not decide it."""
    config = f"--config={ROOT / 'configs' / 'text.py'}"
    small = ["--config.data.path=a.txt", "--config.training.num_steps=10"]
    Path("a.txt").write_text("abcdefgh" * 5000, encoding="utf-8")
    (job,) = ladder.plan(config[9:], ["transformer"], [0], [*small, "--config.model.vocab_size=8"])
    trained = job.experiment.with_vocabulary(8)
    assert trained.model != job.experiment.model
    assert f" {trained.model.num_params():,} " in ladder.plan_text([job])
    folder = Path("runs") / job.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(trained.to_dict()), encoding="utf-8")
    (folder / "summary.json").touch()
    assert ladder.is_finished(job)


def test_runs_side_by_side_divide_the_gpus(tmp_path, monkeypatch):
    """As ``nvidia-smi`` lists them, or the part of them that this process may see."""
    found = tmp_path / "nvidia-smi"
    found.write_text("#!/bin/sh\nseq 0 7\n", encoding="utf-8")
    found.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    installed = {"jax_cuda13_plugin"}
    monkeypatch.setattr(ladder, "find_spec", lambda name: name in installed)
    assert ladder.shares_of_machine(1) == [ladder.Share()]
    assert [share.gpus for share in ladder.shares_of_machine(8)] == list("01234567")
    assert [share.gpus for share in ladder.shares_of_machine(3)] == ["0,1", "2,3", "4,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert ladder.shares_of_machine(2) == [ladder.Share(gpus="5"), ladder.Share(gpus="7")]
    with pytest.raises(UserError, match=r"from 1 to the 2 GPUs \(JAX_PLATFORMS=cpu.* here; got 3"):
        ladder.shares_of_machine(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert ladder.visible_gpus() == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(UserError, match="cores here; got 1000"):
        ladder.shares_of_machine(1000)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("JAX_PLATFORMS")
    installed.clear()  # a CPU's JAX beside GPUs
    assert ladder.visible_gpus() == []
    installed.add("jax_cuda12_plugin")
    assert len(ladder.visible_gpus()) == 8
    found.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    assert ladder.visible_gpus() == []
    installed.add("libtpu")
    with pytest.raises(UserError, match="--at_once must be 1 on a TPU"):
        ladder.shares_of_machine(2)


def test_a_run_sees_the_gpus_of_its_share_alone(arms, tmp_path, monkeypatch):
    (job,) = ladder.plan(str(arms), ["fsn"], [0], [])
    seen = tmp_path / "seen"
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" > {seen}\n', encoding="utf-8")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    assert ladder.train_one(job, ladder.Share(gpus="2,3"), None) == 0
    assert seen.read_text(encoding="utf-8") == "2,3\n"


def test_a_file_without_arms_is_a_mistake(tmp_path):
    file = tmp_path / "none.py"
    file.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="has no ARMS"):
        ladder.plan(str(file), [], [0], [])
    file.write_text("import sys; sys.exit(3)", encoding="utf-8")
    with pytest.raises(UserError, match="none.py: SystemExit: 3"):
        ladder.plan(str(file), [], [0], [])


MEETS_ANOTHER = """#!{python}
import os, pathlib, sys, time
arm = sys.argv[3].rpartition(":")[2]
pathlib.Path(arm + ".cores").write_text(" ".join(map(str, os.sched_getaffinity(0))))
end = time.monotonic() + 60
while len(list(pathlib.Path().glob("*.cores"))) < 2:
    if time.monotonic() > end:
        sys.exit("alone")
    time.sleep(0.01)
print("trained", arm)
"""


@two_cores
def test_runs_side_by_side_have_cores_of_their_own(arms, monkeypatch):
    """Each of two stand-ins for a training ends only when it has seen the other begin."""
    program = Path("stand_in").absolute()
    monkeypatch.setattr(ladder, "is_finished", lambda job: Path(f"runs/{job.name}.log").exists())
    program.write_text(MEETS_ANOTHER.format(python=sys.executable), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = os.sched_getaffinity(0)
    assert ladder.run_all(ladder.plan(str(arms), [], [0], []), 2) == {}
    assert os.sched_getaffinity(0) == before
    one, other = (
        set(Path(f"{arm}.cores").read_text(encoding="utf-8").split())
        for arm in ("fsn", "transformer")
    )
    assert one and other and not one & other
    for arm in ("fsn", "transformer"):
        assert Path(f"runs/tiny_{arm}.log").read_text(encoding="utf-8") == f"trained {arm}\n"


@two_cores
def test_the_reason_of_a_failure_is_in_its_line(arms, monkeypatch, capsys):
    program = Path("stand_in").absolute()
    program.write_text(
        "#!/bin/sh\necho 'some words\nerror: the folder is in use' >&2\nexit 2\n", encoding="utf-8"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    why = "exit status 2: the folder is in use"
    failed = ladder.run_all(ladder.plan(str(arms), ["fsn"], [0], []), 2)
    assert failed == {"tiny_fsn": why}
    assert f"tiny_fsn: failed ({why}); going on" in capsys.readouterr().out
    assert ladder.reason_of(-9, Path("runs/tiny_fsn.log")) == "signal 9"
    assert ladder.reason_of(2, None) == "exit status 2"


def test_a_run_ends_with_the_ladder_that_began_it():
    """A process begun as the ladder begins runs, which end by SIGTERM: they save before that."""
    child = (
        "import time; from train.preemption import end_with_stdin;"
        "end_with_stdin(); print('begun', flush=True); time.sleep(60)"
    )
    ladder_program = (
        "import subprocess, sys, time;"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", ladder_program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().strip().isdecimal()
        assert process.stdout.readline() == "begun\n"
        process.kill()
        assert process.stdout.read() == ""  # the child has closed it as well


def test_the_ladder_tells_its_runs_to_end_with_it(arms, monkeypatch):
    program = Path("stand_in").absolute()
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--end_with_stdin) read word;; esac\nexit 7\n', encoding="utf-8"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (job, *_) = ladder.plan(str(arms), ["fsn"], [0], [])
    readable, writable = os.pipe()
    monkeypatch.setattr(ladder, "_lifeline", lambda: readable)
    with ThreadPoolExecutor() as pool:
        status = pool.submit(ladder.train_one, job, ladder.Share(), None)
        with pytest.raises(TimeoutError):
            status.result(timeout=0.3)
        os.close(writable)
        assert status.result(timeout=20) == 7
    os.close(readable)


@pytest.mark.slow
def test_a_killed_ladder_goes_on_where_it_stopped(arms):
    """Real processes: killed in its first arm, run again, both arms end with every row."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "train", "ladder", f"--config={arms}", "--output=out.json"]
    steps = ["--config.training.num_steps=2000"]
    with subprocess.Popen(
        command + steps, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 200
        while not list(Path("runs").glob("tiny_fsn/checkpoints/[0-9]*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert not Path("runs/tiny_fsn/summary.json").exists()
    subprocess.run(command + steps, env=environment, check=True, capture_output=True)
    for arm in ("fsn", "transformer"):
        run = read_run(f"runs/tiny_{arm}")
        assert len(run.losses["validation"]) == 200
        assert run.summary["steps"] == 2000
    assert len(read_run("runs/tiny_fsn").provenance) == 2
    assert len(read_rows(Path("runs/tiny_transformer/metrics.jsonl"))) == 400
