"""The pages are right: links, options, files, commands with their output, and each block, as a reader copies it."""

import re
import shlex
import socket
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from clearml.backend_config.bucket_config import AzureContainerConfigurations
from clearml.utilities.pyhocon import ConfigFactory
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, blocks, copy_script, mnist
from reading import read, stored_curves
from stores import Rclone

PAGES = {str(page.relative_to(ROOT)): page.read_text() for part in ("", "[!.]*/") for page in ROOT.glob(f"{part}*.md")}
STORAGE = PAGES["docs/storage.md"]
DEMO = ("--project-name", "demo-project", "--task-name")


def fenced(text: str, language: str) -> list[str]:
    """Its blocks, without those behind a comment such as <!-- needs a server of your own -->."""
    return re.findall(rf"(?<!-->\n)^```(?:{language})\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# --- links, names and commands ----------------------------------------------------------------------------------------
def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall("^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_links_options_and_files_that_a_page_names_are_there(page: str) -> None:
    """Of the repository; what a run makes, or an option in the middle of a command, is of no account."""
    for target in re.findall(r'(?:\]\(|src=")(?!https?://)([^)"\s]+)', PAGES[page]):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target
    sources = [ROOT / "pytorch_mnist.py", ROOT / "tests/conftest.py", *ROOT.glob("clearml_client/*.py")]
    options = {option for file in sources for option in re.findall(r'"(--[a-z-]+)"', file.read_text())}
    assert set(re.findall("`(--[a-z-]+)", PAGES[page])) <= options
    named = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|lock|default)|data/[\w/]+|\.ci/\w+)`", PAGES[page])
    for name in named:
        assert (ROOT / name).exists() or ((ROOT / page).parent / name).exists(), name


def archive(machine: Machine, server: ClearMLServer, uri: str) -> None:
    """Make three old tasks, of which the newest is published, and the oldest has lost the records of its objects."""
    for name, days in {"first": 45, "second": 44, "third": 43}.items():
        task = server.tasks[machine.train("--dry-run", *DEMO, name, "--output-uri", uri).task]
        task |= {"system_tags": ["archived"], "status_changed": (datetime.now(UTC) - timedelta(days)).isoformat()}
        if name == "first":
            server.events[task["id"]].clear()
            server.models.clear()
            task |= {"execution": {"artifacts": []}, "models": {"input": [], "output": []}}
    task["status"] = "published"


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(PAGES[page], "bash|console")])
def test_commands_run_and_print_what_the_page_shows(
    page: str, machine: Machine, stand_in: ClearMLServer, rclone: Rclone
) -> None:
    """But for the figures. The README begins without a server."""
    if page != "README.md":
        machine.configure(stand_in.configuration(), rclone.clearml_conf())
    if page == "docs/clean-up.md":
        archive(machine, stand_in, rclone.uri())
    printed = ""
    for command in re.split("\n| && ", "".join(fenced(PAGES[page], "bash|console")).rstrip()):
        if command in ("pip install uv", "uv run --group test pytest"):  # .ci/run does both
            continue
        first, second, *words = shlex.split(command, comments=True)
        assert (first, second) == ("uv", "run"), f"mark what no test can run: {command}"
        done = machine.run(*words, *["--yes"] * ("--delete" in words))  # here is no terminal on which it could ask
        printed += done.stdout.replace(rclone.host, "storage.example.com:9000")
    figures = re.compile(r"[0-9a-f]{32}|[\d,.]+")
    shown = figures.sub("0", "".join(fenced(PAGES[page], "text")))
    assert set(shown.splitlines()) <= set(figures.sub("0", printed).splitlines())


def test_the_calls_of_the_readme_are_a_whole_script(machine: Machine, online: ClearMLServer) -> None:
    machine.configure(online.configuration())
    machine.variables["CLEARML_OUTPUT_URI"] = str(machine.home / "store")
    (machine.home / "clearml_client").symlink_to(ROOT / "clearml_client")
    (machine.home / "line.py").write_text(fenced(PAGES["README.md"], "python")[0])
    run = machine.run(machine.home / "line.py")
    assert run.stderr == ""
    task = online.tasks[run.task]
    (model,) = [model for model in online.models.values() if model["task"] == run.task]
    assert (task["status"], task["name"]) == ("completed", "line")
    assert [*stored_curves(online, run.task)["loss", "train"]] == [*range(100)]
    assert re.fullmatch(f"file://{machine.home}/store/.*/models/line.pt", model["uri"])
    assert read(machine.home / "line.pt")["weight"].item() == pytest.approx(3, abs=0.5)
    alone = replace(machine, variables={"CLEARML_OFFLINE_MODE": "1"}).run(machine.home / "line.py", code=1)
    assert alone.stderr.startswith("line.py: error: OutputModel needs a ClearML server; offline, task.upload_artifact")


# --- the chapters -----------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the SDK's pyparsing
def test_what_pages_say_is_what_the_programs_say() -> None:
    """The SDK reads the block for Azure; .env.default has each URI; what is printed, and a search, by its own words."""
    _, block = fenced(STORAGE, "hocon")
    (entry,) = ConfigFactory.parse_string(block)["sdk.azure.storage.containers"]
    uri = "azure://account.blob.core.windows.net/container/path"
    used = AzureContainerConfigurations.from_config({"containers": [entry]}).get_config_by_uri(uri)
    assert (used.account_name, used.account_key, used.container_name) == ("account", "SECRET-KEY", "container")
    kinds, pitfalls = (STORAGE.split(start)[1].split("\n\n")[0] for start in ("| What you have", "| What is printed"))
    example = (ROOT / ".env.default").read_text()
    for said in re.findall("`((?:s3|gs|azure):.*?|/mnt/.*?|AWS_[A-Z_]+)[=`]", kinds):
        assert re.search(rf"[ =]{re.escape(said)}[=\n]", example), said
    code = "".join(source.read_text() for source in ROOT.glob("clearml_client/*.py"))
    for said in re.findall("`(.*?)`", "".join(row.split("|")[1] for row in pitfalls.splitlines()[2:])):
        assert all(part in code for part in said.split("…")), said
    script = (ROOT / "pytorch_mnist.py").read_text()
    for said in ("lr", "momentum"):
        assert f"`Args/{said}`" in PAGES["docs/queue.md"]
        assert f'"--{said}"' in script
    assert 'report_scalar("accuracy", "test", accuracy' in script


def test_the_model_comes_back(machine: Machine, online: ClearMLServer, rclone: Rclone, tmp_path: Path) -> None:
    """The newest of a name, from wherever it was stored."""
    machine.configure(online.configuration(), rclone.clearml_conf())
    training = ["--data-dir", mnist(1000, 200), "--batch-size", 25, "--epochs", 1]
    targets = {"in a store": rclone.uri("models"), "on the file server": "", "in a folder": tmp_path / "models"}
    (block,) = blocks("Use the model")
    program = ""
    for name, target in targets.items():
        machine.train(*DEMO, name, *training, "--output-uri", target)
        program += block.replace('"first"', repr(name))
    for module in ("pytorch_mnist.py", "clearml_client"):  # "in the checkout"
        (machine.home / module).symlink_to(ROOT / module)
    (machine.home / "use.py").write_text(program)
    used = machine.run(machine.home / "use.py")
    assert used.stdout.splitlines() == ["7 is read as 7"] * len(targets), used.stderr


def test_what_the_page_turns_off_is_not_sent(machine: Machine, online: ClearMLServer, tmp_path: Path) -> None:
    """Nor is a password in the address of the repository, in any run."""
    script = copy_script(tmp_path / "copy")
    (setting,), (call,) = (fenced(PAGES["docs/security.md"], language) for language in ("hocon", "python"))
    arguments = call[call.index("auto_") : call.rindex(")")]
    script.write_text(script.read_text().replace("auto_connect_frameworks=", f"{arguments}, auto_connect_frameworks="))
    commit = "git init -q && git add . && git -c user.name=me -c user.email=me@example.com commit -qm one"
    others = f"git remote add origin https://me:a-password@git.invalid/repository && echo '# uncommitted' >> {script}"
    subprocess.run(f"{commit} && {others}", shell=True, cwd=script.parent, check=True)
    machine.configure(online.configuration(), setting)
    machine.variables["CLEARML_WORKER_NAME"] = "somewhere"
    run = machine.run(script, "--dry-run")
    sent = repr([online.tasks[run.task], online.events[run.task]])
    assert "https://git.invalid/repository" in sent
    for word in ("a-password", "# uncommitted", "epoch 1/1", f"'{socket.gethostname()}'"):
        assert word not in sent
