"""Freed memory stays while it is wanted, and goes back to the system behind: of a process that did nothing else."""

import ctypes
import json
import subprocess
import sys

import pytest

from u2a_fast.allocator import CHOSEN, keep_freed_memory

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="there is no glibc"
)

SCRIPT = """
import json, os, sys
import psutil
from u2a_fast.allocator import keep_freed_memory

for name in sys.argv[1].split(","):
    os.environ.pop(name, None)

def resident():
    return psutil.Process().memory_info().rss / 2**20

def left():  # MiB that stay when 64 have been written and freed
    before = resident()
    block = b"x" * 2**26
    del block
    return resident() - before

found, start = {}, resident()
with keep_freed_memory():
    found["within"] = left()
found["behind"] = resident() - start
found["without"] = left()
with keep_freed_memory():
    with keep_freed_memory():
        pass
    found["behind an inner one"] = left()
try:
    with keep_freed_memory():
        left()
        raise KeyError
except KeyError:
    found["behind an error"] = resident() - start
for name in sys.argv[1].split(","):
    os.environ[name] = "1"
    with keep_freed_memory():
        found[name] = left()
    del os.environ[name]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def left():
    """MiB of 64 that stay with the process, by where they were freed."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, ",".join(CHOSEN)], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["within", "behind an inner one"])
def test_freed_memory_is_kept_until_the_outermost_ends(where, left):
    assert left[where] > 48


@pytest.mark.parametrize("where", ["behind", "without", "behind an error"])
def test_it_is_given_back_behind(where, left):
    assert left[where] < 16


@pytest.mark.parametrize("name", sorted(CHOSEN))
def test_what_the_environment_chose_stands(name, left):
    assert left[name] < 16


def test_a_decorated_function_keeps_its_name_and_result():
    @keep_freed_memory()
    def held():
        return 3

    assert held.__name__ == "held" and held() == 3
