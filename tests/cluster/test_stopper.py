"""SIGTERM beside Ray's own handler, which would abort the process 3 s later."""

import subprocess
import sys

import pytest
from processes import ROOT, environment

CODE = """
import os, signal, time
from types import SimpleNamespace
from raysed.cluster.connect import connect
from raysed.cluster.launch import Stopper
asked = []
with Stopper() as stopper:
    connect()
    stopper.watch(SimpleNamespace(stop=SimpleNamespace(remote=lambda: asked.append("stop"))))
    os.kill(os.getpid(), signal.SIGTERM)
    until = time.monotonic() + 5  # a cycle that takes longer than Ray's patience
    while time.monotonic() < until:
        time.sleep(0.1)
print("ended", stopper.caught, asked)
"""


@pytest.mark.ray
def test_a_cycle_may_take_its_time_to_end_after_sigterm():
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment(RAY_ADDRESS="local"), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.splitlines()[-1] == "ended 15 ['stop']"
