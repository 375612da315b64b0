"""What a ClearML script needs around it. Copy this folder beside your own script: README.md shows how to use it.

Imports go one way: doctor, cleanup, checkpoint -> run -> storage, server, agent -> configuration, errors -> sdk.
"""

import math
import multiprocessing
import os
import re
import sys
import tempfile
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

import dotenv
from dotenv.parser import parse_stream

from clearml_client.errors import RunError

DOTENV = Path(__file__).resolve().parent.parent / ".env"
OUTSIDE = dict(os.environ)  # what was set before .env was read
NAMES = {"CLEARML_OUTPUT_URI", "CLEARML_API_HOST", "CLEARML_API_ACCESS_KEY", "CLEARML_API_SECRET_KEY"}
NAMES |= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"}
NAMES.add("GOOGLE_APPLICATION_CREDENTIALS")
ENVIRONMENT = re.compile("(AWS|AZURE|CLEARML|GOOGLE|TRAINS)_")

dotenv_problem: RunError | None = None  # why .env cannot be used; configuration.check() raises it
for name in ("stdin", "stdout", "stderr"):  # closed by whoever started us: the next file would take its number
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
        if name == "stderr":
            os.dup2(sys.stdout.fileno(), sys.stderr.fileno())  # how a run ended is said there, at least


def prepare_environment() -> None:
    """Read the .env beside this package, and prepare the environment for `import clearml`, which reads it.

    A variable that is set already wins over the file. For a file that cannot be used, `configuration.check` raises.
    """
    global dotenv_problem
    sys.excepthook = shorten_interrupt
    try:
        text = DOTENV.read_text(encoding="utf-8-sig") if DOTENV.is_file() else ""
        check_lines(text)
        dotenv.load_dotenv(stream=StringIO(text))
    except RunError as error:
        dotenv_problem = error
    except UnicodeDecodeError:
        dotenv_problem = RunError(f"{DOTENV} is no text file in UTF-8", "save it as one")
    except OSError as error:
        dotenv_problem = RunError(f"{DOTENV} cannot be read: {error.strerror}", "correct it")
    for name, value in list(os.environ.items()):
        if ENVIRONMENT.match(name):  # Kubernetes secrets end with a line break, Docker's env-files keep the quotes
            os.environ[name] = re.sub(r"""^\s*(["']?)(.*?)\1\s*$""", r"\2", value, flags=re.DOTALL)
            if name.startswith("AWS_") and not os.environ[name]:  # boto3 looks for a profile without a name
                del os.environ[name]
    # Torch's threads spin while they wait: by default so long that parallel programs block each other. The figures
    # are in docs/how-fast.md.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if (allowed := cpu_quota()) and allowed < len(os.sched_getaffinity(0)):  # of which torch knows by itself
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed))
    # The SDK merges this folder's settings below ~/clearml.conf, in which the user has the last word.
    os.environ.setdefault("CLEARML_CONFIG_PATH", str(Path(__file__).resolve().parent / "defaults"))
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")  # the SDK tries again by itself
    check_prerequisites()


def check_lines(text: str) -> None:
    """Raise RunError for a line of .env that sets nothing, or a name that is only like one which is nowhere set."""
    bindings = [*parse_stream(StringIO(text))]
    unset = NAMES - os.environ.keys() - {binding.key for binding in bindings}
    for binding in bindings:
        line = binding.original.string
        blank_lines = line[: -len(line.lstrip()) or None].count("\n")  # with which it begins
        place = f"{DOTENV}, line {binding.original.line + blank_lines}"
        if binding.error or (binding.key and binding.value is None):
            raise RunError(f"{place}: not understood", "write NAME=value")
        key = re.sub("^OUTPUT_", "CLEARML_OUTPUT_", (binding.key or "").upper())  # the prefix is easily forgotten
        if meant := get_close_matches(key, unset, 1, 0.94):
            raise RunError(f"{place}: there is no {binding.key}", f"write {meant[0]}")


def shorten_interrupt(kind: type[BaseException], *more: Any, earlier: Any = sys.excepthook) -> None:
    """Be `sys.excepthook`: say in one line that Ctrl-C came before the guard, while torch is imported, say."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
    else:
        earlier(kind, *more)


def check_prerequisites() -> None:
    """Exit with one line where `import clearml` would end in a traceback: it needs both at once."""
    what, cure = "no folder for temporary files", "set TMPDIR to one that can be written"
    try:
        tempfile.gettempdir()
        what, cure = "no semaphore can be made", "free space in /dev/shm, or mount it writable"
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {what}: {error.strerror}; {cure}")


def cpu_quota(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPUs that a container may use, rounded up; 0: no limit. Torch would start a thread for every CPU that it sees."""
    try:
        quota, period = map(int, limit.read_text().split())
    except (OSError, ValueError):  # not Linux, or "max"
        return 0
    return math.ceil(quota / period)
