"""The doctor against real stores and a stand-in server: what it finds, where that came from, the cure, nothing left.

What it says of a server, a file or a store that a run cannot use is in the catalogue, faults.py, beside what the run
says. What an error of a store means is in test_setups.py.
"""

import errno
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
from clearml import StorageManager
from clearml_server import ClearMLServer
from conftest import Machine, copy_script, silent
from reading import Report
from stores import CHECKSUM, FakeGCS, Front, Rclone, S3Store, SeaweedFS, Store, free_port

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
        done = other.run(*DOCTOR, "--json", "--only", *only, *target)
        return Report(done.returncode, done.stdout)

    yield run
    assert {path.name for path in machine.home.iterdir()} <= {"clearml.conf", "other.conf", ".aws"}


@pytest.fixture
def server(stand_in: ClearMLServer) -> Iterator[ClearMLServer]:
    """Without a task and without an object, afterwards as before."""
    yield stand_in
    assert not stand_in.tasks
    assert not [path for path in stand_in.files_folder.rglob("*") if path.is_file()]


@pytest.mark.waits
def test_everything_silent_comes_to_an_end(machine: Machine) -> None:
    """As a user sees it: a line each, the first cure at the end, exit code 1."""
    with silent() as quiet:
        keys = f'key: "{Store.access_key}", secret: "{Store.secret_key}"'
        servers = ", ".join(f'{name}_server: "http://{quiet}"' for name in ("api", "web", "files"))
        access = f'credentials {{ access_key: "{Store.access_key}", secret_key: "{Store.secret_key}" }}'
        entry = f'sdk.aws.s3.credentials: [ {{ host: "{quiet}", secure: false, {keys} }} ]'
        machine.configure(f"api {{ {servers}, {access} }}", entry)
        done = machine.run(*DOCTOR, "--output-uri", f"s3://{quiet}/bucket")
    assert (done.returncode, done.stderr) == (1, "")
    *lines, empty, last = done.stdout.splitlines()
    area = "(ok|warning|failed|skipped) +(configuration|server|storage|machine): "
    assert [line for line in lines if not re.match(area, line)] == []
    assert empty == ""
    assert last.startswith("Try first: server: API: check host, port and firewall")
    for words in ("ok +machine: torch .* CPU threads", "failed +storage: bucket .*time-out", "warning +server: web"):
        assert [line for line in lines if re.match(words, line)]
    assert Store.access_key not in done.stdout
    assert "\033" not in done.stdout


def test_without_any_configuration_it_warns_and_is_well(ask: Ask, tmp_path: Path) -> None:
    """Also with a folder that is not yet there, which it does not leave behind."""
    folder = tmp_path / "not yet there"
    report = ask("configuration", "server", "storage", uri=f"file://{folder}")
    assert report["configuration: ClearML server"].startswith("warning: no configuration: runs are recorded offline")
    assert report["server: API"].startswith("skipped: no server is configured")
    assert "clearml-init" in report.cure
    assert f"folder {folder}, will be made" in report["storage: target"]
    assert report["storage: object"].startswith(PROVEN)
    assert not folder.exists()


def test_what_two_files_and_variables_say_together(ask: Ask, machine: Machine, server: ClearMLServer) -> None:
    """One file is not read; the other has half of the keys, one of which a variable beats."""
    machine.configure("sdk {}")
    (machine.home / "other.conf").write_text(server.configuration().replace("access_key", "axxess_key"))
    keys = {"CLEARML_API_ACCESS_KEY": "an-access-key", "CLEARML_API_SECRET_KEY": "a-wrong-secret"}
    report = ask("configuration", "storage", CLEARML_CONFIG_FILE="~/other.conf", **keys)
    assert report["configuration: file"].startswith("ok: ~/other.conf; ~/clearml.conf is not read")
    whole = r"ok: .*\[api.api_server, ~/other.conf; CLEARML_API_ACCESS_KEY, environment; CLEARML_API_SECRET_KEY"
    assert re.match(whole, report["configuration: ClearML server"])
    assert report["storage: target"].startswith("ok")


def test_values_from_dotenv_are_named_as_such(
    ask: Ask, machine: Machine, server: ClearMLServer, tmp_path: Path
) -> None:
    copy_script(tmp_path)
    machine.configure(server.configuration())
    (tmp_path / ".env").write_text(f"CLEARML_OUTPUT_URI={machine.home}/elsewhere\nCLEARML_API_ACCESS_KEY=inside\n")
    variables = {"PYTHON_DOTENV_DISABLED": "0", "CLEARML_API_ACCESS_KEY": "outside", "PYTHONPATH": str(tmp_path)}
    report = ask("configuration", "storage", **variables)
    wins = f"warning: another value in the environment wins: CLEARML_API_ACCESS_KEY [{tmp_path}/.env]"
    assert report["configuration: .env"].startswith(wins)
    target = f"ok: folder ~/elsewhere, will be made [CLEARML_OUTPUT_URI, {tmp_path}/.env]"
    assert report["storage: target"].startswith(target)
    assert report["storage: object"].startswith(PROVEN)


def test_a_server_that_is_well(ask: Ask, machine: Machine, server: ClearMLServer) -> None:
    """Its file server is the target by default, and is tried as the run does."""
    setting = "sdk.development.default_output_uri"
    machine.configure(server.configuration(), f'{setting}: "{server.files_url}"')
    report = ask("configuration", "server", "storage", uri="")
    assert re.match("ok: access key ...-key is user tester .*~/clearml.conf", report["server: keys"])
    assert report["server: file server"].startswith(f"ok: {server.files_url} (127.0.0.1) [api.files_server, ~/clearml.")
    assert report["storage: target"].startswith(f"ok: {server.files_url} [{setting}, ~/clearml.conf]")
    assert report["storage: object"].startswith(PROVEN)
    assert report.well


@pytest.mark.parametrize(("uri", "state"), [("", "failed"), ("elsewhere", "warning")])
def test_a_file_server_that_is_down_is_a_failure_where_the_run_uses_it(
    ask: Ask, machine: Machine, server: ClearMLServer, uri: str, state: str
) -> None:
    """A web UI that is none never is."""
    machine.configure(server.configuration())
    lost = f"http://127.0.0.1:{free_port()}"
    target = str(machine.home / uri) if uri else ""
    report = ask("server", "storage", uri=target, CLEARML_FILES_HOST=lost, CLEARML_WEB_HOST=server.files_url)
    assert report["server: web server"].startswith(f"warning: {server.files_url} is no web page")
    assert re.match(f"{state}: {lost}: refused.*CLEARML_FILES_HOST", report["server: file server"])
    if uri:
        assert "this run stores nothing there" in report["server: file server"]
        assert report.code == 0
    else:
        assert report["storage: target"].startswith("ok: empty: the ClearML server's file server [default]")
        assert report["storage: object"].startswith("failed")


@pytest.fixture
def stores(rclone: Rclone, rclone_tls: Rclone, seaweed: SeaweedFS, gcs: FakeGCS) -> Iterator[dict[str, Store]]:
    """All of them, afterwards as before; and nobody has made a bucket."""
    every: dict[str, Store] = {"rclone": rclone, "tls": rclone_tls, "seaweed": seaweed, "gcs": gcs}
    before = {name: store.keys() for name, store in every.items()}
    yield every
    assert {name: store.keys() for name, store in every.items()} == before
    assert rclone.buckets() == seaweed.buckets() == ["models"]


NONE: dict[str, str] = {}


class Tried(NamedTuple):
    store: str
    check: str
    words: str  # what that check finds
    entry: dict[str, Any] | None = NONE  # what is changed in clearml.conf; None for variables alone
    variables: dict[str, str] = NONE
    uri: str = "{uri}"  # the target
    rule: str = ""  # of a port before the store
    refusal: str = "AccessDenied"
    seconds: float = 0  # for each answer


LAB = f"[lab]\naws_access_key_id = {Store.access_key}\naws_secret_access_key = {Store.secret_key}\n"
SSO = "sso_account_id = 1\nsso_role_name = any\nsso_region = eu-west-1\nsso_start_url = https://sso.invalid\n"
NOBODY = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
ROLE = {**NOBODY, "AWS_ROLE_ARN": "arn:aws:iam::1:role/any", "AWS_WEB_IDENTITY_TOKEN_FILE": "/no/such"}
GOOGLE = {"STORAGE_EMULATOR_HOST": "", "NO_GCE_CHECK": "true"}
GOOGLE_KEY = {**GOOGLE, "GOOGLE_APPLICATION_CREDENTIALS": '{"type": "service_account"}'}
AES = {"extra_args": {"ServerSideEncryption": "AES256"}}
PLAIN, TLS = "TLS spoken to a plain port", "plain HTTP spoken to a TLS port"
BOTH = "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
WITHOUT = dict(each.split("=") for each in BOTH.split(" and "))
AWS = "s3://models/a/path"

STORES = [
    Tried("seaweed", "credentials", r"ok: static keys, access key \.\.\.4321 \[sdk.aws.s3.credentials"),
    Tried("tls", "endpoint", "warning: .*certificate not checked.*ca.pem", {"verify": False}, CHECKSUM),
    Tried("tls", "endpoint", "ok: https://", {}, CHECKSUM),
    Tried("tls", "credentials", "ok: boto3 finds env, access key ...4321", None, {}, AWS),
    Tried("rclone", "credentials", "ok: .*credentials-file", None, {**NOBODY, "AWS_PROFILE": "lab"}, AWS),
    Tried("gcs", "credentials", r"ok: http.*\[STORAGE_EMULATOR_HOST, environment", None),
    Tried("tls", "bucket", "failed: .*certificate file missing .*/path/ca.pem", {"verify": "/no/such"}),
    Tried("tls", "object", f"failed: .*checksum not understood .*{BOTH}"),
    Tried("tls", "endpoint", f"failed: .*{TLS} .AWS_.* https:", None, {"AWS_ENDPOINT_URL": "http://{host}"}, AWS),
    Tried("rclone", "credentials", "failed: .*write http:// or ht", None, {"AWS_ENDPOINT_URL": "{host}"}, AWS),
    Tried("rclone", "credentials", "failed: .*correct AWS_PROFILE", None, {**NOBODY, "AWS_PROFILE": "lib"}, AWS),
    Tried("rclone", "credentials", "failed: .*aws sso login --pro", None, {**NOBODY, "AWS_PROFILE": "sso"}, AWS),
    Tried("rclone", "credentials", "failed: .*no keys.*AWS_ACCESS_KEY_ID", None, NOBODY, AWS),
    Tried("rclone", "credentials", "failed: .*missing.*AWS_WEB_IDENTITY_TOKEN_FILE", None, ROLE, AWS),
    Tried("gcs", "credentials", "failed: .*gcloud auth application-default login", None, GOOGLE),
    Tried("gcs", "credentials", "failed: .*holds the key itself; write it to a file", None, GOOGLE_KEY),
    # What is wrong with the entry in clearml.conf.
    Tried("rclone", "entry", 'failed: .*is taken for {host}.*write host: "{host}"', {"host": "127.0.0.1"}),
    Tried("rclone", "entry", 'failed: .*for .127.0.0.1:1.*add one with host: "{host}"', {"host": "127.0.0.1:1"}),
    Tried("rclone", "entry", "failed: .*for the bucket 'other' only.*leave bucket out", {"bucket": "other"}),
    Tried("rclone", "entry", "failed: .*dropped in silence.*use_credentials_chain", {"key": None}),
    Tried("rclone", "entry", "failed: the SDK cannot use .*without http://", {"host": "http://127.0.0.1:1"}),
    Tried("rclone", "entry", "failed: bucket 'mod' is taken for .*write the whole name", {"bucket": "mod"}),
    Tried("rclone", "entry", "failed: .*at sdk.sdk.aws.s3.cred.*end of the file, outside all braces", {"pasted": True}),
    Tried("rclone", "object", "ok", {"host": None, "bucket": "models"}, {"AWS_ENDPOINT_URL": "http://{host}"}, AWS),
    # What some stores demand, and others do not know.
    Tried("rclone", "object", "ok", rule="^404 |list-type"),  # without the permission s3:ListBucket
    Tried("gcs", "object", "ok", None, rule="/b/models[ ?]"),  # Google's role storage.objectAdmin
    Tried("rclone", "object", "ok", AES, rule="^0 PUT (?!.*encryption: AES256)"),
    Tried("rclone", "object", "failed: cannot write: .*access denied", rule="^0 PUT (?!.*encryption: AES256)"),
    Tried("rclone", "object", f"failed: .*{BOTH}", rule="^0 PUT .*x-amz-checksum", refusal="UnknownChecksum"),
    Tried("rclone", "object", f"failed: .*{BOTH}", rule="^0 GET .*x-amz-checksum", refusal="UnknownChecksum"),
    Tried("rclone", "object", "ok", {}, WITHOUT, rule="^0 (PUT|GET) .*x-amz-checksum"),
    Tried(
        "rclone", "bucket", f"failed: .*correct the secret key, or.*{BOTH}", rule="^0", refusal="SignatureDoesNotMatch"
    ),
    Tried("rclone", "bucket", "failed: .*addressing_style = virtual", rule="^0", refusal="SecondLevelDomainForbidden"),
    Tried("rclone", "object", "ok", rule="never", seconds=1.5),
]


@pytest.mark.parametrize("tried", STORES)
def test_what_a_store_says(ask: Ask, machine: Machine, stores: dict[str, Store], tried: Tried) -> None:
    store, entry = stores[tried.store], dict(tried.entry or {})
    (machine.home / ".aws").mkdir()
    (machine.home / ".aws/credentials").write_text(LAB)
    (machine.home / ".aws/config").write_text(f"[profile sso]\n{SSO}")
    with Front(store, tried.rule, tried.refusal, tried.seconds) as front:
        host = front.host if tried.rule else store.host
        if isinstance(store, S3Store) and tried.entry is not None:
            pasted = entry.pop("pasted", False)
            conf = store.clearml_conf(**({"host": host} | entry))
            machine.configure(f"sdk {{ {conf} }}" if pasted else conf)
        given = {name: value.replace("{host}", host) for name, value in tried.variables.items()}
        by_variables = store.environment() if tried.entry is None else {}
        variables = {name: value.replace(store.host, host) for name, value in (by_variables | given).items()}
        uri = tried.uri.replace("{uri}", store.uri("a/path").replace(store.host, host))
        report = ask("storage", uri=uri, **variables)
    assert re.match(tried.words.replace("{host}", host), report[f"storage: {tried.check}"])
    failed = tried.words.startswith("failed")
    assert report.well == report["storage: object"].startswith(PROVEN) == (not failed)
    assert report.cure.startswith(f"storage: {tried.check}: ") or not failed


# What stands where the API server should be; the check that says so; its words; its cure.
ADDRESSES = [
    ("127.0.0.1:8008", "address", "no address", "http://host:port"),
    ("{store}", "API", "something else", "port 8008"),
    ("https://{host}", "address", PLAIN, "write {api}"),
    ("http://{secure}", "address", TLS, "write https://{secure}"),
    ("https://{secure}", "API", "certificate not trusted", "api.verify_certificate.*REQUESTS_CA_BUNDLE"),
]


@pytest.mark.parametrize("case", ADDRESSES)
def test_a_wrong_address_of_the_api_server_hides_nothing_else(
    ask: Ask, machine: Machine, server: ClearMLServer, rclone: Rclone, rclone_tls: Rclone, case: tuple[str, ...]
) -> None:
    places = {"api": server.api_url, "host": server.api_url.partition("//")[2]}
    places |= {"secure": rclone_tls.host, "store": rclone.endpoint}
    address, check, words, cure = (text.format(**places) for text in case)
    machine.configure(server.configuration())
    report = ask("server", CLEARML_API_HOST=address)
    assert re.match(f"failed: .*{words}.*CLEARML_API_HOST, environment", report[f"server: {check}"])
    assert re.search(cure, report.cure)
    assert report["server: keys"].startswith("skipped")
    assert report["server: file server"].startswith("ok")


def test_azure_without_its_package(ask: Ask) -> None:
    """As far as that goes without Azure: azure-storage-blob is not among the tests' packages."""
    report = ask("storage", uri="azure://account.blob.core.windows.net/container/path")
    assert report.cure.startswith("storage: credentials: uv sync --group azure")


TARGETS = [
    ("s3:/bucket/path", "no bucket"),
    ("s4://bucket/path", "neither s3://"),
    ("s3://127.0.0.1:9000/", "no bucket"),
    ("s3://AKIATESTSTORE4321:not-a-secret@127.0.0.1:9000/bucket", "credentials do not belong into the URI"),
    (__file__, "is not a folder"),
]


@pytest.mark.parametrize(("uri", "words"), TARGETS)
def test_a_target_that_is_none(uri: str, words: str) -> None:
    found = doctor.examine(doctor.Setup(uri, "--output-uri"), "storage: target", doctor.check_target)
    assert found
    assert (found.state, found.source, bool(found.cure)) == ("failed", "--output-uri", True)
    assert words in found.value
    assert "not-a-secret" not in found.value


def fail(error: Exception, *_: object, **__: object) -> NoReturn:
    raise error


def slow_upload(*arguments: Any, upload: Callable[..., Any] = StorageManager.upload_file, **_: Any) -> None:
    time.sleep(0.5)
    upload(*arguments)


FULL, DENIED = OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "Permission denied")
# A step that goes wrong, how, what is said; and how many objects are left.
STEPS: list[tuple[object, str, Callable[..., Any], str, int]] = [
    (StorageManager, "upload_file", partial(fail, FULL), "cannot write: refused: quota", 0),
    (StorageManager, "upload_file", slow_upload, r"cannot write: no answer: time-out .*no answer for 0.2 s", 0),
    (storage.Folder, "_chunks", partial(fail, TimeoutError("timed out")), "cannot read.*time-out", 0),
    (storage.Folder, "_remove", partial(fail, DENIED), "cannot delete.*access denied", 1),
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
    assert refusal.value.cure
    for thread in threading.enumerate():
        if thread.name == "bounded":  # given up
            thread.join()
    assert len([*tmp_path.iterdir()]) == left
