"""The clean-up, spoilt: at its STEP-th change of anything, just before it happens, the process kills itself (ACTION),
or waits until the test has broken something. Everything between two changes leaves the same state.
"""

import os
import re
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

step, action = int(os.environ.get("STEP", 0)), os.environ.get("ACTION")
changes, lock = 0, threading.Lock()
request = re.compile(rb"(PUT|POST|DELETE|GET \S*/(?:tasks|models)\.delete) ?")


def hook(event: str, args: tuple[Any, ...]) -> None:
    global changes
    changed = event in ("os.remove", "os.rmdir") and "/disk/" in str(args[0])
    changed |= event == "http.client.send" and isinstance(args[1], bytes) and bool(request.match(args[1]))
    if not changed:
        return
    with lock:
        changes += 1
        if changes != step:
            return
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        open("paused", "w").close()
        while os.path.exists("paused"):
            time.sleep(0.01)


sys.addaudithook(hook)
sys.path[0] = str(Path(__file__).parents[2])
runpy.run_module("clearml_client.cleanup", run_name="__main__", alter_sys=True)
