"""Freed memory stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vae3d import distributed
from vae3d.host_memory import VARIABLES

FAULTS = """
import resource
from vae3d.host_memory import keep_freed_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("given", [None, *VARIABLES])
def test_freed_memory_is_reused_unless_the_environment_sets_the_allocator(given):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {given: "131072"} if given else {}
    result = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    kept, first, second = result.stdout.split()
    assert int(first) > 1000
    assert kept == str(given is None)
    if given is None:
        assert int(second) < int(first) / 10


@pytest.mark.parametrize(
    "start", [lambda: distributed.init_inference("cpu"), lambda: distributed.init_training("fp32")]
)
def test_commands_that_compute_on_a_cpu_keep_freed_memory(monkeypatch, start):
    called = []
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: called.append(True))
    start()
    assert called == [True]
