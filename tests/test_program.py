"""What every program does around its work: errors, interruption, finding the devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from train import processes
from train.errors import UserError
from train.interruption import interruptions
from train.program import run_program, start_jax

ROOT = Path(__file__).resolve().parent.parent


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    def program(argv):
        raise UserError(f"{argv[0]} is\nwrong")

    assert run_program(program, ["it"]) == 2
    assert capsys.readouterr() == ("", "error: it is wrong\n")


def test_what_was_printed_stands_before_the_error_in_a_log(tmp_path, monkeypatch):
    """Where both go to one file, as in the logs of a ladder, which reads the last line."""

    def program(argv):
        print("preparing")
        raise UserError("wrong")

    log = tmp_path / "log"
    with log.open("a", encoding="utf-8") as out, log.open("a", 1, encoding="utf-8") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert run_program(program, []) == 2
        monkeypatch.undo()
    assert log.read_text(encoding="utf-8") == "preparing\nerror: wrong\n"


@pytest.mark.parametrize("kept", ["", "the checkpoint of step 7 is kept"])
def test_an_interruption_says_what_is_kept(capsys, monkeypatch, kept):
    def program(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(interruptions, "kept", lambda: kept)
    assert run_program(program, []) == 130
    assert capsys.readouterr().err == "\ninterrupted" + f"; {kept}" * bool(kept) + "\n"


def test_what_a_library_makes_of_an_interruption_is_one(capsys, monkeypatch):
    def program(argv):
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr(interruptions, "came", True)
    monkeypatch.setattr(interruptions, "kept", lambda: "")
    assert run_program(program, []) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


INTERRUPTED = """
import hashlib, os, signal, sys, time
from train.interruption import interruptions
from train.program import run_program

def interrupt(text):
    print(text, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
    print("not reached", flush=True)

def program(argv):
    interruptions.kept = lambda: "step 7 is kept"
    BODY

interruptions.listen()
sys.exit(run_program(program, []))
"""


# To Python pbkdf2_hmac is one instruction without its lock, as a compilation is.
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("interrupt('importing')", "interrupted; nothing was begun"),
        ("interruptions.begin(); interrupt('working')", "interrupted; step 7 is kept"),
        (
            "interruptions.begin()\n"
            "    signal.signal(signal.SIGINT, lambda *_: None)\n"
            "    with interruptions.noticed():\n"
            "        import threading\n"
            "        def twice():\n"
            "            for _ in range(2):\n"
            "                time.sleep(0.2)\n"
            "                os.kill(os.getpid(), signal.SIGINT)\n"
            "        threading.Thread(target=twice, daemon=True).start()\n"
            "        hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
            "the step under way is finished and saved; Ctrl-C again ends at once\n\n"
            "interrupted; step 7 is kept",
        ),
    ],
    ids=["while_it_imports", "while_it_works", "twice_in_a_compilation"],
)
def test_ctrl_c_ends_a_program_with_status_130_and_one_line(body, said):
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.replace("BODY", body)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (process.returncode, process.stderr) == (130, f"\n{said}\n")
    assert "not reached" not in process.stdout


def test_a_program_started_to_ignore_ctrl_c_ignores_it():
    code = INTERRUPTED.replace("BODY", "os.kill(os.getpid(), signal.SIGINT); print('on')")
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + code
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


def test_a_reader_that_has_seen_enough_leaves_no_traceback():
    code = (
        "import sys; from train.program import run_program;"
        "sys.exit(run_program(lambda argv: print('a line' * 10**6), []))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(6)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_bug_keeps_its_traceback():
    def program(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_program(program, [])


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize"), AssertionError()])
def test_no_device_is_a_users_mistake(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="no device for cuda .* unset JAX_PLATFORMS"):
        start_jax()


@pytest.mark.parametrize(
    ("flags", "devices"), [("", 3), ("--xla_force_host_platform_device_count=5", 5)]
)
def test_a_cpu_has_the_requested_number_of_devices_unless_the_user_sets_it(flags, devices):
    program = (
        "from train.program import start_jax; start_jax(cpu_devices=3);"
        "import jax; print(jax.device_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) == devices


def test_processes_meet_as_soon_as_they_have_joined(monkeypatch):
    """A first exchange on CPUs gives up after 30 s, and the first work may take longer."""
    met = []
    monkeypatch.setattr(processes, "join", lambda joining: None)
    monkeypatch.setattr(processes, "together", lambda work: met.append(work()))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for count in (1, 2):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        start_jax(processes.Joining(distributed=count > 1))
        assert len(met) == count - 1
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"one of 2 processes of a slice: train .*--distributed"):
        start_jax()


def test_a_module_run_as_a_program_says_how_programs_are_run():
    command = [sys.executable, "-m", "train.sample", "RUN"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: programs are run as python -m train NAME; python -m train --help lists them\n"
    )


def test_the_folder_run_as_a_program_says_so_too():
    command = [sys.executable, "train", "--config=configs/quickstart.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: write python -m train, in the folder that holds train/\n"
