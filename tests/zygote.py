"""A process that has imported torch, and forks for each run of a script: that saves the run three seconds of CPU.

It has not imported clearml, which reads variables while it is imported. A fork gets its environment, folder and
streams as a new process would, and a session of its own; it runs the script as `__main__`, and ends as an interpreter
does.
"""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partialmethod
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

HEAVY = """
torch._dynamo torchvision.datasets numpy PIL.ImageFont PIL.PngImagePlugin tqdm dotenv boto3 requests yaml jwt furl
pathlib2 pyparsing jsonschema doctest google.cloud.storage google.protobuf.json_format logging.config logging.handlers
multiprocessing.dummy multiprocessing.queues multiprocessing.synchronize
"""
# Read when torch is imported: a run with other values of these cannot be forked.
EARLY = ("OMP_", "GOMP_", "MKL_", "KMP_", "PYTHONPATH", "PYTHONHASHSEED", "CUDA_", "LD_", "TORCH_")


def start_zygote(environment: dict[str, str]) -> Callable[[], None]:
    """Start the process, which all of pytest's workers share. Returns what stops it."""
    os.environ["ZYGOTE"] = f"zygote-{uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0" + os.environ["ZYGOTE"])  # in no file system
        listener.listen()
        fd = listener.fileno()
        process = subprocess.Popen([sys.executable, __file__, str(fd)], pass_fds=[fd], env=environment)

    def stop() -> None:
        process.kill()
        process.wait()

    return stop


class Forked:
    """A run in a fork, with what tests need of a Popen. It opens the test's files by their path in /proc."""

    def __init__(
        self, command: list[str], cwd: Path, env: dict[str, str], stdin: int, stdout: int, stderr: int, **_: Any
    ) -> None:
        self.returncode: int | None = None
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect("\0" + os.environ["ZYGOTE"])
        streams = [f"/proc/{os.getpid()}/fd/{number}" for number in (stdin, stdout, stderr)]
        order = {"arguments": command[1:], "environment": env, "folder": str(cwd), "streams": streams}
        self.connection.send(json.dumps(order).encode())
        self.pid = int(self.connection.recv(100))

    def wait(self) -> int:
        with self.connection:
            self.returncode = int(self.connection.recv(100) or -signal.SIGKILL)
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    terminate = partialmethod(send_signal, signal.SIGTERM)
    kill = partialmethod(send_signal, signal.SIGKILL)


# --- the other end ----------------------------------------------------------------------------------------------------
def serve(listener: socket.socket) -> NoReturn:
    """Fork for each connection. There is no thread, of which a fork would have no copy."""
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            watch(connection)
        connection.close()
        with suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)  # what has ended counts in `time pytest`


def watch(connection: socket.socket) -> NoReturn:
    """Fork for the run, and tell its exit code."""
    order = json.loads(connection.recv(1_000_000))
    if not (pid := os.fork()):
        run(connection, **order)
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):  # the test has gone
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def run(
    connection: socket.socket, arguments: list[str], environment: dict[str, str], folder: str, streams: list[str]
) -> NoReturn:
    """In the fork: be a new process, run the script, end."""
    os.setsid()
    for number, path in enumerate(streams):
        os.dup2(os.open(path, (os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY) | os.O_NOCTTY), number)
    connection.send(str(os.getpid()).encode())
    os.closerange(3, 200)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    encoding, _, errors = os.getenv("PYTHONIOENCODING", "utf-8").partition(":")
    sys.stdin = os.fdopen(0, closefd=False, encoding=encoding)
    sys.stdout = os.fdopen(1, "w", closefd=False, encoding=encoding, errors=errors or "strict")
    sys.stderr = os.fdopen(2, "w", 1, closefd=False, encoding=encoding, errors="backslashreplace")
    sys.__dict__.update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
    code = execute(arguments)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def execute(arguments: list[str]) -> int:
    """The exit code of a script, or of "-m" and a module."""
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    sys.path[0] = str(Path(__file__).parents[1] if is_module else Path(sys.argv[0]).resolve().parent)
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    listener = socket.socket(fileno=int(sys.argv[1]))
    select.select([listener], [], [])  # there are tests that start nothing
    for module in HEAVY.split():
        importlib.import_module(module)
    faulthandler.register(signal.SIGUSR2)  # what a test asks for when it gives a run up
    gc.collect()
    gc.freeze()  # the collections of a fork leave alone what was made here: a fifth of the CPU time of a run
    assert threading.active_count() == 1
    serve(listener)
