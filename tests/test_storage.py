"""Where the model goes: each kind of storage that docs/storage.md has. How it fails is in test_faults.py."""

import os
import re
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, copy_script
from stores import CHECKSUM, FakeGCS, Rclone, SeaweedFS, Store

from clearml_client import storage


def env_default_block(heading: str) -> str:
    """A block of .env.default, commented in."""
    block = (ROOT / ".env.default").read_text().split(f"# {heading}")[1].split("\n\n")[0]
    return "".join(f"{line}\n" for line in re.findall(r"^# ?([A-Z_]+=.*)", block, re.MULTILINE))


PAGE = (ROOT / "docs/storage.md").read_text()
ENTRY = re.findall(r"^```hocon\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0]
BY_HOST = env_default_block("An S3-compatible store")
BY_CA = ENTRY.replace("verify: true", 'verify: "CA"')
CHAIN = re.sub(r"^ +(key|secret): .*|# (?=use_credentials_chain)", "", ENTRY, flags=re.MULTILINE)
CHUNKS = "\n".join("=".join(item) for item in CHECKSUM.items())
KEYS = "AWS_ACCESS_KEY_ID=ACCESS-KEY\nAWS_SECRET_ACCESS_KEY=SECRET-KEY\n"
EARLIER = 'sdk { aws { s3 { credentials: [ { host: "other:9000", key: "a-key", secret: "any" } ] } } }'
DEFAULT_URI = "sdk.development.default_output_uri: {}".format

# The store, and how it is named and configured: what is in clearml.conf and in .env
TARGETS = {
    "by host": ("seaweed", f"{EARLIER}\n{ENTRY}", BY_HOST),
    "CA file": ("tls", BY_CA, BY_HOST + CHUNKS),
    "credentials chain": ("rclone", CHAIN, BY_HOST + KEYS),
    "variables": ("rclone", "", env_default_block("AWS, or any S3 store")),
    "profile": ("seaweed", "", env_default_block("The same with a profile")),
    "gcs": ("gcs", "", env_default_block("Google Cloud Storage").splitlines()[0]),
    "folder": ("folder", DEFAULT_URI('"s3://127.0.0.1:1/of no account"'), env_default_block("A local or mounted")),
    "nothing": ("file server", DEFAULT_URI("true"), "CLEARML_OUTPUT_URI="),
}


def fill_in(text: str, store: Store) -> str:
    """The placeholders of docs/storage.md and .env.default replaced, as a user does it."""
    text = text.replace("storage.example.com:9000", store.host).replace("bucket/path", f"{store.bucket}/path")
    text = text.replace("ACCESS-KEY", store.access_key).replace("SECRET-KEY", store.secret_key)
    if not store.tls:
        text = text.replace("secure: true", "secure: false").replace("https://", "http://")
    return text.replace('"CA"', f'"{getattr(store, "ca", None)}"')


@pytest.fixture
def places(
    rclone: Rclone, rclone_tls: Rclone, seaweed: SeaweedFS, gcs: FakeGCS, stand_in: ClearMLServer, tmp_path: Path
) -> dict[str, Store | Path]:
    stores: dict[str, Store | Path] = {"rclone": rclone, "tls": rclone_tls, "seaweed": seaweed, "gcs": gcs}
    return stores | {"folder": tmp_path / "models", "file server": stand_in.files_folder}


def keys(place: Store | Path) -> set[str]:
    if isinstance(place, Store):
        return set(place.keys())
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", TARGETS)
def test_the_model_arrives(
    name: str, places: dict[str, Store | Path], machine: Machine, stand_in: ClearMLServer, tmp_path: Path
) -> None:
    """It, the picture and the predictions, in one folder, and nothing else."""
    where, conf, env = TARGETS[name]
    place, server = places[where], stand_in.configuration()
    machine.variables = {"PYTHON_DOTENV_DISABLED": "0"}
    if isinstance(place, Store):
        conf, env = fill_in(conf, place), fill_in(env, place)
    if isinstance(place, FakeGCS):
        machine.variables |= place.environment()
    if where != "file server":  # then it does not matter
        server = server.replace(stand_in.files_url, "undefined")
    machine.configure(server, conf)
    if name == "profile":
        (machine.home / ".aws").mkdir()
        profile = f"[mnist]\naws_access_key_id = {Store.access_key}\naws_secret_access_key = {Store.secret_key}\n"
        (machine.home / ".aws/credentials").write_text(profile)
    script = copy_script(tmp_path)
    (tmp_path / ".env").write_text(env.replace("/mnt/models", f"{tmp_path}/models"))
    before, tasks = keys(place), set(stand_in.tasks)
    run = machine.run(script, "--dry-run")

    new = keys(place) - before
    (task,) = stand_in.tasks.keys() - tasks
    (key,) = [key for key in new if "/models/" in key]
    folder = key.removesuffix("models/model.pt")
    assert folder.endswith(f".{task}/")
    assert {path.removeprefix(folder).split("/")[0] for path in new} == {"models", "artifacts"}
    content = place.get(key) if isinstance(place, Store) else (place / key).read_bytes()
    assert content == machine.outputs("model.pt").read_bytes()
    (model,) = [model["uri"] for model in stand_in.models.values() if model["task"] == task]
    assert model.endswith(key)
    assert f"Stored: {model}\n" in run.stdout
    assert stand_in.tasks[task]["status"] == "completed"
    assert not (machine.home / "undefined").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the SDK's pyparsing
def test_a_listing_has_more_than_a_page_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a listing says of a bucket that is not there, or of a store that is down, is in test_cleanup.py."""
    folder, names = tmp_path / "data/models", {f"list/deep/{number}" for number in range(1001)}
    (folder / "list/deep").mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    with Rclone(tmp_path) as rclone:
        for variable, value in rclone.environment().items():
            monkeypatch.setenv(variable, value)
        store = storage.open_store("s3://models")
        with closing(store.bucket.meta.client):
            assert {*store.list("list/")} == names
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(storage.StorageError, match="cannot list: forbidden"):
        storage.Folder(str(tmp_path)).list(f"{folder}/list/")


def test_a_store_without_an_answer_is_asked_once_and_told_of_by_no_other_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.Store, "_size", look := Mock(side_effect=TimeoutError("of the first")))
    store, said = storage.Store("s3://store:9000/models"), []
    for key in ("first", "second"):
        with pytest.raises(storage.StorageError, match=r"cannot check: no answer.*time-out") as refusal:
            store.size(key)
        said.append("of the first" in str(refusal.value))
    assert (look.call_count, said) == (1, [True, False])
