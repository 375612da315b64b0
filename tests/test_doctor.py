"""The doctor against real stores and a stand-in server: what it finds, where that came from, the cure, nothing left.

What a run says of a server, a file or a store that it cannot use is in test_faults.py. What an error of a store
means is in test_setups.py.
"""

import errno
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
from clearml import StorageManager
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, copy_script, silent
from reading import Report
from stores import CHECKSUM, FakeGCS, Front, Rclone, S3Store, Store, free_port

from clearml_client import doctor, storage
from clearml_client.errors import RunError

DOCTOR = ("-m", "clearml_client.doctor")
PROVEN = "ok: written, read, compared, deleted in "
Ask = Callable[..., Report]


@pytest.fixture
def ask(machine: Machine) -> Iterator[Ask]:
    """Runs the doctor for some areas on the machine, in whose HOME it must leave nothing."""

    def run(*only: str, uri: str | None = None, **variables: str) -> Report:
        target = [] if uri is None else [f"--output-uri={uri}"]
        other = Machine(machine.home, {**machine.variables, **variables})
        done = other.run(*DOCTOR, "--json", "--only", *only, *target, code=None)
        return Report(done.returncode, done.stdout)

    yield run
    assert {path.name for path in machine.home.iterdir()} <= {"clearml.conf", ".clearml.conf", "other.conf", ".aws"}


@pytest.fixture
def server(stand_in: ClearMLServer) -> Iterator[ClearMLServer]:
    """Without a task and without an object, afterwards as before."""
    yield stand_in
    assert not stand_in.tasks
    assert not [path for path in stand_in.files_folder.rglob("*") if path.is_file()]


IMPATIENT = f"""
import runpy, sys
sys.path[0] = {str(ROOT)!r}
import clearml_client
clearml_client.prepare_environment()
from clearml_client import server, storage
server.TIMEOUT = storage.TIMEOUT = 1  # seconds, as it waits for everything: by itself it would take half a minute
runpy.run_module("clearml_client.doctor", run_name="__main__")
"""


@pytest.mark.waits
def test_everything_silent_comes_to_an_end(machine: Machine, server: ClearMLServer, rclone: Rclone) -> None:
    """As a user sees it: a line each, the first cure at the end, exit code 1."""
    (machine.home / "impatient.py").write_text(IMPATIENT)
    with silent() as quiet:
        machine.configure(re.sub(r"127.0.0.1:\d+", quiet, server.configuration()), rclone.clearml_conf(host=quiet))
        done = machine.run(machine.home / "impatient.py", "--output-uri", f"s3://{quiet}/bucket", code=1)
    assert done.stderr == ""
    *lines, empty, last = done.stdout.splitlines()
    area = "(ok|warning|failed|skipped) +(configuration|server|storage|machine): "
    assert [line for line in lines if not re.match(area, line)] == []
    assert empty == ""
    assert last.startswith("Try first: server: API: check host, port and firewall")
    for words in ("ok +machine: torch .* CPU threads", "failed +storage: object .*time-out", "warning +server: file"):
        assert [line for line in lines if re.match(words, line)]
    assert Store.access_key not in done.stdout
    assert "\033" not in done.stdout


def test_without_any_configuration_it_warns_and_is_well(ask: Ask, machine: Machine, tmp_path: Path) -> None:
    """Also with a folder that is not yet there, which it does not leave behind."""
    folder = tmp_path / "not yet there"
    report = ask("configuration", "server", "storage", uri=f"file://{folder}")
    assert report["configuration: ClearML server"].startswith("warning: runs are recorded offline, because no server")
    assert report["server: API"].startswith("skipped: no server is configured")
    assert "clearml-init" in report.cure
    assert report["storage: target"].startswith(f"ok: file://{folder} [--output-uri]")
    assert report["storage: object"].startswith(PROVEN)
    assert not folder.exists()
    machine.configure("sdk {}")
    assert "add the api { } section that the web UI shows to ~/clearml.conf" in ask("configuration").cure
    assert ask("configuration", CLEARML_OFFLINE_MODE="1").cure.endswith("ClearML server: unset CLEARML_OFFLINE_MODE")
    (machine.home / "clearml.conf").rename(machine.home / ".clearml.conf")
    assert ask("configuration").cure.endswith("ClearML server: mv ~/.clearml.conf ~/clearml.conf")


def test_each_value_is_named_with_its_origin(ask: Ask, machine: Machine, server: ClearMLServer, tmp_path: Path) -> None:
    """Of two files, .env, and variables: the one file is not read, and the other has half of the keys."""
    copy_script(tmp_path)
    machine.configure("sdk {}")
    (machine.home / "other.conf").write_text(server.configuration().replace("access_key", "other"))
    (tmp_path / ".env").write_text(f"CLEARML_OUTPUT_URI={machine.home}/elsewhere\nCLEARML_API_ACCESS_KEY=inside\n")
    variables = {"PYTHON_DOTENV_DISABLED": "0", "CLEARML_API_ACCESS_KEY": "outside", "PYTHONPATH": str(tmp_path)}
    report = ask("configuration", "storage", CLEARML_CONFIG_FILE="~/other.conf", **variables)
    wins = f"warning: another value in the environment wins: CLEARML_API_ACCESS_KEY [{tmp_path}/.env]"
    assert report["configuration: .env"].startswith(wins)
    assert report["configuration: file"].startswith("ok: ~/other.conf; ~/clearml.conf is not read")
    whole = r"ok: .*\[api.api_server, ~/other.conf; CLEARML_API_ACCESS_KEY, environment; api.credentials.secret_key, ~"
    assert re.match(whole, report["configuration: ClearML server"])
    assert report["storage: target"].startswith(f"ok: ~/elsewhere [CLEARML_OUTPUT_URI, {tmp_path}/.env]")
    assert report["storage: object"].startswith(PROVEN)


def test_a_server_that_is_well(ask: Ask, machine: Machine, server: ClearMLServer) -> None:
    """Its file server is the target by default, and is tried as the run does."""
    setting = "sdk.development.default_output_uri"
    machine.configure(server.configuration(), f'{setting}: "{server.files_url}"')
    (machine.home / ".clearml.conf").touch()
    report = ask("configuration", "server", "storage", uri="")
    assert report["configuration: file"].startswith("warning: ~/clearml.conf; ~/.clearml.conf is not read [default]")
    assert re.match("ok: access key ...-key is user tester .*~/clearml.conf", report["server: keys"])
    assert report["server: API"].startswith(f"ok: {server.api_url} answers; its web UI is {server.web_url} [api.api_s")
    assert report["server: file server"].startswith(f"ok: {server.files_url} [api.files_server, ~/clearml.")
    assert report["storage: target"].startswith(f"ok: {server.files_url} [{setting}, ~/clearml.conf]")
    assert report["storage: object"].startswith(PROVEN)
    assert report.well


def test_what_is_down_hides_nothing_else(ask: Ask, machine: Machine, server: ClearMLServer) -> None:
    """A file server that a run uses is a failure, and no other is."""
    machine.configure(server.configuration())
    lost = f"http://127.0.0.1:{free_port()}"
    report = ask("server", "storage", CLEARML_FILES_HOST=lost)
    assert report["server: keys"].startswith("ok")
    down = f"failed: no answer from the file server {lost}: refused [CLEARML_FILES_HOST, environment]"
    assert report["server: file server"].startswith(down)
    assert report["storage: target"].startswith(f"ok: {lost} [CLEARML_FILES_HOST, environment]")
    assert report["storage: object"].startswith("failed")
    report = ask("server", uri="~", CLEARML_API_HOST=lost, CLEARML_FILES_HOST=server.web_url)
    assert report["server: keys"] == "skipped: server: API failed [] "
    wrong = f"warning: {server.web_url} is not ClearML's file server (HTTP 200) [CLEARML_FILES_HOST, environment]"
    assert report["server: file server"].startswith(wrong)


@pytest.fixture
def stores(rclone: Rclone, rclone_tls: Rclone, gcs: FakeGCS) -> Iterator[dict[str, Store]]:
    """All of them, afterwards as before; and nobody has made a bucket."""
    every: dict[str, Store] = {"rclone": rclone, "tls": rclone_tls, "gcs": gcs}
    before = {name: store.keys() for name, store in every.items()}
    yield every
    assert {name: store.keys() for name, store in every.items()} == before
    assert rclone.buckets() == ["models"]


class Tried(NamedTuple):
    store: str
    check: str
    words: str  # what that check finds
    entry: dict[str, Any] | None = {}  # what is changed in clearml.conf; None for variables alone  # noqa: RUF012
    variables: dict[str, str] = {}  # noqa: RUF012
    uri: str = "{uri}"  # the target
    rule: str = ""  # of a port before the store
    seconds: float = 0  # that it takes for an answer


LAB = f"[lab]\naws_access_key_id = {Store.access_key}\naws_secret_access_key = {Store.secret_key}\n"
SSO = "sso_account_id = 1\nsso_role_name = any\nsso_region = eu-west-1\nsso_start_url = https://sso.invalid\n"
NOBODY = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
BY_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": Store.access_key, "AWS_SECRET_ACCESS_KEY": Store.secret_key}
NO_ENDPOINT = {"AWS_ENDPOINT_URL": "", "HTTPS_PROXY": "http://127.0.0.1:1"}  # nothing leaves this machine
PROXIED = BY_ENVIRONMENT | NO_ENDPOINT
HALF, ONE_KEY = {"AWS_SECRET_ACCESS_KEY": ""}, {"AWS_ACCESS_KEY_ID": "AKIATESTSTORE4321"}
ROLE = {**NOBODY, "AWS_ROLE_ARN": "arn:aws:iam::1:role/any", "AWS_WEB_IDENTITY_TOKEN_FILE": "/no/such"}
GOOGLE = {"STORAGE_EMULATOR_HOST": "", "NO_GCE_CHECK": "true"}
GOOGLE_KEY = {**GOOGLE, "GOOGLE_APPLICATION_CREDENTIALS": '{"type": "service_account"}'}
AES = {"extra_args": {"ServerSideEncryption": "AES256"}}
BOTH = "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
WITHOUT = dict(each.split("=") for each in BOTH.split(" and "))
AWS = "s3://models/a/path"
ENTRY = 'write an entry with host: "{host}", keys or use_credentials_chain: true, and the whole bucket or none'

STORES = [
    Tried("tls", "access", r"ok: static keys, .* \.\.\.4321, https://.*ca.pem \[sdk.aws.s3.cred", {}, CHECKSUM),
    Tried("tls", "access", r"ok: boto3 finds env, access key \.\.\.4321.* \[AWS_ENDPOINT_URL", None, {}, AWS),
    Tried("tls", "access", r"ok: boto3 finds env.* \[AWS_ACCESS_KEY_ID", None, {"AWS_ENDPOINT_URL": ""}),
    Tried("gcs", "access", r"ok: application default .*\[STORAGE_EMULATOR_HOST, environment", None),
    Tried("tls", "object", f"failed: .*checksum not understood .*{BOTH}"),
    Tried("rclone", "object", "failed: .*AWS_ENDPOINT_URL", None, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, AWS),
    Tried("rclone", "object", "failed: .*another store than Amazon S3.*AWS_ENDPOINT_URL", None, NO_ENDPOINT, AWS),
    Tried("rclone", "access", "failed: .*write http:// or ht", None, {"AWS_ENDPOINT_URL": "{host}"}, AWS),
    Tried("rclone", "access", "failed: .*correct AWS_PROFILE", None, {**NOBODY, "AWS_PROFILE": "lib"}, AWS),
    Tried("rclone", "access", "failed: .*aws sso login --pro", None, {**NOBODY, "AWS_PROFILE": "sso"}, AWS),
    Tried("rclone", "access", "failed: .*no keys.*AWS_ACCESS_KEY_ID", None, NOBODY, AWS),
    Tried("rclone", "access", "failed: .*half of the keys.*set both", None, HALF, AWS),
    Tried("rclone", "access", "failed: .*missing.*AWS_WEB_IDENTITY_TOKEN_FILE", None, ROLE, AWS),
    Tried("gcs", "access", "failed: .*gcloud auth application-default login", None, GOOGLE),
    Tried("gcs", "access", "failed: .*holds the key itself.*write it to a file", None, GOOGLE_KEY),
    # What is wrong with the entry in clearml.conf.
    Tried("rclone", "access", f"failed: no entry for .*'host': '127.0.0.1'.*{ENTRY}", {"host": "127.0.0.1"}),
    Tried("rclone", "access", f"failed: no entry for .*'bucket': 'mod'.*{ENTRY}", {"bucket": "mod"}),
    Tried("rclone", "access", "failed: the SDK cannot use .*host: ", {"host": "http://127.0.0.1:1"}),
    Tried("rclone", "access", "failed: .* another port .*write s3://{host}/bucket", uri="s3://127.0.0.1/x"),
    Tried("rclone", "access", "failed: .* another port .*, or host: .127.0.0.1:1", uri="s3://127.0.0.1:1/x"),
    Tried("rclone", "access", "failed: .*the entry for {host} lacks key or sec.*add both", {"secret": None}),
    Tried("rclone", "access", "failed: .* lacks key.*; for the chain also set both", {"secret": None}, ONE_KEY),
    Tried("rclone", "object", "failed: .* names no host .*or set AWS_ENDPOINT_URL", {}, PROXIED, AWS),
    Tried("rclone", "access", "failed: secure: .*leave out the quotes", {"secure": "false"}),
    Tried("rclone", "object", f"failed: .*TLS spoken .*no entry.*{ENTRY}", {"host": "h:1"}, BY_ENVIRONMENT),
    Tried("rclone", "object", "ok", {"host": None, "bucket": "models"}, {"AWS_ENDPOINT_URL": "http://{host}"}, AWS),
    Tried("rclone", "object", "ok", {"bucket": "models"}),
    # What some stores demand, and others do not know.
    Tried("rclone", "object", "ok", rule="^404 |[?]prefix"),  # without the permission s3:ListBucket
    Tried("gcs", "object", "ok", None, rule="/b/models[ ?]"),  # Google's role storage.objectAdmin
    Tried("rclone", "object", "ok", rule="(?!)", seconds=1.5),  # slow, but each time it does answer
    Tried("rclone", "object", "ok", AES, rule="^0 PUT (?!.*encryption: AES256)"),
    Tried("rclone", "object", "ok", {}, WITHOUT, rule="^0 (PUT|GET) .*x-amz-checksum"),
]


@pytest.mark.parametrize("tried", STORES)
def test_what_a_store_says(ask: Ask, machine: Machine, stores: dict[str, Store], tried: Tried) -> None:
    store = stores[tried.store]
    (machine.home / ".aws").mkdir()
    (machine.home / ".aws/credentials").write_text(LAB)
    (machine.home / ".aws/config").write_text(f"[profile sso]\n{SSO}")
    with Front(store, tried.rule, "AccessDenied", tried.seconds) as front:
        host = front.host if tried.rule else store.host
        variables = {name: value.replace("{host}", host) for name, value in tried.variables.items()}
        if isinstance(store, S3Store) and tried.entry is not None:
            machine.configure(store.clearml_conf(**({"host": host} | tried.entry)))
        else:
            by_variables = {name: value.replace(store.host, host) for name, value in store.environment().items()}
            variables = by_variables | variables
        uri = tried.uri.replace("{uri}", store.uri("a/path").replace(store.host, host))
        report = ask("storage", uri=uri, **variables)
    assert re.match(tried.words.replace("{host}", host), report[f"storage: {tried.check}"])
    assert report.well == report["storage: object"].startswith(PROVEN) == tried.words.startswith("ok")
    assert report.cure.startswith(f"storage: {tried.check}: ") or not tried.words.startswith("failed")


TARGETS = [
    ("s3:/bucket/path", "target", "no bucket"),
    ("s4://bucket/path", "target", "neither s3://"),
    ("s3://127.0.0.1:9000/", "target", "no bucket"),
    ("s3://bucket//path", "target", "a double slash"),
    ("s3://AKIATESTSTORE4321:not-a-secret@127.0.0.1:9000/bucket", "target", "the URI holds credentials"),
    (__file__, "target", "is no folder"),
    ("undefined", "target", "no folder undefined here"),
    ("http://127.0.0.1:9000/bucket", "access", "plain http is secure: false"),
    (
        "azure://account.blob.core.windows.net/container/path",
        "access",
        "uv sync --group azure, or pip",
    ),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the SDK's pyparsing
@pytest.mark.parametrize(("uri", "check", "words"), TARGETS)
def test_a_target_that_is_none_or_lacks_its_package(uri: str, check: str, words: str) -> None:
    found = doctor.examine(doctor.Setup(uri, "--output-uri"), f"storage: {check}")
    assert found
    assert (found.state, found.source, bool(found.cure)) == ("failed", "--output-uri", True)
    assert words in f"{found.value}; {found.cure}"
    assert "not-a-secret" not in found.value + found.cure


def slow_upload(*arguments: Any, upload: Callable[..., Any] = StorageManager.upload_file, **_: Any) -> None:
    time.sleep(0.5)
    upload(*arguments)


FULL, DENIED = OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied")
# A step that goes wrong, how, what is said; and how many objects are left.
STEPS = [
    (StorageManager, "upload_file", Mock(side_effect=FULL), "cannot write: refused: quota", 0),
    (StorageManager, "upload_file", slow_upload, r"cannot write: no answer: time-out .*no answer for 0.2 s", 0),
    (storage.Folder, "_open", Mock(side_effect=TimeoutError("timed out")), "cannot read.*time-out", 0),
    (storage.Folder, "_open", lambda *_: io.BytesIO(Path(storage.__file__).read_bytes()[:-1]), "is not at file:", 0),
    (storage.Folder, "_remove", Mock(side_effect=DENIED), "cannot delete.*access denied", 1),
    (storage.Folder, "_remove", Mock(), "was deleted, but is still there", 1),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the SDK's pyparsing
@pytest.mark.parametrize(("owner", "step", "action", "words", "left"), STEPS)
def test_a_check_that_fails_leaves_no_object_if_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, step: str, action: Any, words: str, left: int
) -> None:
    monkeypatch.setattr(owner, step, action)
    monkeypatch.setattr(storage, "STEP", 0.2 if action is slow_upload else 30)
    with pytest.raises(RunError, match=words) as refusal:
        storage.check_access(str(tmp_path))
    assert refusal.value.cure or "still there" in words
    for thread in threading.enumerate():
        if thread.name == "bounded":  # given up
            thread.join()
    assert len([*tmp_path.iterdir()]) == left
