"""What CONTRIBUTING.md says of options and of the lock."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, copy_script
from test_make_it_yours import apply


def test_an_option_is_added_in_four_places(machine: Machine, online: ClearMLServer) -> None:
    (diff,) = re.findall("```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    script = copy_script(machine.home)
    script.write_text(apply(diff, script.read_text()))
    run = machine.run(script, "--dry-run", "--dropout", 0.25)
    task = machine.read_task(run.task)
    assert task["parameters"]["Args/dropout"] == "0.25"
    assert "Dropout(p=0.25" in task["network"]


def pins() -> str:
    return subprocess.check_output(["git", "show", "HEAD:uv.lock"], cwd=ROOT, text=True)


def uv(folder: Path, *arguments: str) -> tuple[int, str]:
    mine = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(["uv", *arguments], cwd=folder, env=mine, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_dockerfile_syncs_the_pinned_versions(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "uv.lock").write_text(pins())
    for option in ("--locked", "--frozen"):
        code, said = uv(tmp_path, "sync", "--dry-run", option)
        assert (code, f"`{option}`" in said) == (1, True), said
    code, said = uv(tmp_path, "sync", "--dry-run", "--group", "client")
    assert code == 0, said
    installed = set(re.findall(r"^ \+ (\S+)==(\S+)", said, re.MULTILINE))
    assert {"clearml", "torch"} <= {name for name, _ in installed}
    assert installed <= set(re.findall(r'^name = "(.*)"\nversion = "(.*)"', pins(), re.MULTILINE))


@pytest.mark.parametrize(
    ("added", "words"),
    [
        ('sdist = { url = "https://index.invalid/a.tar.gz" }\n', "strip it: .ci/lock --strip"),
        ("", "does not hold the pins of pyproject.toml: run .ci/lock"),  # they are another project's
    ],
)
def test_a_wrong_lock_says_what_to_do(added: str, words: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "a"\nversion = "1"\nrequires-python = ">=3.11"\n')
    (tmp_path / "uv.lock").write_text(pins() + added)
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@example.com"]
    for command in (["init"], ["add", "uv.lock"], ["commit", "--message", "lock"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    done = subprocess.run([".ci/lock", "--check"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, words in done.stderr) == (1, True), done.stderr


def test_the_changelog_begins_with_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
