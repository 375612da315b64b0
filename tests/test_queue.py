"""A run that a ClearML agent has: what is refused here, what the real agent makes of it there.

The agent is in an environment of its own, as it is at its users'. It runs the script by the tests' interpreter, and
installs nothing: an installation would be three gigabytes.
"""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from clearml_server import ClearMLServer, Doc
from conftest import ROOT, Machine, Run, blocks, mnist, wait_until
from reading import stored_curves
from stores import Rclone

from clearml_client.agent import ask_git, check_repository, exclude_lock_from_diff, requirements
from clearml_client.errors import RunError

NOT_PUSHED = "git commit --quiet --allow-empty --message 'of today'"
PRODUCT = (".gitattributes", ".gitignore", "clearml_client", "pyproject.toml", "pytorch_mnist.py", "uv.lock")
ARGUMENTS = ("--batch-size", 50, "--log-interval", 1, "--project-name", "queued", "--task-name", "from here")


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program clearml-agent."""
    folder = tmp_path_factory.mktemp("agent") / "environment"
    subprocess.run(["uv", "venv", "--quiet", folder], check=True)
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", folder, "clearml-agent==3.0.3"], check=True)
    return folder / "bin/clearml-agent"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of this repository, with a bit of MNIST, cloned from a remote and like it."""
    checkout = tmp_path_factory.mktemp("original") / "checkout"
    shutil.copytree(mnist(300, 200), checkout / "data")
    for name in PRODUCT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    shell(
        checkout,
        "git init --quiet --initial-branch main && git config user.name me && git config user.email me@example.com",
        "git add . && git commit --quiet --message 'as cloned' && git clone --quiet --bare . ../remote.git",
        f"git remote add origin {checkout.parent.as_uri()}/remote.git && git fetch --quiet",
    )
    return checkout


def shell(folder: Path, *commands: str) -> None:
    for command in commands:
        subprocess.run(command, shell=True, cwd=folder, check=True)


@pytest.fixture
def checkout(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkout"))


@pytest.fixture
def start_agent(agent: Path, tmp_path: Path, stand_in: ClearMLServer) -> Iterator[Callable[..., Run]]:
    """Starts clearml-agent on a machine of its own, without the checkout."""
    machine = Machine(tmp_path / "agent")
    machine.home.mkdir()
    machine.variables = {
        "CLEARML_CONFIG_FILE": str(machine.home / "clearml.conf"),
        "CLEARML_AGENT_SKIP_PIP_VENV_INSTALL": sys.executable,
        "CLEARML_AGENT_SKIP_PYTHON_ENV_INSTALL": "1",
        "TMPDIR": str(machine.home),
    }
    runs: list[Run] = []

    def start(*arguments: str, configuration: str = "", poll: float = 0.5) -> Run:
        machine.configure(stand_in.configuration(), configuration)
        machine.variables["CLEARML_AGENT_QUEUE_POLL_FREQ_SEC"] = str(poll)
        runs.append(Run([str(agent), *arguments], machine.home, machine.environment, forked=False))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def arguments(task: Doc) -> dict[str, str]:
    return {name: item["value"] for name, item in task["hyperparams"]["Args"].items()}


def queue(machine: Machine, checkout: Path, *arguments: object) -> str:
    """The task that the script has put into the queue `default`, from the checkout, where the README has it started."""
    run = machine.run("./pytorch_mnist.py", "--queue", "default", *arguments, *ARGUMENTS, cwd=checkout)
    found = re.search(r"Switching to remote execution, output log page \S+/tasks/(\w+)/", run.everything)
    assert found, "it names the page where to look"
    return found[1]


def test_an_agent_trains_what_was_queued(
    machine: Machine, online: ClearMLServer, checkout: Path, rclone: Rclone, start_agent: Callable[..., Run]
) -> None:
    """With the user's own change, and without what uv adds to the committed pins: more than the SDK stores in all.

    A device that only an agent may have is not refused here. A clone has another, and other values, which count.
    """
    target = f"s3://{rclone.bucket}/queued"
    machine.variables |= {"CLEARML_OUTPUT_URI": target, **rclone.environment()}
    script = checkout / "pytorch_mnist.py"
    script.write_text(script.read_text().replace("CLASSES = ", 'print("an uncommitted change")\nCLASSES = ', 1))
    with open(checkout / "uv.lock", "a") as lock:
        lock.write("# what uv adds\n" * 600_000)
    queued = online.tasks[queue(machine, checkout, "--device", "cuda:7")]
    assert queued["status"] == "queued"
    assert "an uncommitted change" in queued["script"]["diff"]
    assert "what uv adds" not in queued["script"]["diff"]
    assert queued["script"]["requirements"]["pip"].splitlines() == requirements()
    assert arguments(queued).keys() & {"data_dir", "output_dir", "offline", "queue", "resume"} == set()
    other = str(online.tasks_clone(task=queued["id"])["id"])  # as in the web UI
    completed = online.tasks[other]
    for name, value in {"device": "cpu", "epochs": "2", "lr": "0.05"}.items():
        completed["hyperparams"]["Args"][name]["value"] = value
    asked = arguments(completed)
    online.tasks_dequeue(task=queued["id"])
    online.tasks_enqueue(task=other, queue_name="default")

    shutil.move(checkout, checkout.with_name("moved"))
    (keys,) = [block for block in blocks("A queue", "hocon") if "environment" in block]
    keys = keys.replace("ACCESS-KEY", rclone.access_key).replace("SECRET-KEY", rclone.secret_key)
    keys = keys.replace("https://storage.example.com:9000", rclone.endpoint)  # no CLEARML_OUTPUT_URI
    daemon = start_agent("daemon", "--queue", "default", "--foreground", configuration=keys)
    wait_until(lambda: completed["status"] in ("completed", "failed"), daemon)
    assert completed["status"] == "completed", console(online, other)
    assert "an uncommitted change" in console(online, other)
    assert arguments(completed) == asked
    assert completed["output"]["destination"] == target
    curves = stored_curves(online, other)
    assert len(curves["accuracy", "test"]) == 2
    assert max(curves["learning rate", "OneCycleLR"].values()) == pytest.approx(0.05, rel=0.2)
    (model,) = machine.read_task(other)["models"]
    assert model["url"].startswith(target)
    (trained,) = checkout.with_name("agent").rglob("outputs/*/model.pt")
    assert rclone.get(model["url"].removeprefix(f"s3://{rclone.bucket}/")) == trained.read_bytes()


@pytest.mark.waits
def test_a_task_that_is_aborted_is_stopped_and_begins_anew_when_it_is_queued_again(
    machine: Machine, online: ClearMLServer, checkout: Path, start_agent: Callable[..., Run]
) -> None:
    """Also where the run sees the abort before the agent does, which then has its exit code only."""
    queued = queue(machine, checkout, "--epochs", 10_000)
    daemon = start_agent("daemon", "--queue", "default", "--foreground", poll=30)
    task = online.tasks[queued]
    wait_until(lambda: stored_curves(online, queued).get(("accuracy", "test")), daemon)
    online.tasks_stop(task=queued)  # Abort in the web UI
    wait_until(lambda: task["status"] != "in_progress", daemon)
    assert task["status"] == "stopped", console(online, queued)
    (line,) = [line for line in console(online, queued).splitlines() if line.startswith("pytorch_mnist.py: ")]
    assert line == "pytorch_mnist.py: aborted in the web UI"  # and no file of the agent's
    daemon.signal(signal.SIGKILL)

    old = {event["timestamp"] for event in online.events[queued].values()}
    task["hyperparams"]["Args"]["epochs"]["value"] = "2"
    online.tasks_enqueue(task=queued, queue_name="default")
    again = start_agent("execute", "--id", queued)
    assert again.end() == 0, again.everything
    assert task["status"] == "completed"
    new = [event for event in online.events[queued].values() if event["timestamp"] not in old]
    assert sorted(event["iter"] for event in new if event["variant"] == "train batch") == list(range(1, 13))


def console(server: ClearMLServer, task: str) -> str:
    return "".join(event["msg"] for event in server.events[task].values() if event["type"] == "log")


# --- what is refused here, before anything exists ---------------------------------------------------------------------
PICTURES = "data/MNIST/raw/t10k-images-idx3-ubyte.gz"
MANY_CHANGES = "yes '# a comment' | head -n 50000 >> pyproject.toml"
PULL_REQUEST = f"{NOT_PUSHED}; git push -q origin HEAD:refs/pull/1/merge; git update-ref refs/remotes/pull/1/merge HEAD"


def test_a_checkout_as_cloned_or_of_a_tag_is_well(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What git does not track, and the run does not use, is named only."""
    check_repository(checkout / "pytorch_mnist.py")
    assert capsys.readouterr().out == ""
    # With a message of its own, or it is the same commit as one of the same second that must not be pushed.
    shell(checkout, f"{NOT_PUSHED} --message tagged; git push -q origin HEAD:refs/tags/v2")
    shell(checkout, "git checkout -q --detach; touch notes.txt")
    check_repository(checkout / "pytorch_mnist.py")
    assert capsys.readouterr().out == "Not at the agent, since git does not track them: notes.txt\n"


@pytest.mark.parametrize(
    ("spoil", "words", "cure"),
    [
        ("git remote remove origin", "has no remote for an agent to clone", "git remote add origin URL"),
        (NOT_PUSHED, "is not pushed: an agent cannot get it", "git push"),
        (PULL_REQUEST, "is not pushed: an agent cannot get it", "git push"),
        (f"{NOT_PUSHED}; git remote set-url origin /no", "git ls-remote in .*'/no' does not appear to be a git", ""),
        ("rm -rf .git", "git rev-parse in .*: not a git repository", "commit, push"),
        (MANY_CHANGES, "bytes of uncommitted changes; an agent gets at most 500,000", "commit and push them"),
        (f"echo | gzip > {PICTURES}", "cannot apply uncommitted changes of binary files", "commit and push them"),
        ("GIT_TEST_ASSUME_DIFFERENT_OWNER=1", "dubious ownership", "git config --global --add safe.directory {}"),
        ("PATH=/nowhere", "git is missing here", "install git"),
    ],
)
def test_what_an_agent_could_not_run_is_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, spoil: str, words: str, cure: str
) -> None:
    """By a command in the checkout, or a variable of this process."""
    name, _, value = spoil.partition("=")
    if name.isupper():
        monkeypatch.setenv(name, value)
    else:
        shell(checkout, spoil)
    with pytest.raises(RunError, match=words) as refused:
        check_repository(checkout / "pytorch_mnist.py")
    assert cure.format(checkout) in refused.value.cure


@pytest.mark.parametrize(("count", "key"), [("", 0), ("none", 0), ("2", 2)])
def test_the_lock_is_no_change(checkout: Path, monkeypatch: pytest.MonkeyPatch, count: str, key: int) -> None:
    """Also where the variable in which git counts them says something else."""
    given = {f"GIT_CONFIG_{part}_{number}": "a.b" for number in range(2) for part in ("KEY", "VALUE")}
    monkeypatch.setattr(os, "environ", {**os.environ, **given, "GIT_CONFIG_COUNT": count})
    shell(checkout, "echo '# what uv adds' >> uv.lock")
    exclude_lock_from_diff()
    assert os.environ[f"GIT_CONFIG_KEY_{key}"] == "diff.pins.textconv"
    assert ask_git(checkout, "diff", "HEAD") == ""


def test_the_packages_that_an_agent_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pyproject.toml names them, with the versions that are here, and what the storage needs."""
    monkeypatch.setattr("clearml_client.agent.ROOT", tmp_path)
    assert requirements("gs://bucket") == []
    groups = 'base = ["torch", "a-package; sys_platform == \'none\'"]\nclient = ["tqdm>=4", {include-group = "base"}]'
    (tmp_path / "pyproject.toml").write_text(f"[dependency-groups]\n{groups}\n")
    own = [f"tqdm=={version('tqdm')}", f"torch=={version('torch')}"]
    assert sorted(requirements()) == sorted(own)
    assert sorted(requirements("gs://b")) == sorted([*own, f"google-cloud-storage=={version('google-cloud-storage')}"])


def test_a_module_that_git_does_not_track_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "mine_alone.py").touch()
    monkeypatch.syspath_prepend(checkout)
    monkeypatch.setattr(sys, "base_prefix", str(checkout.parent))  # as /usr is, where a checkout may lie, too
    importlib.import_module("mine_alone")
    with pytest.raises(RunError, match=r"git does not track mine_alone.py: an agent would not have it") as refused:
        check_repository(checkout / "pytorch_mnist.py")
    assert refused.value.cure == "git add mine_alone.py"
    shell(checkout, refused.value.cure)
    check_repository(checkout / "clearml_client/doctor.py")  # from a folder below, of which git lists the files alone


def test_what_is_refused_leaves_no_task(machine: Machine, online: ClearMLServer, checkout: Path) -> None:
    shell(checkout, NOT_PUSHED)
    before = len(online.tasks)
    for script, queue, words in (
        (checkout / "pytorch_mnist.py", "default", "is not pushed: an agent cannot get it; git push"),
        (ROOT / "pytorch_mnist.py", "defualt", "no queue 'defualt' on the ClearML server; its queues: default"),
    ):
        run = machine.run(script, "--queue", queue, code=1)
        assert run.stderr.splitlines() == [run.line]
        assert words in run.line
    assert len(online.tasks) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--queue", ""], "argument --queue: an empty name"),
        (["--queue", "default", "--offline"], "argument --queue: not allowed with --offline"),
        (["--queue", "default"], "cannot queue an offline session; it is offline because no server"),
    ],
)
def test_a_queue_without_a_name_or_a_server_is_wrong_use(machine: Machine, arguments: list[str], words: str) -> None:
    run = machine.run("pytorch_mnist.py", *arguments, code=2)
    assert words in run.line
    assert not list(machine.home.glob("outputs/*"))
