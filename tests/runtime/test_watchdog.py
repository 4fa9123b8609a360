"""The watchdog in processes of its own: one that hangs ends with its stacks, one that was suspended goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from runs import environment

START = """
import ctypes, sys, threading, time
from ebm.runtime import stopping
stopping.GRACE = 2.0
with stopping.Watchdog(2.0, 0) as dog:
    print("up", flush=True)
"""
BEATS = START + "    for _ in range(120):\n        dog.beat()\n        time.sleep(0.1)\n"
SLEEPS = START + "    time.sleep(3600)\n"
HOLDS_THE_INTERPRETER = START + "    ctypes.PyDLL(None).sleep(3600)\n"
LATE = (
    START + "    time.sleep(3)\n    dog.beat()\n    for _ in range(20):\n        dog.beat()\n        time.sleep(0.1)\n"
)


def start(code: str, tmp_path) -> subprocess.Popen:
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log, env=environment(),
                                   start_new_session=True)  # fmt: skip
    assert process.stdout.readline() == b"up\n"
    return process


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_suspension_does_not_count(tmp_path, whole_group):
    """Longer than the timeout and all graces together; of the job, as by Ctrl-Z, or of the one process."""
    process = start(BEATS, tmp_path)
    send = (lambda number: os.killpg(process.pid, number)) if whole_group else process.send_signal
    time.sleep(0.5)
    send(signal.SIGSTOP)
    time.sleep(10)
    send(signal.SIGCONT)
    assert process.wait(60) == 0, (tmp_path / "log").read_text()


@pytest.mark.parametrize("code", [SLEEPS, HOLDS_THE_INTERPRETER], ids=["sleeps", "holds the interpreter"])
def test_a_process_that_hangs_ends_with_its_stacks(tmp_path, code):
    assert start(code, tmp_path).wait(60) != 0
    said = (tmp_path / "log").read_text()
    assert 'File "<string>", line' in said
    assert ("no step in 2 s" in said) == (code == SLEEPS)


def test_a_beat_in_the_grace_lets_it_go_on(tmp_path):
    assert start(LATE, tmp_path).wait(60) == 0
    assert "goes on: there was a step after all" in (tmp_path / "log").read_text()
