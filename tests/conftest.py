"""What the tests share: the real scripts, started as a user starts them, in a HOME of their own."""

import atexit
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar
from uuid import uuid4

import pytest
import zygote
from clearml_server import ClearMLServer
from keeper import keep
from stores import FakeGCS, Rclone, SeaweedFS, Store
from zygote import EARLY, Forked, start_zygote

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that tests can import Net from the script

# Every right key of the tests, and the wrong ones: a typo in a secret is a secret, too.
SECRETS = (Store.secret_key, SeaweedFS.READER[1], ClearMLServer.secret_key, "a-wrong-secret")
CONFIGURATION = re.compile(r"\.env|.*\.(conf|cfg)|credentials|identities\.json|log\.txt|.*-ubyte(\.gz)?|.*\.py|weed.*")

FEW = ("--batch-size", 100, "--log-interval", 1)  # an epoch of three batches
MNIST_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

# What a user's machine may have set, and a test must not see. Without bytecode each start takes seconds longer.
FOREIGN: tuple[str, ...] = ("CLEARML_", "TRAINS_", "AWS_", "GOOGLE_", "STORAGE_", "AZURE_", "CUDA_")
FOREIGN += ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")

# Several runs share the cores here: threads that spin while they wait made three of them take 4.6 times as long.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


@cache
def scratch() -> Path:
    """A folder that no test looks into, which goes at the end."""
    folder = tempfile.TemporaryDirectory(prefix="clearml-client-tests-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def mnist(train: int, test: int) -> Path:
    """A folder for --data-dir: the first images of both sets, in files like the published ones."""
    folder = scratch() / f"mnist-{train}-{test}"
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    for name in MNIST_FILES:
        content = gzip.decompress((ROOT / f"data/MNIST/raw/{name}.gz").read_bytes())
        count, head, size = train if "train" in name else test, 16 if "images" in name else 8, 784
        end = head + count * (size if "images" in name else 1)
        (raw / f"{name}.gz").write_bytes(gzip.compress(content[:4] + struct.pack(">I", count) + content[8:end]))
    return folder


@dataclass
class Machine:
    """A user's machine: a HOME, a folder to work in, and variables. Its scripts are those of the checkout.

    It trains on a bit of MNIST, if on no other `--data-dir`; `whole`, on what the script has by default.
    """

    home: Path
    variables: dict[str, str] = field(default_factory=dict)
    whole: bool = False
    fresh: ClassVar[bool] = sys.platform != "linux"  # all runs are processes of their own: --fresh

    @property
    def environment(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        extra = {"HOME": str(self.home), "PYTHON_DOTENV_DISABLED": "1"}  # the checkout's .env belongs to the developer
        extra["OMP_NUM_THREADS"] = "1"  # tests run side by side
        return {**mine, **extra, **self.variables}

    def start(self, script: str | Path, *arguments: object, cwd: Path | None = None, **streams: int) -> "Run":
        """Start a script, or a module: "-m", its name. In a fork of the zygote, unless it must be a fresh process.

        A script is the checkout's, and one that begins with ./ is in the folder from which it is started.
        """
        command = [*map(str, (script if str(script).startswith(("-m", "./")) else ROOT / script, *arguments))]
        is_training = "pytorch_mnist.py" in {Path(part).name for part in command}
        if is_training and "--data-dir" not in command and not self.whole:
            command += ["--data-dir", str(mnist(300, 200))]
        environment = self.environment
        forked = not self.fresh and early(environment) == early(Machine(ROOT).environment)
        if script == "-m" and not forked:
            environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{self.home}", **environment}
        return Run([sys.executable, *command], cwd or self.home, environment, forked, **streams)

    def run(self, script: str | Path, *arguments: object, code: int | None = 0, **options: Any) -> "Run":
        """Run to the end, with this exit code."""
        run = self.start(script, *arguments, **options)
        try:
            assert run.end() == code or code is None, run.everything
        finally:
            run.kill()
        return run

    def train(self, *arguments: object, code: int = 0, **variables: str) -> "Run":
        return replace(self, variables={**self.variables, **variables}).run("pytorch_mnist.py", *arguments, code=code)

    def configure(self, *parts: str) -> None:
        (self.home / "clearml.conf").write_text("\n".join(parts))

    def read_task(self, task_id: str) -> dict[str, Any]:
        """What the server has of a task, see read_task.py."""
        folder = self.home / f"fetched-{uuid4().hex}"
        folder.mkdir()
        run = self.run("tests/read_task.py", task_id, folder)
        task: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return task

    def outputs(self, name: str) -> Path:
        """The one file of this name below the folder `outputs`."""
        (path,) = self.home.glob(f"outputs/*/{name}")
        return path

    def session(self) -> Path:
        """The zip of the one offline session."""
        (path,) = self.home.glob(".clearml/cache/offline/*.zip")
        return path


def early(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(EARLY)}


HANGS = 300  # seconds after which a run is given up; no promise, and no loaded machine needs them


def plain_start() -> float:
    """The seconds that a run takes now in which nothing is to be waited for."""
    with tempfile.TemporaryDirectory() as home:
        begun = time.monotonic()
        Machine(Path(home)).train("--offline", "--dry-run")
        return time.monotonic() - begun


class Run:
    """A run of a program. Its output goes to files, unless a stream is given: nobody has to read while it comes."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], forked: bool, **given: int):
        self.output = {name: scratch() / f"{uuid4().hex}.{name}" for name in ("stdout", "stderr")}
        kind: Any = Forked if forked else subprocess.Popen
        with ExitStack() as stack:
            streams = {name: stack.enter_context(open(path, "wb")).fileno() for name, path in self.output.items()}
            streams |= {"stdin": stack.enter_context(open(os.devnull)).fileno(), **given}
            self.process = kind(command, cwd=folder, env=environment, start_new_session=True, **streams)
        self.since = time.monotonic()  # what it is timed from: its start, or the last signal
        self.ended = 0.0
        self.waiting = threading.Thread(target=self.wait, daemon=True)
        self.waiting.start()

    def wait(self) -> None:
        self.process.wait()
        self.ended = time.monotonic()  # though the test may look at another run first

    @property
    def returncode(self) -> int:
        return int(self.process.returncode)

    @property
    def stdout(self) -> str:
        return self.output["stdout"].read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self.output["stderr"].read_text(errors="replace")

    @property
    def everything(self) -> str:
        return f"exit code {self.process.returncode}\n{self.stdout}\n{self.stderr}"

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + HANGS
        while words not in self.stdout:
            assert self.waiting.is_alive() or words in self.stdout, self.everything
            if time.monotonic() > deadline:
                self.give_up()
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """To the process and its children, as a terminal's Ctrl-C or a batch system sends it."""
        self.since = time.monotonic()
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End the process, and what it has started and left behind."""
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)

    def give_up(self) -> NoReturn:
        self.process.send_signal(signal.SIGUSR2)  # a fork of the zygote then shows where each of its threads stands
        time.sleep(1)
        self.kill()
        pytest.fail(f"not at an end after {HANGS} s\n{self.everything}")

    def end(self, within: float | None = None) -> int:
        """The exit code. Only a promise of seconds is a bound, to which a busy machine adds its own slowness."""
        self.waiting.join(HANGS)
        if self.waiting.is_alive():
            self.give_up()
        assert not [secret for secret in SECRETS if secret in self.everything]
        if within and (took := self.ended - self.since) > within:
            assert took < within + 3 * plain_start(), self.everything
        return self.returncode

    @property
    def line(self) -> str:
        """The one line on stderr that says how the run ended."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("pytorch_mnist.py: ")]
        assert len(lines) == 1, self.everything
        assert "Traceback" not in self.stdout + self.stderr, self.everything
        return lines[0]

    @property
    def task(self) -> str:
        found = re.search(r"created new task id=(\S+)", self.stdout)
        assert found, self.everything
        return found[1]


def wait_until(something: Callable[[], object], run: Run | None = None) -> None:
    """As long as the run goes on, where one is given."""
    deadline = time.monotonic() + HANGS
    while not something():
        assert run is None or run.process.poll() is None, run.everything
        assert time.monotonic() < deadline
        time.sleep(0.1)


Begin = Callable[..., Run]
AnyStore = TypeVar("AnyStore", bound=Store)


def copy_script(folder: Path) -> Path:
    """The script in a folder of its own, with the package beside it: that is where a .env is read."""
    shutil.copytree(ROOT / "clearml_client", folder / "clearml_client")
    return Path(shutil.copy(ROOT / "pytorch_mnist.py", folder))


def blocks(chapter: str, language: str = "python") -> list[str]:
    """The fenced blocks of a chapter of the pages."""
    chapters = [text for page in ROOT.glob("docs/*.md") for text in page.read_text().split("\n## ")]
    (text,) = [text for text in chapters if text.startswith(chapter)]
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "home").mkdir()
    return Machine(tmp_path / "home")


@pytest.fixture
def online(machine: Machine, stand_in: ClearMLServer) -> ClearMLServer:
    """The stand-in server, in the machine's clearml.conf."""
    machine.configure(stand_in.configuration())
    return stand_in


@pytest.fixture
def own_server(machine: Machine, tmp_path: Path) -> Iterator[ClearMLServer]:
    """A server of the test's own, which it may stop, in the machine's clearml.conf."""
    with ClearMLServer(tmp_path / "clearml-server") as server:
        machine.configure(server.configuration())
        yield server


@pytest.fixture
def begin(machine: Machine) -> Iterator[Begin]:
    """Starts the script; what is still running when the test ends is killed."""
    runs: list[Run] = []

    def start(*arguments: object, script: str | Path = "pytorch_mnist.py", **more: str) -> Run:
        other = replace(machine, variables={**machine.variables, **more})
        runs.append(other.start(script, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.end()


@contextmanager
def silent() -> Iterator[str]:
    """host:port of a socket that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def serving(kind: type[AnyStore], **options: Any) -> Callable[..., Iterator[AnyStore]]:
    """A store for all tests of a worker. They compare with what was there before, or have a place of their own."""

    @pytest.fixture(scope="session")
    def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AnyStore]:
        with kind(tmp_path_factory.mktemp(kind.__name__), **options) as running:
            yield running

    return store


rclone, rclone_tls, gcs = serving(Rclone), serving(Rclone, tls=True), serving(FakeGCS)
seaweed = serving(SeaweedFS)  # it makes a missing bucket on the first upload, as it does by default


@pytest.fixture(autouse=True)
def no_variables_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session", autouse=True)
def no_secret_went_anywhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After all tests: what servers and stores received, checkpoints, sessions. Machine.run looks at the output."""
    yield
    leaks = []
    # A task holds the checkout's uncommitted changes, and these tests' own sources may be among them.
    changes = subprocess.run(["git", "diff", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    secrets = [secret.encode() for secret in SECRETS if secret not in changes]
    for path in tmp_path_factory.getbasetemp().rglob("*"):
        if path.is_file() and not path.is_symlink() and not CONFIGURATION.fullmatch(path.name):
            contents = [path.read_bytes()]
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as packed:
                    contents += map(packed.read, packed.namelist())
            leaks += [path for secret in secrets if secret in b"".join(contents)]
    assert not leaks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fresh", action="store_true", help="start each run from nothing, not in a fork")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """More than cores, since a run waits, too. None for a few files, whose output is wanted as it comes."""
    return 4 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_configure(config: pytest.Config) -> None:
    """All workers of pytest-xdist, which are processes of this one, share what ends all, and what forks for a run."""
    Machine.fresh = Machine.fresh or bool(config.getoption("--fresh"))
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored in a shell's background, and under nohup
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if not hasattr(config, "workerinput"):
        config.add_cleanup(keep())
        if not Machine.fresh:
            config.add_cleanup(start_zygote(Machine(ROOT).environment))
            workers = len(config.option.tx)  # which are forks, too
            config.option.tx = [f"popen//python={shlex.join([sys.executable, zygote.__file__])}"] * workers


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What mostly waits goes first, and so one after the other in one worker, while the others have the cores."""
    items.sort(key=lambda item: item.get_closest_marker("waits") is None)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClearMLServer]:
    with ClearMLServer(tmp_path_factory.mktemp("clearml-server")) as server:
        yield server
