"""A process that has imported torch, and forks for each run of a script: that saves the run three seconds of CPU.

It has not imported clearml, which reads variables while it is imported. A fork gets its environment, folder, streams
and session as a new process would, runs the script as `__main__`, and ends as an interpreter does.
"""

import atexit
import faulthandler
import gc
import importlib
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
from typing import IO, Any, NoReturn

HEAVY = (
    *("torch", "torchvision.datasets", "numpy", "PIL.ImageFont", "PIL.PngImagePlugin", "tqdm", "dotenv", "boto3"),
    *("requests", "yaml", "jwt", "psutil", "furl", "pathlib2", "pyparsing", "jsonschema", "click", "doctest"),
    *("google.cloud.storage", "google.protobuf.json_format", "logging.config", "logging.handlers"),
    *("multiprocessing.dummy", "multiprocessing.queues", "multiprocessing.synchronize"),
)
# Read when torch is imported: a run with other values of these cannot be forked.
EARLY = ("OMP_", "GOMP_", "MKL_", "KMP_", "PYTHONPATH", "PYTHONHASHSEED", "CUDA_", "LD_", "TORCH_")


class Forked(subprocess.Popen[str]):
    """What the tests have of a forked run: a Popen whose process is another one's child."""

    def __init__(self, args: list[str], pid: int, status: socket.socket, pipes: list[IO[str] | None]) -> None:
        self.args, self.pid, self.status = args, pid, status
        self.stdin, self.stdout, self.stderr = pipes
        self.returncode: int | None = None
        self.text_mode, self.encoding, self.errors = True, "utf-8", None
        self._child_created, self._communication_started, self._input = True, False, None
        self._sigint_wait_secs = 0.25

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        return self._await(0)

    def _wait(self, timeout: float | None) -> int:
        if self._await(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode  # type: ignore[return-value]

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self.status.settimeout(timeout if timeout is None or timeout > 0 else 0)
            with suppress(TimeoutError, BlockingIOError):
                self.returncode = int(self.status.recv(100) or b"-9")
                self.status.close()
        return self.returncode

    def __del__(self, *_: Any) -> None:
        self.status.close()


class Server:
    """The process, which all of pytest's workers share. It ends when this one does."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.name = f"zygote-{os.getpid()}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"\0{self.name}")  # in no file system
            listener.listen()
            command = [sys.executable, __file__, str(listener.fileno())]
            fds = [listener.fileno()]
            self.process = subprocess.Popen(command, pass_fds=fds, env=environment, stdin=subprocess.PIPE)

    def stop(self) -> None:
        self.process.communicate()


class Zygote:
    """The tests' end."""

    def __init__(self, server: str, environment: dict[str, str]) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(f"\0{server}")
        self.lock = threading.Lock()
        self.early = {name: value for name, value in environment.items() if name.startswith(EARLY)}

    def can_run(self, environment: dict[str, str]) -> bool:
        return self.early == {name: value for name, value in environment.items() if name.startswith(EARLY)}

    def start(
        self,
        arguments: list[str],
        env: dict[str, str],
        cwd: Path,
        root: Path,
        prelude: Path | None = None,
        start_new_session: bool = False,
        **streams: Any,
    ) -> Forked:
        """Run a script, or a module after "-m" from the folder `root`. `prelude` is executed before it."""
        ours, theirs = socket.socketpair()
        pipes: list[IO[str] | None] = [None, None, None]
        ends = []
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            wanted = streams.get(name)
            if wanted == subprocess.PIPE:
                read, write = os.pipe()
                ends.append(write if number else read)
                pipes[number] = os.fdopen(read if number else write, "r" if number else "w", encoding="utf-8")
            elif wanted == subprocess.DEVNULL:
                ends.append(os.open(os.devnull, os.O_RDWR))
            else:
                ends.append(
                    os.dup(number if wanted is None else wanted if isinstance(wanted, int) else wanted.fileno())
                )
        order = {"arguments": arguments, "env": env, "cwd": str(cwd), "root": str(root), "session": start_new_session}
        order["prelude"] = str(prelude or "")
        message = json.dumps(order).encode().ljust(65536)
        with self.lock:  # a test may start several runs at once, and a long message goes in parts
            sent = socket.send_fds(self.socket, [message], [*ends, theirs.fileno()])
            self.socket.sendall(message[sent:])
        for end in ends:
            os.close(end)
        theirs.close()
        return Forked(arguments, int(ours.recv(100)), ours, pipes)


# --- the other end ----------------------------------------------------------------------------------------------------
def serve(listener: socket.socket) -> None:
    """Fork a run for each order, tell the tests its exit code, and end it where they are gone.

    Without a thread, of which a fork would have no copy; each run is waited for, so that `time pytest` counts it.
    """
    waiting = selectors.DefaultSelector()
    waiting.register(0, selectors.EVENT_READ)  # closed when the tests are over
    waiting.register(listener, selectors.EVENT_READ)
    while True:
        (key, _), *_ = waiting.select()  # one at a time: what it changes may concern the next
        if key.fileobj == 0:
            for pid in {other.data[0] for other in waiting.get_map().values() if other.data}:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return
        if key.fileobj is listener:
            waiting.register(listener.accept()[0], selectors.EVENT_READ)
            continue
        if key.data:
            waiting.unregister(key.fileobj)
            pid, status = key.data
            if not status:
                os.kill(pid, signal.SIGKILL)
                continue
            _, code = os.waitpid(pid, 0)
            with suppress(OSError):
                status.send(str(os.waitstatus_to_exitcode(code)).encode())
            with suppress(KeyError):
                waiting.unregister(status)
            status.close()
            os.close(key.fd)
            continue
        orders = key.fileobj
        assert isinstance(orders, socket.socket)
        data, fds, _, _ = socket.recv_fds(orders, 65536, 4)
        while data and len(data) < 65536:
            data += orders.recv(65536 - len(data))
        if not data:
            waiting.unregister(orders)
            orders.close()
            continue
        if not (pid := os.fork()):
            run(json.loads(data), fds)
        status = socket.socket(fileno=fds.pop())
        for fd in fds:
            os.close(fd)
        status.send(str(pid).encode())
        waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, status))
        waiting.register(status, selectors.EVENT_READ, (pid, None))  # nobody writes there: it was closed


def run(order: dict[str, Any], fds: list[int]) -> NoReturn:
    if order["session"]:
        os.setsid()
    for number, fd in enumerate(fds[:3]):
        os.dup2(fd, number)
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
        if order["prelude"]:
            exec(Path(order["prelude"]).read_text(), {})
        arguments = order["arguments"]
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path[0] = order["root"]
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
