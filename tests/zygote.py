"""A process that has imported torch, and forks for each run of a script: that saves three seconds of CPU.

It forks for pytest's workers, too. It has not imported clearml, which reads variables while it is imported. A fork gets
its environment, folder and streams as a new process would, and a session of its own; it runs the script as `__main__`,
and ends as an interpreter does.
"""

import atexit
import faulthandler
import gc
import importlib.util
import inspect
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partialmethod
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NoReturn
from uuid import uuid4

HEAVY = """
torch._dynamo torchvision.datasets numpy PIL.ImageFont PIL.PngImagePlugin tqdm dotenv boto3 requests yaml jwt furl
pathlib2 pyparsing jsonschema doctest google.cloud.storage google.protobuf.json_format logging.config logging.handlers
psutil PIL.GifImagePlugin multiprocessing.dummy multiprocessing.queues multiprocessing.synchronize
"""
# Memory that is given back to the system has to be cleared anew: a sixth of the CPU time of a training.
KEEP = {"MALLOC_TOP_PAD_": "64000000", "MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
# Read when torch is imported: a run with other values of these cannot be forked.
EARLY = ("OMP_", "GOMP_", "MKL_", "KMP_", "PYTHONPATH", "PYTHONHASHSEED", "CUDA_", "LD_", "TORCH_")


def start_zygote(environment: dict[str, str]) -> Callable[[], None]:
    """Start the process, which all of pytest's workers share. Returns what stops it."""
    os.environ["ZYGOTE"] = f"zygote-{uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("\0" + os.environ["ZYGOTE"])  # in no file system
        listener.listen()
        fd = listener.fileno()
        command = [sys.executable, __file__, str(fd)]
        process = subprocess.Popen(command, pass_fds=[fd], env={**environment, **KEEP})

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
def prepare() -> None:
    """Import, and do beforehand what each run would do again in the same way."""
    modules = {name: importlib.import_module(name) for name in HEAVY.split()}
    # The descriptions of Amazon's services: one loader for all sessions.
    session: Any = importlib.import_module("botocore.session")
    session.create_loader = cache(session.create_loader)
    modules["boto3"].Session("any", "any", region_name="us-east-1").resource("s3").meta.client.close()
    # The SDK checks each request by its schema, and each time the schema itself.
    validators: Any = importlib.import_module("jsonschema.validators")
    extend = validators.extend

    def trusting(*arguments: Any, **options: Any) -> Any:
        validator = extend(*arguments, **options)
        validator.check_schema = lambda schema: None
        return validator

    validators.extend = trusting
    # The files of all modules, for which it asks whenever it makes a logger.
    sys.modules["zygote"] = sys.modules["__main__"]
    inspect.getmodule(sys._getframe())


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each connection, and tell how each fork ends. What returns is a fork, with its order.

    There is no thread, of which a fork would have no copy.
    """
    forks: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for ready in select.select([listener.fileno(), *forks], [], [])[0]:
            if ready in forks:
                pid, connection = forks.pop(ready)
                os.close(ready)
                _, status = os.waitpid(pid, 0)
                with connection, suppress(OSError):  # the test has gone
                    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            else:
                connection, _ = listener.accept()
                order = json.loads(connection.recv(1_000_000))
                if not (pid := os.fork()):
                    return {"connection": connection, **order}
                forks[os.pidfd_open(pid)] = pid, connection


def become(
    connection: socket.socket, arguments: list[str], environment: dict[str, str], folder: str, streams: list[str]
) -> CodeType:
    """Make the fork a new process. Return what it has to run, in a module `__main__` of its own."""
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
    sys.modules["__main__"] = main = ModuleType("__main__")
    option = arguments.pop(0) if arguments[0] in ("-c", "-m") else ""
    sys.path[0], sys.argv = str(Path(__file__).parents[1]), arguments
    if option == "-c":
        return compile(arguments[0], "<string>", "exec")
    if option == "-m":
        main.__spec__ = spec = importlib.util.find_spec(arguments[0])
        assert spec
        assert spec.origin
        main.__package__, arguments[0] = spec.parent, spec.origin
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
    main.__file__ = arguments[0]
    return compile(Path(arguments[0]).read_bytes(), arguments[0], "exec")


def execute(code: CodeType) -> int:
    """The exit code."""
    try:
        exec(code, sys.modules["__main__"].__dict__)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end(code: int) -> NoReturn:
    """As an interpreter does."""
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
    if sys.argv[1] == "-u":  # in place of python, for a worker of pytest-xdist
        sys.exit(Forked(sys.argv[1:], Path.cwd(), dict(os.environ), 0, 1, 2).wait() & 0xFF)
    listener = socket.socket(fileno=int(sys.argv[1]))
    select.select([listener], [], [])  # there are tests that start nothing
    prepare()
    faulthandler.register(signal.SIGUSR2)  # what a test asks for when it gives a run up
    gc.collect()
    gc.freeze()  # the collections of a fork leave alone what was made here: a fifth of the CPU time of a run
    assert threading.active_count() == 1
    end(execute(become(**serve(listener))))
