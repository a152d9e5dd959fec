"""Memory that is freed goes back to the system."""

import platform
import subprocess
import sys

import pytest

# What a session does: weights of 17 MB, small objects between them, then all weights freed.
FREED = """
import ctypes, pathlib
import numpy as np

def private():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])

{call}
np.ones(30 * 2**17)  # 30 MiB, freed at once: glibc takes blocks of up to that size from its heap from now on
libc = ctypes.CDLL(None)
before, blocks = private(), []
for _ in range(20):
    blocks.append(np.ones(17 * 2**17))
    libc.malloc(100_000)
del blocks
print(private() - before)
"""
OURS = "from switchkd.export.process.memory import return_freed_blocks; return_freed_blocks()"


def still_held(call: str) -> int:
    result = subprocess.run([sys.executable, "-c", FREED.format(call=call)], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc")
def test_freed_blocks_go_back_to_the_system() -> None:
    assert still_held("") > 100 * 2**20, "glibc gives them back by itself: return_freed_blocks is not needed any more"
    assert still_held(OURS) < 20 * 2**20
