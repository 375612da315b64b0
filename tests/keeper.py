"""End whatever pytest has started once it is gone, even if it was killed with -9.

A variable of a name of its own marks what the process starts, and what that starts in turn: the environment is
inherited. A program that waits for the end of its standard input, which the kernel closes, then kills all that have it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from uuid import uuid4

import psutil  # clearml needs it, too


def keep() -> Callable[[], None]:
    """Mark what this process starts from now on. Returns what ends all of it."""
    mark = f"KEPT_{uuid4().hex}"
    keeper = subprocess.Popen([sys.executable, __file__, mark], stdin=subprocess.PIPE, start_new_session=True)
    os.environ[mark] = "1"

    def stop() -> None:
        del os.environ[mark]
        keeper.communicate()

    return stop


def marked(mark: str) -> list[psutil.Process]:
    """The processes that were started with this variable."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            if mark in process.environ():
                found.append(process)
    return found


if __name__ == "__main__":
    sys.stdin.read()
    while processes := marked(sys.argv[1]):  # what one of them has started meanwhile comes next
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=1)
