"""The whole job on a machine without a server: the script as a subprocess, on the real MNIST."""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import ROOT, Machine
from reading import EPOCH, evaluate, read_session
from torchvision import datasets

import pytorch_mnist

NO_TARGETS = [
    f"--output-uri {uri}"
    for uri in (
        "s3:/models/x",
        "s3://",
        "s3://127.0.0.1:9000",
        "ftp://host/x",
        "http://host/x",
        "/no/such/parent/x",
        "s3://me:SECRET@h:1/b",
    )
]


@pytest.fixture(scope="module")
def epoch(module_machine: Machine) -> tuple[Machine, subprocess.CompletedProcess[str]]:
    """One whole epoch, once for all tests that look at it."""
    run = module_machine.train("--project-name", "demo-project", "--task-name", "first", "--epochs", 1)
    assert run.returncode == 0, run.stderr
    return module_machine, run


def test_an_epoch_learns_and_says_where_everything_went(
    epoch: tuple[Machine, subprocess.CompletedProcess[str]],
) -> None:
    machine, run = epoch
    assert run.stdout.startswith("ClearML: offline session, because no server is configured")
    (line,) = EPOCH.findall(run.stdout)
    accuracy = float(line[4])
    assert accuracy >= 98.5
    assert f"Test accuracy {line[4]}% after 1 epoch" in run.stdout
    model = machine.outputs("model.pt")
    assert f"Model: {model.relative_to(machine.home)}" in run.stdout
    assert f"--import-offline-session {machine.session()}" in run.stdout
    assert evaluate(model) == pytest.approx(accuracy, abs=0.005)


def test_the_session_holds_arguments_scalars_console_and_model(
    epoch: tuple[Machine, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    machine, run = epoch
    task, events, console = read_session(machine.session())
    arguments = {name: entry["value"] for name, entry in task["hyperparams"]["Args"].items()}
    options = set(re.findall(r"^  --([a-z-]+)", machine.run("pytorch_mnist.py", "--help").stdout, re.MULTILINE))
    local = {"data-dir", "output-dir", "offline", "queue", "resume"}  # they say nothing on another machine
    assert {name.replace("_", "-") for name in arguments} == options - local
    assert arguments["epochs"] == "1"
    assert (arguments["project_name"], arguments["task_name"]) == ("demo-project", "first")

    (line,) = EPOCH.findall(run.stdout)
    scalars = {
        (event["metric"], event["variant"]): event["value"]
        for event in events
        if event.get("iter") == 469 and "value" in event
    }
    assert scalars["loss", "train"] == pytest.approx(float(line[2]), abs=5e-5)
    assert scalars["loss", "test"] == pytest.approx(float(line[3]), abs=5e-5)
    assert scalars["accuracy", "test"] == pytest.approx(float(line[4]) / 100, abs=5e-5)
    assert scalars["images per second", "train"] > 0
    for variant in ("train batch", "OneCycleLR"):
        assert [event["iter"] for event in events if event.get("variant") == variant] == [100, 200, 300, 400]

    assert len(EPOCH.findall(console)) == 1
    assert "\r" not in console
    assert "\x1b" not in console

    with ZipFile(machine.session()) as session:
        (name,) = [name for name in session.namelist() if name.endswith("artifacts/model/model.pt")]
        session.extract(name, tmp_path)
    assert (tmp_path / name).read_bytes() == machine.outputs("model.pt").read_bytes()


def test_help_is_a_page(machine: Machine) -> None:
    run = machine.run("pytorch_mnist.py", "--help")
    assert run.returncode == 0
    for option in ("--project-name", "--output-uri", "CLEARML_OUTPUT_URI", "--dry-run", "(default: 3)"):
        assert option in run.stdout
    assert len(run.stdout.splitlines()) <= 60  # a screen and a half


def test_env_file_variable_and_option_in_rising_precedence(tmp_path: Path) -> None:
    """`.env` stands beside the script, so the script gets a folder of its own here."""
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    checkout.mkdir()
    home.mkdir()
    shutil.copy(ROOT / "pytorch_mnist.py", checkout)
    shutil.copytree(ROOT / "clearml_client", checkout / "clearml_client")
    places = {name: tmp_path / name for name in ("file", "variable", "option")}
    (checkout / ".env").write_text(f"CLEARML_OUTPUT_URI={places['file']}\n")
    machine = Machine(home, {"PYTHON_DOTENV_DISABLED": "0"})

    def train(*arguments: object, **variables: str) -> set[str]:
        for place in places.values():
            shutil.rmtree(place, ignore_errors=True)
        run = Machine(home, {**machine.variables, **variables}).run(
            checkout / "pytorch_mnist.py", "--dry-run", "--data-dir", ROOT / "data", *arguments
        )
        assert run.returncode == 0, run.stderr
        return {name for name, place in places.items() if list(place.rglob("model.pt"))}

    assert train() == {"file"}
    assert train(CLEARML_OUTPUT_URI=str(places["variable"])) == {"variable"}
    assert train("--output-uri", places["option"], CLEARML_OUTPUT_URI=str(places["variable"])) == {"option"}


def test_the_seed_holds(machine: Machine) -> None:
    def figures(seed: int) -> tuple[str, ...]:
        run = machine.train("--dry-run", "--seed", seed)
        assert run.returncode == 0, run.stderr
        (line,) = EPOCH.findall(run.stdout)
        return tuple(line[2:4])

    assert figures(7) == figures(7) != figures(8)


def test_from_another_folder_a_relative_output_dir_lies_there(machine: Machine) -> None:
    run = machine.train("--dry-run", "--output-dir", "elsewhere")
    assert run.returncode == 0, run.stderr
    assert len(list(machine.home.glob("elsewhere/*/model.pt"))) == 1
    assert not (machine.home / "data").exists()


def test_wrong_arguments_end_before_anything_exists(machine: Machine) -> None:
    run = machine.train("--epochs", 0)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("pytorch_mnist.py: error: argument --epochs: ")
    assert "Traceback" not in run.stderr
    assert list(machine.home.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    ["--epochs two", "--batch-size -1", "--device nonsense", "--lr nan", "--momentum 1", "--nonsense", *NO_TARGETS],
)
def test_wrong_arguments_are_named(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: it is the start of a process that takes seconds."""
    monkeypatch.setattr(sys, "argv", ["pytorch_mnist.py", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        pytorch_mnist.parse_args()
    assert ended.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("pytorch_mnist.py: error: ")
    assert arguments.split()[0] in line
    assert "SECRET" not in line


def test_the_data_is_as_published() -> None:
    readme = (ROOT / "data/README.md").read_text()
    for name, md5 in datasets.MNIST.resources:
        content = (ROOT / "data/MNIST/raw" / name).read_bytes()
        assert hashlib.md5(content, usedforsecurity=False).hexdigest() == md5
        assert f"| {name} | {len(content):,} | {md5} |" in readme
