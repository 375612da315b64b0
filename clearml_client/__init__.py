"""What a ClearML script needs around it: copy this folder beside your own script.

    import clearml_client
    clearml_client.prepare_environment()  # before `import clearml`
    from clearml import OutputModel, Task
    from clearml_client import run

    with run.guard("s3://host:port/bucket/path") as guard:
        task = Task.init("project", "task", output_uri=guard.output_uri)
        ...

Two commands: `uv run -m clearml_client.doctor` and `uv run -m clearml_client.cleanup`. Each module says what it is for.
Imports go one way: doctor, cleanup, checkpoint -> run -> storage, server, agent -> configuration, errors -> sdk.
"""

import math
import multiprocessing
import os
import re
import sys
import tempfile
from contextlib import suppress
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any

import dotenv
from dotenv.parser import parse_stream

DOTENV = Path(__file__).resolve().parent.parent / ".env"
OUTSIDE = dict(os.environ)  # what was set before .env was read
ENVIRONMENT = re.compile("(AWS|AZURE|CLEARML|GOOGLE|TRAINS)_")

dotenv_problem = ""  # why .env cannot be used; configuration.check() raises it
for name in ("stdin", "stdout", "stderr"):  # closed by whoever started us: the next file would take its number
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        if name == "stderr":
            os.dup2(sys.stdout.fileno(), sys.stderr.fileno())  # how a run ended is said there, at least


def prepare_environment() -> None:
    """Read the .env beside this package, and prepare the environment for `import clearml`, which reads it.

    A variable that is set already wins over the file. An unusable file is an error of the run, which
    `configuration.check` raises, since here nobody could tell it in one line.
    """
    global dotenv_problem
    sys.excepthook = shorten_interrupt
    try:
        text = DOTENV.read_text(encoding="utf-8-sig") if DOTENV.is_file() else ""
        bad = [binding.original.line for binding in parse_stream(StringIO(text)) if binding.error]
        if bad:
            dotenv_problem = f"{DOTENV}, line {bad[0]}: not understood; write NAME=value"
        else:
            dotenv.load_dotenv(stream=StringIO(text))
    except UnicodeDecodeError:
        dotenv_problem = f"{DOTENV} is no text file in UTF-8: save it as one"
    except OSError as error:
        dotenv_problem = f"{DOTENV} cannot be read: {error.strerror}"
    for name, value in list(os.environ.items()):
        if ENVIRONMENT.match(name):  # Kubernetes secrets end with a line break, Docker's env-files keep the quotes
            os.environ[name] = re.sub(r"""^\s*(["']?)(.*?)\1\s*$""", r"\2", value, flags=re.DOTALL)
            if name.startswith("AWS_") and not os.environ[name]:  # boto3 looks for a profile without a name
                del os.environ[name]
    # Torch's threads spin while they wait. On 2 cores, images per second with 30000, 3000, 1000 and 0 spins: alone
    # 15,800, 14,700, 16,700 and 11,500; beside one busy process 1,500, 4,500, 6,300 and 6,400; three runs side by side
    # stuck, 10,400, 12,000 and 13,600 in all.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if (allowed := cpu_quota()) and allowed < len(os.sched_getaffinity(0)):  # of which torch knows by itself
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed))
    # The SDK merges this folder's settings below ~/clearml.conf, in which the user has the last word.
    os.environ.setdefault("CLEARML_CONFIG_PATH", str(Path(__file__).resolve().parent / "defaults"))
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")  # the SDK tries again by itself
    check_places()


def shorten_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None, earlier: Any = sys.excepthook
) -> None:
    """Be `sys.excepthook`: say in one line that Ctrl-C came before the guard, while torch is imported, say."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
    else:
        earlier(kind, error, trace)


def check_places() -> None:
    """Exit with one line where `import clearml` would end in a traceback: it needs both at once."""
    what, cure = "no folder for temporary files", "set TMPDIR to one that can be written"
    try:
        tempfile.gettempdir()
        what, cure = "no semaphore can be made", "free space in /dev/shm, or mount it writable"
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {what}: {error.strerror}; {cure}")


def cpu_quota(root: Path = Path("/")) -> int:
    """CPUs that the cgroup of a container or batch job allows in all, rounded up; 0: there is no such limit.

    Torch knows nothing of it: it starts a thread for each CPU, and the kernel halts them all in turn.
    """
    found = []
    with suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)  # "0::/path" is version 2, "4:cpu,cpuacct:/path" version 1
            names = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if kinds else ["cpu.max"]
            for group in (Path(path), *Path(path).parents):  # in a container its own is the root
                folder = root / "sys/fs/cgroup" / kinds / group.relative_to("/")
                with suppress(OSError, ValueError):  # no such file, or "max"
                    quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
                    found.append(math.ceil(quota / period))
    return min((quota for quota in found if quota > 0), default=0)  # version 1 has -1 for no limit
