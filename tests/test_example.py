"""The whole job on a machine without a server: the script as a subprocess, on the real MNIST."""

import argparse
import hashlib
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from conftest import ROOT, Machine, mnist
from reading import EPOCH, evaluate, read_session
from torchvision import datasets

import clearml_client
import pytorch_mnist

NO_TARGETS = [
    f"--output-uri {uri}"
    for uri in (
        "s3:/models/x",
        "s3://",
        "s3://127.0.0.1:9000",
        "S3://127.0.0.1:9000/b",
        "ftp://host/x",
        "http://host/x",
        "/no/such/parent/x",
        "s3://me:SECRET@h:1/b",
    )
]


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> argparse.Namespace:
    """What the script makes of these arguments. In this process: it is the start of a process that takes seconds."""
    monkeypatch.setattr(sys, "argv", ["pytorch_mnist.py", *map(str, arguments)])
    return pytorch_mnist.parse_args()[0]


def train_at_a_terminal(machine: Machine, *arguments: object) -> tuple[str, str]:
    """What a run printed, and what the terminal saw that its stderr is."""
    terminal, far_end = os.openpty()
    process = machine.start("pytorch_mnist.py", *arguments, stderr=far_end)
    os.close(far_end)
    seen = b""
    with suppress(OSError):  # EIO: the last writer has gone
        while True:
            seen += os.read(terminal, 4096)
    os.close(terminal)
    printed, _ = process.communicate()
    assert process.returncode == 0, seen.decode()
    return printed, seen.decode()


def test_an_epoch_learns_and_its_session_holds_everything_but_the_progress_bar(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.whole = True
    names = ["--project-name", "demo-project", "--task-name", "first"]
    printed, seen = train_at_a_terminal(machine, *names, "--epochs", 1)
    assert printed.startswith("ClearML: offline session, because no server is configured")
    (line,) = EPOCH.findall(printed)
    accuracy = float(line[4])
    assert accuracy >= 98.5
    assert f"Test accuracy {line[4]}% after 1 epoch" in printed
    model = machine.outputs("model.pt")
    assert f"Model: {model.relative_to(machine.home)}" in printed
    assert f"--import-offline-session {machine.session()}" in printed
    assert evaluate(model) == pytest.approx(accuracy, abs=0.005)
    assert re.search(r"\r *\d+%\|.*/469 \[", seen), seen

    task, events, console = read_session(machine.session())
    arguments = {name: entry["value"] for name, entry in task["hyperparams"]["Args"].items()}
    local = {"data_dir", "output_dir", "offline", "queue", "resume"}  # they say nothing on another machine
    assert arguments.keys() == vars(asked(monkeypatch)).keys() - local
    assert arguments["epochs"] == "1"
    assert (arguments["project_name"], arguments["task_name"]) == ("demo-project", "first")
    has_the_printed_figures(events, line)
    assert EPOCH.findall(console) == [line]
    assert not re.search(r"\d%\||\r|\x1b", console)
    with ZipFile(machine.session()) as session:
        (name,) = [name for name in session.namelist() if name.endswith("artifacts/model/model.pt")]
        assert session.read(name) == model.read_bytes()


def has_the_printed_figures(events: list[dict[str, Any]], line: tuple[str, ...]) -> None:
    last = [event for event in events if event.get("iter") == 469 and "value" in event]
    scalars = {(event["metric"], event["variant"]): event["value"] for event in last}
    assert scalars["loss", "train"] == pytest.approx(float(line[2]), abs=5e-5)
    assert scalars["loss", "test"] == pytest.approx(float(line[3]), abs=5e-5)
    assert scalars["accuracy", "test"] == pytest.approx(float(line[4]) / 100, abs=5e-5)
    assert scalars["images per second", "train"] > 0
    for variant in ("train batch", "OneCycleLR"):
        assert [event["iter"] for event in events if event.get("variant") == variant] == [100, 200, 300, 400]


def test_the_seed_decides_and_a_relative_output_dir_lies_where_the_run_began(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's figures are compared with those of trainings in this process."""
    run = machine.train("--dry-run", "--seed", 7, "--output-dir", "elsewhere")
    assert run.returncode == 0, run.stderr
    (line,) = EPOCH.findall(run.stdout)

    def figures(seed: int) -> tuple[float, float]:
        args = asked(monkeypatch, "--dry-run", "--seed", seed, "--data-dir", mnist(600, 200))
        training = pytorch_mnist.Training(args, pytorch_mnist.RECIPE, {})
        (loss,), _, _ = training.epoch()
        return loss, training.test()[1]

    printed = pytest.approx((float(line[2]), float(line[3])), abs=1e-4)
    assert figures(7) == printed != figures(8)
    assert len(list(machine.home.glob("elsewhere/*/model.pt"))) == 1
    assert not (machine.home / "data").exists()


def test_help_is_a_page_and_wrong_arguments_end_before_anything_exists(machine: Machine) -> None:
    page = machine.run("pytorch_mnist.py", "--help")
    assert page.returncode == 0
    for option in ("--project-name", "--output-uri", "CLEARML_OUTPUT_URI", "--dry-run", "(default: 3)"):
        assert option in page.stdout
    assert len(page.stdout.splitlines()) <= 60  # a screen and a half
    wrong = machine.train("--epochs", 0)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("pytorch_mnist.py: error: argument --epochs: ")
    assert "Traceback" not in wrong.stderr
    assert list(machine.home.iterdir()) == []


def test_env_file_variable_and_option_in_rising_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """That a run reads the file beside it, and stores there, is in test_configuration.py."""
    file, variable, option = (tmp_path / name for name in ("file", "variable", "option"))
    monkeypatch.setattr(clearml_client, "DOTENV", tmp_path / ".env")
    (tmp_path / ".env").write_text(f"CLEARML_OUTPUT_URI={file}\n")

    def target(*arguments: object, **variables: str) -> str:
        monkeypatch.setattr(os, "environ", variables)
        clearml_client.load_dotenv()
        return str(asked(monkeypatch, *arguments).output_uri)

    assert target() == str(file)
    assert target(CLEARML_OUTPUT_URI=str(variable)) == str(variable)
    assert target("--output-uri", option, CLEARML_OUTPUT_URI=str(variable)) == str(option)


@pytest.mark.parametrize(
    "arguments",
    ["--epochs two", "--batch-size -1", "--device nonsense", "--lr nan", "--momentum 1", "--nonsense", *NO_TARGETS],
)
def test_wrong_arguments_are_named(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        asked(monkeypatch, *arguments.split())
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
