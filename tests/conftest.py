"""What the tests share: the real scripts, started as a user starts them, in a HOME of their own."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that tests can import Net from the script

# What a user's machine may have set, and a test must not see.
FOREIGN = ("CLEARML_", "TRAINS_", "AWS_", "GOOGLE_", "STORAGE_", "AZURE_", "CUDA_")


@dataclass
class Machine:
    """A user's machine: a HOME, a folder to work in, and variables. Its scripts are those of the checkout."""

    home: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        # The checkout's own .env belongs to the developer; matplotlib's cache is made once, not once a test.
        extra = {"HOME": str(self.home), "PYTHON_DOTENV_DISABLED": "1", "MPLCONFIGDIR": str(self.home.parent / "mpl")}
        return {**mine, **extra, **self.variables}

    def start(self, script: str | Path, *arguments: object, **options: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "cwd": self.home}
        return subprocess.Popen(command, env=self.environment, text=True, **{**pipes, **options})  # type: ignore[call-overload, no-any-return]

    def run(self, script: str | Path, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run to the end. Output is at hand on the result; a run that hangs is killed and fails the test."""
        process = self.start(script, *arguments)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def train(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return Machine(self.home, {**self.variables, **variables}).run("pytorch_mnist.py", *arguments)

    def outputs(self, name: str) -> Path:
        """The one file of this name below the folder `outputs`."""
        (path,) = self.home.glob(f"outputs/*/{name}")
        return path

    def session(self) -> Path:
        """The zip of the one offline session."""
        (path,) = self.home.glob(".clearml/cache/offline/*.zip")
        return path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "home").mkdir()
    return Machine(tmp_path / "home")


@pytest.fixture(scope="module")
def module_machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    home = tmp_path_factory.mktemp("module") / "home"
    home.mkdir()
    return Machine(home)


@pytest.fixture(autouse=True)
def no_variables_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)
