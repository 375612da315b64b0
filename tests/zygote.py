"""A process that has imported torch, and forks for each run of a script: that saves the run three seconds of CPU.

It has not imported clearml, which reads variables while it is imported. A fork gets its environment, folder and
streams as a new process would, and a session of its own; it runs the script as `__main__`, and ends as an interpreter
does.
"""

import atexit
import faulthandler
import gc
import importlib
import inspect
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
from pathlib import Path
from typing import Any, NoReturn

HEAVY = (
    *("torch", "torchvision.datasets", "numpy", "PIL.ImageFont", "PIL.PngImagePlugin", "tqdm", "dotenv", "boto3"),
    *("requests", "yaml", "jwt", "psutil", "furl", "pathlib2", "pyparsing", "jsonschema", "doctest"),
    *("google.cloud.storage", "google.protobuf.json_format", "logging.config", "logging.handlers"),
    *("multiprocessing.dummy", "multiprocessing.queues", "multiprocessing.synchronize"),
)
# Read when torch is imported: a run with other values of these cannot be forked.
EARLY = ("OMP_", "GOMP_", "MKL_", "KMP_", "PYTHONPATH", "PYTHONHASHSEED", "CUDA_", "LD_", "TORCH_")
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")  # as Popen names their ends


def start_zygote(environment: dict[str, str]) -> Callable[[], None]:
    """Start the process, which all of pytest's workers share. Returns what stops it."""
    os.environ["ZYGOTE"] = f"zygote-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0" + os.environ["ZYGOTE"])  # in no file system
        listener.listen()
        fd = listener.fileno()
        process = subprocess.Popen([sys.executable, __file__, str(fd)], pass_fds=[fd], env=environment)

    def stop() -> None:
        process.kill()
        process.wait()

    return stop


class Forked(subprocess.Popen[str]):
    """A run in a fork. For the tests it is a Popen like any other, though its process is another one's child."""

    def _execute_child(self, *given: Any) -> None:
        asked = inspect.signature(subprocess.Popen._execute_child).bind(self, *given).arguments  # type: ignore[attr-defined]
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect("\0" + os.environ["ZYGOTE"])
        order = {"arguments": asked["args"][1:], "environment": asked["env"], "folder": str(asked["cwd"])}
        ends = (asked["p2cread"], asked["c2pwrite"], asked["errwrite"])
        streams = [number if end == -1 else end for number, end in enumerate(ends)]
        socket.send_fds(self.connection, [json.dumps(order).encode()], streams)
        self._close_pipe_fds(*(asked[name] for name in PIPES))  # type: ignore[attr-defined]
        self.pid = int(self.connection.recv(100))

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = int(self.connection.recv(100) or -signal.SIGKILL)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
        return self.returncode

    def __del__(self, *_: Any) -> None:
        self.connection.close()


# --- the other end ----------------------------------------------------------------------------------------------------
def serve(listener: socket.socket) -> NoReturn:
    """Fork for each connection. There is no thread, of which a fork would have no copy."""
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            watch(connection)
        connection.close()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # what has ended counts in `time pytest`
                pass


def watch(connection: socket.socket) -> NoReturn:
    """Fork for the run, tell its exit code, and end it where the test has gone."""
    order, streams, _, _ = socket.recv_fds(connection, 1_000_000, 3)
    if order:
        if not (pid := os.fork()):
            run(connection, streams, **json.loads(order))
        for stream in streams:
            os.close(stream)
        ready, _, _ = select.select([connection.fileno(), os.pidfd_open(pid)], [], [])
        if connection.fileno() in ready:  # it was closed: the test says no more
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with suppress(OSError):
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def run(
    connection: socket.socket, streams: list[int], arguments: list[str], environment: dict[str, str], folder: str
) -> NoReturn:
    os.setsid()
    connection.send(str(os.getpid()).encode())
    for number, end in enumerate(streams):
        os.dup2(end, number)
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
    for module in HEAVY:
        importlib.import_module(module)
    import torch

    torch.optim.SGD([torch.zeros(1)], 0.1)  # it imports torch._dynamo
    faulthandler.register(signal.SIGUSR2)  # what a test asks for when it gives a run up
    gc.collect()
    gc.freeze()  # the collections of a fork leave alone what was made here: a fifth of the CPU time of a run
    assert threading.active_count() == 1
    serve(socket.socket(fileno=int(sys.argv[1])))
