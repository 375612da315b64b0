"""Where the model goes: every kind of storage as README and .env.default have it. How it fails is in test_faults.py."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, Run
from reading import EPOCH, evaluate
from stores import CHECKSUM, FakeGCS, Rclone, SeaweedFS, Store

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
        "tls", readme_block(S3_CONF).replace("verify: true", "verify: false"), uri=BY_HOST, variables=CHECKSUM
    ),
    "CA file": Target(
        "tls", readme_block(S3_CONF).replace("verify: true", 'verify: "CA"'), uri=BY_HOST, variables=CHECKSUM
    ),
    "variables, rclone": Target("rclone", env=readme_block(S3_ENV)),
    "variables, seaweedfs": Target("seaweed", env=env_default_block("AWS, or any S3 store")),
    "profile": Target("rclone", env=readme_block(S3_ENV, 1)),
    "profile, .env.default": Target("seaweed", env=env_default_block("The same with a profile")),
    "gcs": Target("gcs", env=readme_block("Google Cloud Storage").splitlines()[0]),
    "folder": Target("folder", env=readme_block("A local or mounted folder")),
    "nothing": Target("file server", env=readme_block("Nothing: the ClearML server's file server")),
}


def checkout(folder: Path, env: str) -> Path:
    """The script in a folder of its own, because .env lies beside it."""
    folder.mkdir(exist_ok=True)
    (folder / ".env").write_text(env)
    shutil.copytree(ROOT / "clearml_client", folder / "clearml_client")
    return Path(shutil.copy(ROOT / "pytorch_mnist.py", folder))


@dataclass
class Folder:
    """A folder, or what is behind the file server, looked at as a store is."""

    path: Path
    url: str
    tls: bool = False

    def keys(self) -> list[str]:
        return [str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()]

    def get(self, key: str) -> bytes:
        return (self.path / key).read_bytes()


@pytest.fixture
def places(
    rclone: Rclone, rclone_tls: Rclone, seaweed: SeaweedFS, gcs: FakeGCS, stand_in: ClearMLServer, tmp_path: Path
) -> dict[str, Store | Folder]:
    folder, files = Folder(tmp_path / "models", f"file://{tmp_path}/models"), stand_in.files_folder
    stores: dict[str, Store | Folder] = {"rclone": rclone, "tls": rclone_tls, "seaweed": seaweed, "gcs": gcs}
    return stores | {"folder": folder, "file server": Folder(files, stand_in.files_url)}


def model_url(run: Run) -> str:
    """The address that the run prints."""
    return str(re.findall(r"^Stored: (.*)$", run.stdout, re.MULTILINE)[0])


@pytest.mark.parametrize("name", TARGETS)
def test_the_model_arrives(
    name: str,
    places: dict[str, Store | Folder],
    machine: Machine,
    stand_in: ClearMLServer,
    tmp_path: Path,
) -> None:
    """It, the picture and the predictions, in one folder, and nothing else; the secret goes nowhere."""
    target, place = TARGETS[name], places[TARGETS[name].store]
    before, tasks = set(place.keys()), set(stand_in.tasks)
    run = train(target, place, machine, stand_in, tmp_path)
    assert run.returncode == 0, run.stderr

    new = set(place.keys()) - before
    (task,) = stand_in.tasks.keys() - tasks
    (key,) = [key for key in new if "/models/" in key]
    folder = key.removesuffix("models/model.pt")
    assert folder.endswith(f".{task}/")
    assert {path.removeprefix(folder).split("/")[0] for path in new} == {"models", "artifacts", "metrics"}
    assert model_url(run).endswith(key)
    if isinstance(place, Folder):
        assert model_url(run) == f"{place.url}/{key}"
    model = tmp_path / "model.pt"
    model.write_bytes(place.get(key))
    assert model.read_bytes() == machine.outputs("model.pt").read_bytes()
    assert evaluate(model, 200) == pytest.approx(float(EPOCH.findall(run.stdout)[-1][4]), abs=0.005)
    assert stand_in.tasks[task]["status"] == "completed"
    assert [model["uri"] for model in stand_in.models.values() if model["task"] == task] == [model_url(run)]
    received = repr([stand_in.tasks, stand_in.events, stand_in.models]) + run.stdout + run.stderr
    assert Store.secret_key not in received


def train(target: Target, place: Store | Folder, machine: Machine, server: ClearMLServer, tmp_path: Path) -> Run:
    """A short run on a machine that is set up as README or .env.default say."""
    machine.variables = {"PYTHON_DOTENV_DISABLED": "0", **target.variables}
    conf, env, uri = target.conf, target.env.replace("/mnt/models", f"{tmp_path}/models"), target.uri
    if isinstance(place, Store):
        conf, env, uri = (fill_in(text, place) for text in (conf, env, uri))
        conf = conf.replace('"CA"', f'"{getattr(place, "ca", None)}"')
        if isinstance(place, FakeGCS):
            machine.variables |= place.environment()
    if "AWS_PROFILE" in env:
        (machine.home / ".aws").mkdir()
        keys = f"aws_access_key_id = {Store.access_key}\naws_secret_access_key = {Store.secret_key}\n"
        (machine.home / ".aws/credentials").write_text(f"[mnist]\n{keys}")
    machine.configure(server.configuration(), conf)
    options = ["--output-uri", uri] if uri else []
    return machine.run(checkout(tmp_path / "checkout", env), "--dry-run", *options)


def test_without_a_server_the_model_arrives_too(gcs: FakeGCS, machine: Machine) -> None:
    """S3 and a folder: the sessions that the clean-up is tested with."""
    run = machine.train("--dry-run", "--output-uri", gcs.uri("offline"), **gcs.environment())
    assert run.returncode == 0, run.stderr
    (key,) = [key for key in gcs.keys() if key.startswith("offline/")]
    assert model_url(run).endswith(key)
    assert gcs.get(key) == machine.outputs("model.pt").read_bytes()
