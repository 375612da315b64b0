"""The doctor against real stores and a stand-in server: what it finds, where that came from, the cure, nothing left.

What it says of a server, a file or a store that a run cannot use is in the catalogue, faults.py, beside what the run
says. What an error of a store means is in test_setups.py.
"""

import errno
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from clearml import StorageManager
from clearml_server import ClearMLServer
from conftest import Machine, copy_script, silent
from reading import Report
from stores import CHECKSUM, FakeGCS, Front, Rclone, Rule, S3Store, SeaweedFS, Store, free_port

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


# --- the whole ------------------------------------------------------------------------------------------------------
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


# --- configuration --------------------------------------------------------------------------------------------------
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


# --- server ---------------------------------------------------------------------------------------------------------
def test_a_server_that_is_well(ask: Ask, machine: Machine, server: ClearMLServer) -> None:
    """Its file server is the target by default, and is tried as the run does."""
    setting = "sdk.development.default_output_uri"
    machine.configure(server.configuration(), f'{setting}: "{server.files_url}"')
    report = ask("configuration", "server", "storage", uri="")
    assert re.match("ok: access key ...-key is user tester .*~/clearml.conf", report["server: keys"])
    assert re.match("ok: http.*/ .*files_server, ~/clearml.conf|ok: http", report["server: file server"])
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


# --- stores ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def stores(rclone: Rclone, rclone_tls: Rclone, seaweed: SeaweedFS, gcs: FakeGCS) -> Iterator[dict[str, Store]]:
    """All of them, afterwards as before; and nobody has made a bucket."""
    every: dict[str, Store] = {"rclone": rclone, "tls": rclone_tls, "seaweed": seaweed, "gcs": gcs}
    before = {name: store.keys() for name, store in every.items()}
    yield every
    assert {name: store.keys() for name, store in every.items()} == before
    assert rclone.buckets() == seaweed.buckets() == ["models"]


NOBODY = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
ROLE = {**NOBODY, "AWS_ROLE_ARN": "arn:aws:iam::1:role/any", "AWS_WEB_IDENTITY_TOKEN_FILE": "/no/such"}
GOOGLE = {"STORAGE_EMULATOR_HOST": "", "NO_GCE_CHECK": "true"}
GOOGLE_KEY = {**GOOGLE, "GOOGLE_APPLICATION_CREDENTIALS": '{"type": "service_account"}'}
PROFILES = f"[lab]\naws_access_key_id = {Store.access_key}\naws_secret_access_key = {Store.secret_key}\n"
SSO = "sso_account_id = 1\nsso_role_name = any\nsso_region = eu-west-1\nsso_start_url = https://sso.invalid\n"
PLAIN, TLS = "TLS spoken to a plain port", "plain HTTP spoken to a TLS port"
BOTH = "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"

# A store; what is changed in its entry of clearml.conf, None for variables alone; target, variables; check, finding
Tried = tuple[str, dict[str, Any] | None, str, dict[str, str], str, str]
STORES: list[Tried] = [
    ("seaweed", {}, "{uri}", {}, "credentials", r"ok: static keys, access key \.\.\.4321 \[sdk.aws.s3.credentials"),
    ("tls", {"verify": False}, "{uri}", CHECKSUM, "endpoint", "warning: .*certificate not checked.*ca.pem"),
    ("tls", {}, "{uri}", CHECKSUM, "endpoint", "ok: https://"),
    ("tls", None, "s3://models/a/path", {}, "credentials", "ok: boto3 finds env, access key ...4321"),
    ("rclone", None, "s3://models", {**NOBODY, "AWS_PROFILE": "lab"}, "credentials", "ok: .* shared-credentials-file"),
    ("gcs", None, "{uri}", {}, "credentials", r"ok: http.*\[STORAGE_EMULATOR_HOST, environment"),
    ("tls", {"verify": "/no/such"}, "{uri}", {}, "bucket", "failed: .*certificate file missing .*/path/ca.pem"),
    ("tls", {}, "{uri}", {}, "object", f"failed: .*checksum not understood .*{BOTH}"),
    ("tls", None, "s3://models", {"AWS_ENDPOINT_URL": "http://{host}"}, "endpoint", f"failed: .*{TLS} .AWS_.* https:"),
    ("rclone", None, "s3://models", {"AWS_ENDPOINT_URL": "{host}"}, "credentials", "failed: .*write http:// or https:"),
    ("rclone", None, "s3://models", {**NOBODY, "AWS_PROFILE": "lib"}, "credentials", "failed: .*correct AWS_PROFILE"),
    ("rclone", None, "s3://models", {**NOBODY, "AWS_PROFILE": "sso"}, "credentials", "failed: .*aws sso login --pro"),
    ("rclone", None, "s3://models", NOBODY, "credentials", "failed: .*no keys.*AWS_ACCESS_KEY_ID"),
    ("rclone", None, "s3://models", ROLE, "credentials", "failed: .*missing.*AWS_WEB_IDENTITY_TOKEN_FILE"),
    ("rclone", {"host": "h:1"}, "s3://models", NOBODY, "credentials", "failed: .*no keys.*AWS_ACCESS_KEY_ID"),
    ("gcs", None, "gs://models", GOOGLE, "credentials", "failed: .*gcloud auth application-default login"),
    ("gcs", None, "gs://models", GOOGLE_KEY, "credentials", "failed: .*holds the key itself; write it to a file"),
]


@pytest.mark.parametrize("tried", STORES)
def test_what_a_store_says(ask: Ask, machine: Machine, stores: dict[str, Store], tried: Tried) -> None:
    name, entry, uri, variables, check, words = tried
    store = stores[name]
    places = {"host": store.host, "uri": store.uri("a/path")}
    (machine.home / ".aws").mkdir()
    (machine.home / ".aws/credentials").write_text(PROFILES)
    (machine.home / ".aws/config").write_text(f"[profile sso]\n{SSO}")
    if isinstance(store, S3Store) and entry is not None:
        machine.configure(store.clearml_conf(**entry))
    elif not variables.get("GOOGLE_APPLICATION_CREDENTIALS"):
        replaced = {key: value.replace("{host}", store.host) for key, value in variables.items()}
        variables = store.environment() | replaced
    report = ask("storage", uri=uri.format(**places), **variables)
    assert re.match(words, report[f"storage: {check}"])
    proven_or_told(report, f"storage: {check}" if words.startswith("failed") else "")


def proven_or_told(report: Report, failed: str) -> None:
    assert report.well == report["storage: object"].startswith(PROVEN) == (not failed)
    assert report.cure.startswith(f"{failed}: ") if failed else report.code == 0


def no_list(request: BaseHTTPRequestHandler, status: int) -> tuple[int, str] | None:
    """Without s3:ListBucket what is not there is forbidden."""
    return (403, "AccessDenied") if status == 404 or "list-type" in request.path else None


def encrypted(request: BaseHTTPRequestHandler, _: int) -> tuple[int, str] | None:
    encrypts = request.headers["x-amz-server-side-encryption"] == "AES256"
    return (403, "AccessDenied") if request.command == "PUT" and not encrypts else None


def no_checksum(command: str) -> Rule:
    def refuse(request: BaseHTTPRequestHandler, _: int) -> tuple[int, str] | None:
        unknown = [name for name in request.headers if name.startswith("x-amz-checksum")]
        return (400, f"Unsupported header {unknown}") if unknown and request.command == command else None

    return refuse


def object_admin(request: BaseHTTPRequestHandler, _: int) -> tuple[int, str] | None:
    """Of Google's role storage.objectAdmin: the bucket's own record is not for it."""
    return (403, "Forbidden") if re.search("/b/models($|[?])", request.path) else None


WITHOUT = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required"}
ENCRYPT = {"extra_args": {"ServerSideEncryption": "AES256"}}
# A rule of the store's; seconds for each answer; what is changed in its entry, or variables; what is found.
RULES: list[tuple[Rule, float, dict[str, Any], str, str]] = [
    (no_list, 0, {}, "object", "ok"),
    (object_admin, 0, {}, "object", "ok"),
    (encrypted, 0, ENCRYPT, "object", "ok"),
    (encrypted, 0, {}, "object", "failed: cannot write: .*access denied"),
    (lambda *_: None, 1.5, {}, "object", "ok"),
    (no_checksum("PUT"), 0, {}, "object", f"failed: .*{BOTH}"),
    (no_checksum("GET"), 0, {}, "object", f"failed: .*{BOTH}"),
    (no_checksum("PUT"), 0, WITHOUT, "object", "ok"),
    (no_checksum("GET"), 0, WITHOUT, "object", "ok"),
    (
        lambda *_: (403, "SecondLevelDomainForbidden"),
        0,
        {},
        "bucket",
        "failed: .*addressing_style = virtual under s3 =",
    ),
    (lambda *_: (403, "SignatureDoesNotMatch"), 0, {}, "bucket", f"failed: .*correct the secret key, or.*{BOTH}"),
]


@pytest.mark.parametrize("case", RULES)
def test_a_store_with_rules_of_its_own(
    ask: Ask, machine: Machine, stores: dict[str, Store], case: tuple[Rule, float, dict[str, Any], str, str]
) -> None:
    rule, seconds, change, check, words = case
    variables = {name: value for name, value in change.items() if name.isupper()}
    store = stores["gcs" if rule is object_admin else "rclone"]
    with Front(store, rule, seconds) as front:
        uri = store.uri("a/path").replace(store.host, front.host)
        if isinstance(store, S3Store):
            entry = {name: value for name, value in change.items() if name.islower()}
            machine.configure(store.clearml_conf(host=front.host, **entry))
        else:
            variables["STORAGE_EMULATOR_HOST"] = f"http://{front.host}"
        report = ask("storage", uri=uri, **variables)
    assert re.match(words, report[f"storage: {check}"])
    proven_or_told(report, f"storage: {check}" if words.startswith("failed") else "")


def test_azure_without_its_package(ask: Ask) -> None:
    """As far as that goes without Azure: azure-storage-blob is not among the tests' packages."""
    report = ask("storage", uri="azure://account.blob.core.windows.net/container/path")
    assert report.cure.startswith("storage: credentials: uv sync --group azure")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3:/bucket/path", "no bucket"),
        ("s4://bucket/path", "neither s3://"),
        ("s3://127.0.0.1:9000/", "no bucket"),
        ("s3://AKIATESTSTORE4321:not-a-secret@127.0.0.1:9000/bucket", "credentials do not belong into the URI"),
        (__file__, "is not a folder"),
    ],
)
def test_a_target_that_is_none(uri: str, words: str) -> None:
    found = doctor.examine(doctor.Setup(uri, "--output-uri"), "storage: target", doctor.check_target)
    assert found
    assert (found.state, found.source) == ("failed", "--output-uri")
    assert words in found.value
    assert found.cure
    assert "not-a-secret" not in found.value


# What stands where the API server should be; the check that says so; its words; its cure.
ADDRESSES = [
    ("127.0.0.1:8008", "address", "no address", "http://host:port"),
    ("{store}", "API", "something else", "port 8008"),
    ("https://{host}", "address", PLAIN, "write {api}"),
    ("http://{secure}", "address", TLS, "write https://{secure}"),
    ("https://{secure}", "API", "certificate not trusted", "api.verify_certificate.*REQUESTS_CA_BUNDLE"),
    ("{store}", "API", "something else", "port 8008"),
]

# What is wrong with the entry in clearml.conf; what is said of it; its cure.
ENTRIES = [
    ({"host": "127.0.0.1"}, "is taken for {store_host}", 'write host: "{store_host}"'),
    ({"host": "127.0.0.1:1"}, "there is one for '127.0.0.1:1'", 'add one with host: "{store_host}"'),
    ({"key": None}, "dropped in silence", "use_credentials_chain"),
    ({"host": "http://127.0.0.1:1"}, "the SDK cannot use", "without http://"),
    ({"bucket": "mod"}, "bucket 'mod' is taken for", "write the whole name"),
    ({"pasted": True}, "they stand at sdk.sdk.aws.s3.credentials", "at the end of the file, outside all braces"),
]


@pytest.mark.parametrize(("address", "entry"), [*zip(ADDRESSES, ENTRIES, strict=True)])
def test_neither_a_wrong_address_nor_a_wrong_entry_hides_the_other(
    ask: Ask,
    machine: Machine,
    server: ClearMLServer,
    rclone: Rclone,
    rclone_tls: Rclone,
    address: tuple[str, str, str, str],
    entry: tuple[dict[str, Any], str, str],
) -> None:
    places = {"api": server.api_url, "host": server.api_url.partition("//")[2], "secure": rclone_tls.host}
    places |= {"store": rclone.endpoint, "store_host": rclone.host}
    host, check, words, cure = (text.format(**places) for text in address)
    change, entry_words, entry_cure = entry
    conf = rclone.clearml_conf(**change).replace("sdk { aws", "sdk { sdk { aws" if "pasted" in change else "sdk { aws")
    machine.configure(server.configuration(), conf + ("}" if "pasted" in change else ""))
    report = ask("server", "storage", uri=rclone.uri("runs"), CLEARML_API_HOST=host)
    assert re.match(f"failed: .*{words}.*CLEARML_API_HOST, environment", report[f"server: {check}"])
    assert re.search(cure, report.cure)
    assert report["server: keys"].startswith("skipped")
    assert report["server: file server"].startswith("ok")
    assert re.match(f"failed: .*{entry_words.format(**places)}.*~/clearml.conf", report["storage: entry"])
    assert entry_cure.format(**places) in report["storage: entry"]
    assert report["storage: object"].startswith("skipped")


# --- nothing is left behind -------------------------------------------------------------------------------------------
Fail = Callable[..., Any]


def full_disk(file: str, address: str, **_: Any) -> None:
    Path(address.removeprefix("file://")).touch()  # as a write has done that finds no room
    raise OSError(errno.ENOSPC, "No space left on device")


def slow(file: str, address: str, upload: Fail = StorageManager.upload_file, **_: Any) -> None:
    time.sleep(0.5)
    upload(file, address)


def no_permission(*_: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


def silent_read(*_: Any) -> Iterator[bytes]:
    raise TimeoutError("timed out")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the SDK's pyparsing
@pytest.mark.parametrize(
    ("owner", "step", "action", "words", "left"),
    [
        (StorageManager, "upload_file", full_disk, "cannot write: refused: quota", 0),
        (StorageManager, "upload_file", slow, r"cannot write: no answer: time-out .*no answer for 0.2 s", 0),
        (storage.Folder, "_chunks", silent_read, "cannot read.*time-out", 0),
        (storage.Folder, "_remove", no_permission, "cannot delete.*access denied", 1),
    ],
)
def test_a_check_that_fails_leaves_no_object_if_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, step: str, action: Fail, words: str, left: int
) -> None:
    monkeypatch.setattr(owner, step, action)
    monkeypatch.setattr(storage, "STEP", 0.2 if action is slow else 30)
    with pytest.raises(RunError, match=words) as refusal:
        storage.check_access(str(tmp_path))
    assert refusal.value.cure
    for thread in threading.enumerate():
        if thread.name == "bounded":  # given up
            thread.join()
    assert len([*tmp_path.iterdir()]) == left
