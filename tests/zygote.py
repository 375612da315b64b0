"""A process that has imported torch, and forks for each run of a script: that saves the run three seconds of CPU.

It has not imported clearml, which reads variables while it is imported. A fork gets its environment, folder, streams
and session as a new process would, runs the script as `__main__`, and ends as an interpreter does.
"""

import atexit
import faulthandler
import gc
import importlib
import inspect
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
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


class Server:
    """The process, which all of pytest's workers share. It ends when this one does."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ["ZYGOTE"] = f"zygote-{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind("\0" + os.environ["ZYGOTE"])  # in no file system
            listener.listen()
            command = [sys.executable, __file__, str(listener.fileno())]
            fds = [listener.fileno()]
            self.process = subprocess.Popen(command, pass_fds=fds, env=environment, stdin=subprocess.PIPE)

    def stop(self) -> None:
        self.process.communicate()


class Forked(subprocess.Popen[str]):
    """A run in a fork. For the tests it is a Popen like any other, though its process is another one's child."""

    def _execute_child(self, *given: Any) -> None:
        asked = inspect.signature(subprocess.Popen._execute_child).bind(self, *given).arguments  # type: ignore[attr-defined]
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect("\0" + os.environ["ZYGOTE"])
        order = {"arguments": asked["args"][1:], "env": asked["env"], "cwd": str(asked["cwd"])}
        order["session"] = asked["start_new_session"]
        pipes = {name: asked[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")}
        streams = [pipes[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        inherited = [number if stream == -1 else stream for number, stream in enumerate(streams)]
        socket.send_fds(self.connection, [json.dumps(order).encode()], inherited)
        self._close_pipe_fds(**pipes)  # type: ignore[attr-defined]
        self.pid = int(self.connection.recv(100))

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        return self._await(0)

    def _wait(self, timeout: float | None) -> int:
        if self._await(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self.connection.settimeout(timeout if timeout is None or timeout > 0 else 0)
            with suppress(TimeoutError, BlockingIOError):
                self.returncode = int(self.connection.recv(100) or b"-9")
                self.connection.close()
        return self.returncode

    def __del__(self, *_: Any) -> None:
        self.connection.close()


# --- the other end ----------------------------------------------------------------------------------------------------
def serve(listener: socket.socket) -> None:
    """Fork a run for each connection, tell it the exit code, and end the run where the test has gone.

    Without a thread, of which a fork would have no copy; each run is waited for, so that `time pytest` counts it.
    """
    waiting = selectors.DefaultSelector()
    waiting.register(0, selectors.EVENT_READ)  # closed when the tests are over
    waiting.register(listener, selectors.EVENT_READ)
    runs: dict[int, socket.socket] = {}
    while True:
        (key, _), *_ = waiting.select()  # one at a time: what it changes may concern the next
        if key.fileobj == 0:
            for pid in runs:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return
        if key.fileobj is listener:
            connection, _ = listener.accept()
            order, streams, _, _ = socket.recv_fds(connection, 1_000_000, 3)
            if not order:  # the test has gone already
                connection.close()
                continue
            if not (pid := os.fork()):
                run(json.loads(order), streams)
            for stream in streams:
                os.close(stream)
            with suppress(OSError):
                connection.send(str(pid).encode())
            runs[pid] = connection
            waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            waiting.register(connection, selectors.EVENT_READ, pid)  # the test says no more: it was closed
        elif key.fileobj in runs.values():
            waiting.unregister(key.fileobj)
            os.kill(key.data, signal.SIGKILL)
        else:
            waiting.unregister(key.fileobj)
            os.close(key.fd)
            _, status = os.waitpid(key.data, 0)
            with runs.pop(key.data) as connection, suppress(KeyError, OSError):
                waiting.unregister(connection)
                connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def run(order: dict[str, Any], streams: list[int]) -> NoReturn:
    if order["session"]:
        os.setsid()
    for number, end in enumerate(streams):
        os.dup2(end, number)
    os.closerange(3, 200)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    tempfile.tempdir = None
    encoding, _, errors = os.getenv("PYTHONIOENCODING", "utf-8").partition(":")
    sys.stdin = os.fdopen(0, closefd=False, encoding=encoding)
    sys.stdout = os.fdopen(1, "w", closefd=False, encoding=encoding, errors=errors or "strict")
    sys.stderr = os.fdopen(2, "w", 1, closefd=False, encoding=encoding, errors="backslashreplace")
    faulthandler.register(signal.SIGUSR2)  # what a test asks for when it gives a run up
    sys.__dict__.update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
    code = 1
    try:
        arguments = order["arguments"]
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path[0] = str(Path(__file__).parents[1])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            code = -signal.SIGINT
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    for module in HEAVY:
        importlib.import_module(module)
    import torch

    torch.optim.SGD([torch.zeros(1)], 0.1)  # it imports torch._dynamo
    gc.collect()
    gc.freeze()  # the collections of a fork leave alone what was made here: a fifth of the CPU time of a run
    assert threading.active_count() == 1
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
