"""How a process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, threading, time
from rqvae import processes

class Late:
    def __del__(self):
        print("torn down")

def work():
    time.sleep(0.2)
    print("thread")

late = Late()
atexit.register(print, "handler")
threading.Thread(target=work).start()
print("main")
if {skip}:
    processes.skip_teardown()
processes.end(7)
"""


@pytest.mark.parametrize(("skip", "said"), [(False, "main thread handler torn down"), (True, "main thread handler")])
def test_a_process_ends_after_its_threads_and_handlers(skip: bool, said: str) -> None:
    """Not by way of the interpreter's teardown where a library's threads would meet it."""
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(skip=skip)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (7, said.split()), done.stderr
