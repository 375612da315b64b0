"""Where the model goes: every kind of storage as README and .env.default have it, and every way in which it fails."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, silent
from reading import EPOCH, evaluate
from stores import CHECKSUM, FakeGCS, Plug, Rclone, S3Store, SeaweedFS, Store, free_port

WRONG_SECRET = uuid4().hex  # not a literal, which a task's uncommitted changes could hold
README = (ROOT / "README.md").read_text()


def readme_block(heading: str, number: int = 0) -> str:
    """A fenced block of the README's storage chapter, without its comments."""
    chapter = README.split(f"### {heading}\n")[1].split("\n##")[0]
    block = re.findall(r"^```(?:hocon|sh)\n(.*?)^```", chapter, re.MULTILINE | re.DOTALL)[number]
    return re.sub(r" +# .*", "", block)


def env_default_block(heading: str) -> str:
    """A block of .env.default, commented in."""
    block = (ROOT / ".env.default").read_text().split(f"# {heading}")[1].split("\n\n")[0]
    return "\n".join(re.findall(r"^# ?([A-Z_]+=.*)", block, re.MULTILINE))


def fill_in(text: str, store: Store) -> str:
    """The placeholders of README and .env.default replaced, as a user does it."""
    text = text.replace("storage.example.com:9000", store.host).replace("bucket/path", f"{store.bucket}/path")
    text = text.replace("ACCESS-KEY", store.access_key).replace("SECRET-KEY", store.secret_key)
    if not store.tls:
        text = text.replace("secure: true", "secure: false").replace("https://", "http://")
    return text


S3_CONF = "An S3-compatible store at a host and port"
S3_ENV = "AWS, or any S3 store, by variables alone"


class Target(NamedTuple):
    """One way to name and configure a store. `conf` goes into clearml.conf, `env` into .env."""

    store: str
    conf: str = ""
    env: str = ""
    uri: str = ""
    variables: dict[str, str] = {}  # noqa: RUF012


BY_HOST = "s3://storage.example.com:9000/bucket/path"
TARGETS = {
    "rclone by host": Target("rclone", readme_block(S3_CONF), uri=BY_HOST),
    "seaweedfs by host": Target("seaweed", readme_block(S3_CONF), env=env_default_block("An S3-compatible store")),
    "credentials chain": Target(
        "rclone", readme_block(S3_CONF, 1), "AWS_ACCESS_KEY_ID=ACCESS-KEY\nAWS_SECRET_ACCESS_KEY=SECRET-KEY", BY_HOST
    ),
    "any certificate": Target(
        "rclone_tls", readme_block(S3_CONF).replace("verify: true", "verify: false"), uri=BY_HOST, variables=CHECKSUM
    ),
    "CA file": Target(
        "rclone_tls", readme_block(S3_CONF).replace("verify: true", 'verify: "CA"'), uri=BY_HOST, variables=CHECKSUM
    ),
    "variables, rclone": Target("rclone", env=readme_block(S3_ENV)),
    "variables, seaweedfs": Target("seaweed", env=env_default_block("AWS, or any S3 store")),
    "profile": Target("rclone", env=readme_block(S3_ENV, 1)),
    "profile, .env.default": Target("seaweed", env=env_default_block("The same with a profile")),
    "gcs": Target("gcs", env=readme_block("Google Cloud Storage").splitlines()[0]),
}


def checkout(folder: Path, env: str) -> Path:
    """The script in a folder of its own, because .env lies beside it."""
    folder.mkdir(exist_ok=True)
    (folder / ".env").write_text(env)
    shutil.copytree(ROOT / "clearml_client", folder / "clearml_client")
    return Path(shutil.copy(ROOT / "pytorch_mnist.py", folder))


def model_url(run: subprocess.CompletedProcess[str]) -> str:
    """The address that the run prints."""
    return str(re.findall(r"^Stored: (.*)$", run.stdout, re.MULTILINE)[0])


def printed_accuracy(run: subprocess.CompletedProcess[str]) -> float:
    return float(EPOCH.findall(run.stdout)[-1][4])


@pytest.mark.parametrize("name", TARGETS)
def test_the_model_arrives(
    name: str, request: pytest.FixtureRequest, machine: Machine, stand_in: ClearMLServer, tmp_path: Path
) -> None:
    target = TARGETS[name]
    store: Store = request.getfixturevalue(target.store)
    before = set(store.keys())
    ca = str(getattr(store, "ca", None))
    machine.configure(stand_in.configuration(), fill_in(target.conf, store).replace('"CA"', f'"{ca}"'))
    if "AWS_PROFILE" in target.env:
        (machine.home / ".aws").mkdir()
        keys = f"aws_access_key_id = {store.access_key}\naws_secret_access_key = {store.secret_key}\n"
        (machine.home / ".aws/credentials").write_text(f"[mnist]\n{keys}")
    machine.variables = {"PYTHON_DOTENV_DISABLED": "0", **target.variables}
    if isinstance(store, FakeGCS):
        machine.variables |= store.environment()
    script = checkout(tmp_path / "checkout", fill_in(target.env, store))
    uri = ["--output-uri", fill_in(target.uri, store)] if target.uri else []
    run = machine.run(script, "--dry-run", "--data-dir", ROOT / "data", *uri)
    assert run.returncode == 0, run.stderr

    new = set(store.keys()) - before
    (key,) = [key for key in new if "/models/" in key]
    folder = key.removesuffix("models/model.pt")  # one for all that the run stores
    assert {path.removeprefix(folder).split("/")[0] for path in new} == {"models", "artifacts", "metrics"}
    assert model_url(run).endswith(key)
    model = tmp_path / "model.pt"
    model.write_bytes(store.get(key))
    assert model.read_bytes() == machine.outputs("model.pt").read_bytes()
    assert evaluate(model, 1000) == pytest.approx(printed_accuracy(run), abs=0.005)
    task_id = next(task_id for task_id in stand_in.tasks if task_id in key)
    assert stand_in.tasks[task_id]["status"] == "completed"
    assert [model["uri"] for model in stand_in.models.values() if model["task"] == task_id] == [model_url(run)]
    received = repr([stand_in.tasks, stand_in.events, stand_in.models]) + run.stdout + run.stderr
    assert store.secret_key not in received


def test_a_folder_is_made_if_its_parent_exists(machine: Machine, stand_in: ClearMLServer, tmp_path: Path) -> None:
    machine.configure(stand_in.configuration())
    run = machine.train("--dry-run", CLEARML_OUTPUT_URI=str(tmp_path / "models"))
    assert run.returncode == 0, run.stderr
    (model,) = (tmp_path / "models").rglob("model.pt")
    assert model_url(run).removeprefix("file://") == str(model)
    assert evaluate(model, 1000) == pytest.approx(printed_accuracy(run), abs=0.005)


def test_an_empty_target_is_the_file_server(machine: Machine, stand_in: ClearMLServer) -> None:
    machine.configure(stand_in.configuration())
    run = machine.train("--dry-run", CLEARML_OUTPUT_URI="")
    assert run.returncode == 0, run.stderr
    assert model_url(run).startswith(stand_in.files_url)
    model = stand_in.files_folder / model_url(run).removeprefix(stand_in.files_url).lstrip("/")
    assert evaluate(model, 1000) == pytest.approx(printed_accuracy(run), abs=0.005)
    assert not list(stand_in.files_folder.rglob("probe-*"))


def test_one_folder_for_one_run_whatever_its_name(rclone: Rclone, machine: Machine, stand_in: ClearMLServer) -> None:
    machine.configure(stand_in.configuration(), rclone.clearml_conf())
    names = ["--project-name", "my group/my project", "--task-name", "second clone"]
    run = machine.train("--dry-run", *names, "--output-uri", rclone.uri("one folder"))
    assert run.returncode == 0, run.stderr
    folder = f"one folder/my group/my project/second clone.{list(stand_in.tasks)[-1]}"
    kinds = {key.removeprefix(folder).split("/")[1] for key in rclone.keys() if key.startswith("one folder/")}
    assert kinds == {"models", "artifacts", "metrics"}


@pytest.mark.parametrize("kind", ["rclone", "gcs"])
def test_without_a_server_the_model_arrives_too(kind: str, request: pytest.FixtureRequest, machine: Machine) -> None:
    store: Rclone | FakeGCS = request.getfixturevalue(kind)
    variables = store.environment()
    run = machine.train(
        "--dry-run", "--output-uri", f"{store.uri().split(':')[0]}://{store.bucket}/offline", **variables
    )
    assert run.returncode == 0, run.stderr
    (key,) = [key for key in store.keys() if key.startswith("offline/")]
    assert model_url(run).endswith(key)
    assert store.get(key) == machine.outputs("model.pt").read_bytes()


def test_what_is_no_target_ends_before_a_task_exists(machine: Machine, stand_in: ClearMLServer) -> None:
    """More such targets, without a process each, are in test_example.py."""
    machine.configure(stand_in.configuration())
    before = len(stand_in.tasks)
    run = machine.train("--dry-run", "--output-uri", "s3://me:SECRET@h:1/b")
    assert run.returncode == 2
    assert "error: argument --output-uri: " in run.stderr.splitlines()[-1]
    assert "SECRET" not in run.stdout + run.stderr
    assert len(stand_in.tasks) == before


# name: (store, entry in clearml.conf, URI, words of the message)
FAULTS: dict[str, tuple[str, dict[str, object], str, str]] = {
    "no such bucket": ("rclone", {}, "s3://{host}/nonesuch", "NoSuchBucket"),
    "no such bucket, seaweedfs": ("seaweed", {}, "s3://{host}/nonesuch", "NoSuchBucket"),
    "unknown key": ("seaweed", {"key": "AKIAUNKNOWN"}, "{uri}", "InvalidAccessKeyId"),
    "signature mismatch": ("seaweed", {"secret": WRONG_SECRET}, "{uri}", "SignatureDoesNotMatch"),
    "access denied": ("seaweed", dict(zip(("key", "secret"), SeaweedFS.READER, strict=True)), "{uri}", "AccessDenied"),
    "entry dropped: neither keys nor chain": ("rclone", {"key": None, "secret": None}, "{uri}", ""),
    "TLS spoken to a plain port": ("rclone", {"secure": True}, "{uri}", "SSL"),
    "plain HTTP spoken to a TLS port": ("rclone_tls", {"secure": False, "verify": None}, "{uri}", ""),
    "untrusted certificate": ("rclone_tls", {"verify": None}, "{uri}", "CERTIFICATE_VERIFY_FAILED"),
}


def fails_before_training(run: subprocess.CompletedProcess[str], server: ClearMLServer, uri: str, words: str) -> None:
    """One line, exit code 1, a failed task with the reason, and no training."""
    assert run.returncode == 1, run.stdout + run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("pytorch_mnist.py: ")]
    assert line.startswith(f"pytorch_mnist.py: error: no storage at {uri}: ")
    assert words in line
    assert f"-m clearml_client.doctor --output-uri {uri}" in line
    assert "Traceback" not in run.stderr
    assert "epoch 1/" not in run.stdout
    task = list(server.tasks.values())[-1]
    assert task["status"] == "failed"
    assert words in task["status_reason"]
    assert WRONG_SECRET not in run.stdout + run.stderr + repr(server.tasks)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_store_ends_the_run_before_training(
    name: str, request: pytest.FixtureRequest, machine: Machine, stand_in: ClearMLServer
) -> None:
    kind, entry, uri, words = FAULTS[name]
    store: S3Store = request.getfixturevalue(kind)
    before = store.keys()
    machine.configure(stand_in.configuration(), store.clearml_conf(**entry))
    uri = uri.format(host=store.host, uri=store.uri("faults"))
    fails_before_training(machine.train("--output-uri", uri, **CHECKSUM), stand_in, uri, words)
    assert store.keys() == before


@pytest.mark.parametrize("fault", ["refused", "silent", "no name"])
def test_a_store_that_does_not_answer(fault: str, machine: Machine, stand_in: ClearMLServer) -> None:
    with silent() as quiet:
        host = {"refused": f"127.0.0.1:{free_port()}", "silent": quiet, "no name": "no-such-host.invalid:9000"}[fault]
        entry = f'{{ host: "{host}", key: "AKIATEST", secret: "{WRONG_SECRET}", secure: false }}'
        machine.configure(stand_in.configuration(), f"sdk.aws.s3.credentials: [ {entry} ]")
        run = machine.train("--output-uri", f"s3://{host}/models")
    words = {"refused": "Could not connect", "silent": "", "no name": "Could not connect"}[fault]
    fails_before_training(run, stand_in, f"s3://{host}/models", words)


def test_a_store_that_dies_while_training_costs_no_training(
    machine: Machine, stand_in: ClearMLServer, tmp_path: Path
) -> None:
    with Rclone(tmp_path / "store") as store:
        machine.configure(stand_in.configuration(), store.clearml_conf())
        process = machine.start("pytorch_mnist.py", "--epochs", 2, "--batch-size", 1000, "--output-uri", store.uri())
        assert process.stdout
        assert process.stderr
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                break
        store.stop()
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 1, output
        (line,) = [line for line in errors.splitlines() if line.startswith("pytorch_mnist.py: ")]
        model = machine.outputs("model.pt")
        assert f"the model is in {model.relative_to(machine.home)}, but not at {store.uri()}" in line
        assert "Could not connect" in line
        accuracy = float(EPOCH.findall(output)[-1][4])
        assert evaluate(model) == pytest.approx(accuracy, abs=0.005)
        (task,) = [task for task in stand_in.tasks.values() if task["id"] in line]
        assert task["status"] == "failed"
        assert str(store.uri()) in task["status_reason"]

        store.start()  # and the command that was printed uploads it without training again
        command = re.search(r"uv run .*pytorch_mnist.py (--resume \S+)", line)
        assert command
        run = machine.train(*command[1].split())
        assert run.returncode == 0, run.stderr
        assert "epoch 1/" not in run.stdout
        (key,) = [key for key in store.keys() if key.endswith("models/model.pt")]
        assert store.get(key) == model.read_bytes()
        assert task["status"] == "completed"
        assert [entry["uri"] for entry in stand_in.models.values() if entry["task"] == task["id"]] == [model_url(run)]


def test_a_store_that_dies_in_the_middle_of_the_upload(
    machine: Machine, stand_in: ClearMLServer, few: list[object], tmp_path: Path
) -> None:
    with Rclone(tmp_path / "store") as store:
        plug = Plug(store.port)
        machine.configure(stand_in.configuration(), store.clearml_conf(host=plug.host))
        uri = f"s3://{plug.host}/{store.bucket}"
        process = machine.start("pytorch_mnist.py", *few, "--epochs", 3, "--output-uri", uri)
        assert process.stdout
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                break
        plug.bytes_left = 100_000  # of the 171,000 that the model has
        _, errors = process.communicate(timeout=180)
        assert plug.pulled
        assert process.returncode == 1, errors
        (line,) = [line for line in errors.splitlines() if line.startswith("pytorch_mnist.py: ")]
        model = machine.outputs("model.pt")
        assert f"the model is in {model.relative_to(machine.home)}, but not at {uri}" in line
        assert not store.keys(), "half an object"
        assert evaluate(model) > 20, "no better than chance"
        task = list(stand_in.tasks.values())[-1]
        assert (task["id"] in line, task["status"]) == (True, "failed")
        assert uri in task["status_reason"]

        machine.configure(stand_in.configuration(), store.clearml_conf())  # mended: the store at its own port
        command = re.search(r"uv run .*pytorch_mnist.py (--resume \S+)", line)
        assert command
        run = machine.train(*command[1].split(), "--output-uri", store.uri())
        assert run.returncode == 0, run.stderr
        assert "epoch 1/" not in run.stdout
        assert store.get(model_url(run).removeprefix(f"{store.uri()}/")) == model.read_bytes()
        assert task["status"] == "completed"
