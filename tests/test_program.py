"""What every program does around its work: errors, interruption, finding the devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from train.errors import UserError
from train.program import run_program, start_jax

ROOT = Path(__file__).resolve().parent.parent


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    def program(argv):
        raise UserError(f"{argv[0]} is\nwrong")

    assert run_program(program, ["it"]) == 2
    assert capsys.readouterr() == ("", "error: it is wrong\n")


def test_an_interruption_says_how_to_go_on(capsys):
    def program(argv):
        raise KeyboardInterrupt

    assert run_program(program, []) == 130
    assert "the same command goes on" in capsys.readouterr().err


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
def test_a_cpu_is_as_many_devices_as_asked_for_unless_the_user_has_said(flags, devices):
    program = (
        "from train.program import start_jax; start_jax(cpu_devices=3);"
        "import jax; print(jax.device_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) == devices
