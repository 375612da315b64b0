"""The whole job on a machine without a server: the script as a subprocess, on the real MNIST."""

import argparse
import hashlib
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, Machine
from reading import EPOCH, evaluate, read_session
from torchvision import datasets

import clearml_client
import pytorch_mnist
from clearml_client import checkpoint


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> argparse.Namespace:
    """What the script makes of these arguments. In this process: it is the start of a process that takes seconds."""
    monkeypatch.setattr(sys, "argv", ["pytorch_mnist.py", *map(str, arguments)])
    return checkpoint.parse_args(pytorch_mnist.make_parser())[0]


def test_an_epoch_learns_and_its_progress_bar_stays_at_the_terminal(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its session, brought to a server, is looked at in test_web_ui.py."""
    machine.whole = True
    terminal, far_end = os.openpty()
    run = machine.start("pytorch_mnist.py", "--epochs", 1, stderr=far_end)
    os.close(far_end)
    seen = ""
    with suppress(OSError):  # EIO: the last writer has gone
        while True:
            seen += os.read(terminal, 4096).decode(errors="replace")
    os.close(terminal)
    assert run.end() == 0, seen
    printed = run.stdout
    assert re.search(r"\r *\d+%\|.*/469 \[", seen), seen
    assert printed.startswith("ClearML: offline session, because no server is configured")
    (line,) = EPOCH.findall(printed)
    accuracy = float(line[4])
    assert accuracy >= 98.5
    assert f"\nTest accuracy {line[4]}%\n" in printed
    model = machine.outputs("model.pt")
    assert f"\nModel: {model.relative_to(machine.home)}\n" in printed
    assert {path.name for path in model.parent.iterdir()} == {"model.pt", "mistakes.png", "predictions.csv"}
    assert evaluate(model) == pytest.approx(accuracy, abs=0.005)

    task, _, console = read_session(machine.session())
    assert model.parent.name == task["id"]
    local = {"data_dir", "output_dir", "offline", "queue", "resume"}  # they say nothing on another machine
    assert task["hyperparams"]["Args"].keys() == vars(asked(monkeypatch)).keys() - local
    assert EPOCH.findall(console) == [line]
    assert not re.search(r"\d%\||\r|\x1b", console)


OPTIONS = """
    project-name task-name tags output-uri offline queue epochs batch-size test-batch-size lr momentum weight-decay
    seed device log-interval data-dir dry-run output-dir resume
"""


def test_help_is_a_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        asked(monkeypatch, "--help")
    page = capsys.readouterr().out
    assert {f"--{option}" for option in OPTIONS.split()} <= set(re.findall(r"^  (--[\w-]+)", page, re.MULTILINE))
    assert "(default: 3)" in page
    assert len(page.splitlines()) <= 60  # a screen and a half


def test_a_run_with_wrong_arguments_ends_before_anything_exists(machine: Machine) -> None:
    wrong = machine.train("--epochs", 0, code=2)
    assert wrong.stderr.splitlines()[-1].startswith("pytorch_mnist.py: error: argument --epochs: ")
    assert list(machine.home.iterdir()) == []


def test_env_file_variable_and_option_in_rising_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file begins with a byte order mark. That a run reads the one beside it is in test_storage.py."""
    file, variable, option = (tmp_path / name for name in ("file", "variable", "option"))
    monkeypatch.setattr(clearml_client, "DOTENV", tmp_path / ".env")
    (tmp_path / ".env").write_text(f"CLEARML_OUTPUT_URI={file}\n", encoding="utf-8-sig")

    def target(*arguments: object, **variables: str) -> str:
        monkeypatch.setattr(os, "environ", variables)
        clearml_client.prepare_environment()
        return str(asked(monkeypatch, *arguments).output_uri)

    assert target() == str(file)
    assert target(CLEARML_OUTPUT_URI=str(variable)) == str(variable)
    assert target("--output-uri", option, CLEARML_OUTPUT_URI=str(variable)) == str(option)


WRONG = ["--epochs two", "--batch-size -1", "--batch-size 1000000000", "--device nonsense", "--lr nan", "--momentum 1"]
WRONG += [
    "--nonsense",
    "--seed 4294967296",
    "--output-uri S3://127.0.0.1:9000/b",
    "--output-uri undefined",
    "--output-uri s3://me:SECRET@h/b",
]


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_are_named(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        asked(monkeypatch, *arguments.split())
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("pytorch_mnist.py: error: ")
    assert arguments.split()[0] in line
    assert "SECRET" not in line


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CLEARML_OUTPUT_URI", "127.0.0.1:9000/bucket")
    with pytest.raises(SystemExit, match=r"^2$"):
        asked(monkeypatch)
    said = capsys.readouterr().err
    assert re.search(r"--output-uri: CLEARML_OUTPUT_URI, \S+/\.env: ", said)  # nobody has set it outside


def test_the_data_is_as_published() -> None:
    readme = (ROOT / "data/README.md").read_text()
    for name, md5 in datasets.MNIST.resources:
        content = (ROOT / "data/MNIST/raw" / name).read_bytes()
        assert hashlib.md5(content, usedforsecurity=False).hexdigest() == md5
        assert f"| {name} | {len(content):,} | {md5} |" in readme
