"""Freed memory: given back to the system, or kept."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Page faults of filling and freeing 48 MB again and again, before and after.
PROGRAM = """
import json, resource
from diffusion_tokred.measure.machine import PeakMemory, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        a = b"x" * (48 << 20)
        del a
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def peak():
    with PeakMemory("cpu") as memory:
        pass
    return memory.bytes

found = {"default": faults(), "works": keep_freed_memory()}
faults()
found["kept"] = faults()
found["peak"] = peak()
a = b"x" * (48 << 20)
found["peak_with"] = peak()
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if not found["works"]:
        pytest.skip("the C library is not glibc")
    pages = (48 << 20) // 4096
    assert found["default"] > 3 * pages and found["kept"] < pages / 10
    if found["peak"] is not None:  # what was freed is not of the block, kept or not
        assert 40 << 20 < found["peak_with"] - found["peak"] < 56 << 20
