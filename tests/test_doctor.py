"""The doctor against real stores and a stand-in server: what it finds, where that came from, the cure, nothing left.

What it says of a server, a file or a store that a run cannot use is in the catalogue, faults.py, beside what the run
says. What an error of a store means is in test_setups.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, silent
from reading import Report
from stores import CHECKSUM, FakeGCS, Rclone, S3Store, SeaweedFS, Store, free_port

from clearml_client import doctor, storage
from clearml_client.faults import RunError

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
    kept = {"clearml.conf", ".clearml.conf", "other.conf", ".aws", "elsewhere"}
    assert {path.name for path in machine.home.iterdir()} <= kept


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


@pytest.mark.parametrize("full", [True, False], ids=["a disk that is full", "a reader that has left"])
def test_an_output_that_takes_nothing_costs_no_exit_code(machine: Machine, full: bool) -> None:
    machine.configure("api: 5")
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as disk:
        process = machine.start(*DOCTOR, "--only", "configuration", stdout=disk if full else writer)
    os.close(writer)
    assert process.communicate()[1] == ""
    assert process.returncode == 1


def test_help_says_what_the_exit_codes_mean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        doctor.main()
    said = " ".join(capsys.readouterr().out.split())
    assert "Exit code 0: all well, perhaps with warnings; 1: something failed; 2: wrong arguments." in said
    assert "Example: uv run -m clearml_client.doctor" in said


# --- configuration --------------------------------------------------------------------------------------------------
def test_without_any_configuration_it_warns_and_is_well(ask: Ask) -> None:
    report = ask("configuration", "server", "storage")
    assert report["configuration: ClearML server"].startswith("warning: no configuration: runs are recorded offline")
    assert report["server: API"].startswith("skipped: no server is configured")
    assert "clearml-init" in report.cure


HALF = {"clearml.conf": 'api { api_server: "http://127.0.0.1:1" }'}
TWO_FILES = {"clearml.conf": "sdk {}", "other.conf": "$"}
OTHER = {"CLEARML_CONFIG_FILE": "~/other.conf"}
KEYS = {"CLEARML_API_ACCESS_KEY": "an-access-key", "CLEARML_API_SECRET_KEY": "a-wrong-secret"}
SECRET = {"CLEARML_API_SECRET_KEY": "a-wrong-secret"}
WHOLE = r"ok: .*\[api.api_server, ~/clearml.conf; CLEARML_API_ACCESS_KEY, environment"
BEATS = "warning: CLEARML_API_SECRET_KEY beats api.credentials.secret_key.*unset CLEARML_API_SECRET_KEY"
Said = tuple[dict[str, str], dict[str, str], dict[str, str]]  # files, variables; what checks find
CONFIGURATIONS: list[Said] = [
    (
        TWO_FILES,
        OTHER,
        {
            "file": "ok: ~/other.conf; ~/clearml.conf is not read",
            "ClearML server": r"ok: .*\[api.api_server, ~/other.conf",
        },
    ),
    (HALF, KEYS, {"ClearML server": WHOLE}),
    ({"clearml.conf": "$"}, SECRET, {"overrides": BEATS}),
]


@pytest.mark.parametrize("said", CONFIGURATIONS)
def test_what_the_configuration_says(ask: Ask, machine: Machine, server: ClearMLServer, said: Said) -> None:
    files, variables, found = said
    for name, content in files.items():
        (machine.home / name).write_text(content.replace("$", server.configuration()))
    report = ask("configuration", "storage", **variables)
    for check, words in found.items():
        assert re.match(words, report[f"configuration: {check}"])
    assert report["storage: target"].startswith("ok")


def test_values_from_dotenv_are_named_as_such(machine: Machine, server: ClearMLServer, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "clearml_client", tmp_path / "clearml_client")
    machine.configure(server.configuration())
    (tmp_path / ".env").write_text(f"CLEARML_OUTPUT_URI={machine.home}/elsewhere\nCLEARML_API_ACCESS_KEY=inside\n")
    machine.variables = {"PYTHON_DOTENV_DISABLED": "0", "CLEARML_API_ACCESS_KEY": "outside"}
    machine.variables["PYTHONPATH"] = str(tmp_path)
    done = machine.run(*DOCTOR, "--json", "--only", "configuration", "storage")
    report = Report(done.returncode, done.stdout)
    wins = f"warning: another value in the environment wins: CLEARML_API_ACCESS_KEY [{tmp_path}/.env]"
    assert report["configuration: .env"].startswith(wins)
    target = f"ok: folder ~/elsewhere, will be made [CLEARML_OUTPUT_URI, {tmp_path}/.env]"
    assert report["storage: target"].startswith(target)
    assert report["storage: object"].startswith(PROVEN)


# --- server ---------------------------------------------------------------------------------------------------------
def test_a_server_that_is_well(ask: Ask, machine: Machine, server: ClearMLServer) -> None:
    machine.configure(server.configuration())
    report = ask("configuration", "server", "storage", uri="")
    assert re.match("ok: access key ...-key is user tester .*~/clearml.conf", report["server: keys"])
    assert re.match("ok: server 2.3.0 with API 2.34, SDK 2.", report["server: version"])
    assert report["server: file server's object"].startswith(PROVEN)
    assert report["storage: target"].startswith("ok: empty: the ClearML server's file server [default]")
    assert report["storage: object"].startswith(PROVEN)
    assert report.well


def test_keys_files_and_web_that_are_wrong(ask: Ask, machine: Machine, server: ClearMLServer) -> None:
    machine.configure(server.configuration().replace("stand-in-access-key", "stand-in-wrong-key-abcd"))
    lost = f"http://127.0.0.1:{free_port()}"
    report = ask("server", CLEARML_FILES_HOST=lost, CLEARML_WEB_HOST=server.files_url)
    assert re.match("failed: access key ...abcd and its secret are not accepted", report["server: keys"])
    assert "make new credentials" in report.cure
    assert "wrong-key" not in str(report.findings)
    assert report["server: web server"].startswith(f"warning: {server.files_url} is no web page")
    assert re.match(f"failed: {lost}: refused.*CLEARML_FILES_HOST", report["server: file server"])
    assert report["server: file server's object"].startswith("skipped")


def test_a_file_server_that_the_run_does_not_use_is_a_warning(
    ask: Ask, machine: Machine, server: ClearMLServer
) -> None:
    machine.configure(server.configuration())
    report = ask("server", uri=str(machine.home / "elsewhere"), CLEARML_FILES_HOST=f"http://127.0.0.1:{free_port()}")
    assert report.code == 0
    assert re.match("warning: .*refused.*this run stores nothing there", report["server: file server"])


def test_a_file_server_by_default_is_tried_as_the_run_does(ask: Ask, machine: Machine, server: ClearMLServer) -> None:
    setting = "sdk.development.default_output_uri"
    machine.configure(server.configuration(), f'{setting}: "{server.files_url}"')
    report = ask("storage", uri="")
    assert report["storage: target"].startswith(f"ok: {server.files_url} [{setting}, ~/clearml.conf]")
    assert report["storage: object"].startswith(PROVEN)


@pytest.mark.parametrize(("theirs", "words"), [("2.0", "this SDK cannot talk to it"), ("2.10", "knows newer calls")])
def test_a_server_that_is_older_than_the_sdk(theirs: str, words: str) -> None:
    found = doctor.examine(doctor.Setup("", "", claims={"api_version": theirs}), "version", doctor.check_version)
    assert found
    assert words in found.value
    assert found.cure == "update the server"


# --- stores ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def stores(rclone: Rclone, rclone_tls: Rclone, seaweed: SeaweedFS, gcs: FakeGCS) -> Iterator[dict[str, Store]]:
    """All of them, without an object, afterwards as before; and nobody has made a bucket."""
    every: dict[str, Store] = {"rclone": rclone, "tls": rclone_tls, "seaweed": seaweed, "gcs": gcs}
    yield every
    assert {name: store.keys() for name, store in every.items()} == {name: [] for name in every}
    assert rclone.buckets() == seaweed.buckets() == ["models"]


HTTP, HTTPS = ({"AWS_ENDPOINT_URL": f"{scheme}://{{host}}"} for scheme in ("http", "https"))
NOBODY = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
PROFILE, OTHER_PROFILE = ({**NOBODY, "AWS_PROFILE": name} for name in ("lab", "lib"))
LAB = f"[lab]\naws_access_key_id = {Store.access_key}\naws_secret_access_key = {Store.secret_key}\n"
NO_EMULATOR = {"STORAGE_EMULATOR_HOST": "", "NO_GCE_CHECK": "true"}
PLAIN, TLS = "TLS spoken to a plain port", "plain HTTP spoken to a TLS port"
CHUNKS = "failed: .*checksum not understood .*AWS_REQUEST_CHECKSUM_CALCULATION=when_required"

# A store; what is changed in its entry of clearml.conf, None for variables alone; target, variables; check, finding
Tried = tuple[str, dict[str, Any] | None, str, dict[str, str], str, str]
STORES: list[Tried] = [
    ("rclone", {}, "{uri}", {}, "credentials", r"ok: static keys, access key \.\.\.4321 \[sdk.aws.s3.credentials"),
    ("seaweed", {}, "{uri}", {}, "endpoint", "ok: http://"),
    ("tls", {}, "{uri}", CHECKSUM, "endpoint", "ok: https://"),
    ("tls", {"verify": False}, "{uri}", CHECKSUM, "endpoint", "warning: .*certificate not checked.*ca.pem"),
    ("tls", None, "s3://models/a/path", {}, "endpoint", r"ok: https://.*\[AWS_ENDPOINT_URL, environment"),
    ("seaweed", None, "s3://models/a/path", {}, "credentials", "ok: boto3 finds env, access key ...4321"),
    ("rclone", None, "s3://models", PROFILE, "credentials", "ok: .* shared-credentials-file, access key ...4321"),
    ("gcs", None, "{uri}", {}, "credentials", r"ok: .*emulator .*\[STORAGE_EMULATOR_HOST, environment"),
    ("tls", {"verify": "/no/such"}, "{uri}", {}, "bucket", "failed: .*certificate file missing .*/path/ca.pem"),
    ("tls", {}, "{uri}", {}, "object", CHUNKS),
    ("tls", None, "s3://models", HTTP, "endpoint", f"failed: .*{TLS} .AWS_ENDPOINT_URL, environment. write https:"),
    ("rclone", None, "s3://models", HTTPS, "endpoint", f"failed: .*{PLAIN} .AWS_ENDPOINT_URL, .* write http:"),
    ("rclone", None, "s3://models", OTHER_PROFILE, "credentials", "failed: .*lib.*correct AWS_PROFILE"),
    ("rclone", None, "s3://models", NOBODY, "credentials", "failed: .*no keys.*AWS_ACCESS_KEY_ID"),
    ("gcs", None, "gs://models", NO_EMULATOR, "credentials", "failed: .*gcloud auth application-default login"),
]


@pytest.mark.parametrize("tried", STORES)
def test_what_a_store_says(ask: Ask, machine: Machine, stores: dict[str, Store], tried: Tried) -> None:
    name, entry, uri, variables, check, words = tried
    store = stores[name]
    places = {"host": store.host, "uri": store.uri("a/path")}
    (machine.home / ".aws").mkdir()
    (machine.home / ".aws/credentials").write_text(LAB)
    if entry is None:
        variables = store.environment() | {key: value.format(**places) for key, value in variables.items()}
    elif isinstance(store, S3Store):
        machine.configure(store.clearml_conf(**entry))
    report = ask("storage", uri=uri.format(**places), **variables)
    assert re.match(words, report[f"storage: {check}"])
    assert report["storage: object"].startswith("ok: written") == report.well
    assert report.well == (not words.startswith("failed"))
    if not report.well:
        assert report.cure.startswith(f"storage: {check}: ")


def test_azure_without_credentials(ask: Ask) -> None:
    """As far as that goes without Azure: azure-storage-blob is not among the tests' packages."""
    report = ask("storage", uri="azure://account.blob.core.windows.net/container/path")
    assert re.search("uv sync --group azure|AZURE_STORAGE_ACCOUNT", report.cure)
    assert report["storage: object"].startswith("skipped")


def test_a_folder_that_is_not_yet_there(ask: Ask, tmp_path: Path) -> None:
    folder = tmp_path / "not yet there"
    report = ask("storage", uri=f"file://{folder}")
    assert f"folder {folder}, will be made" in report["storage: target"]
    assert report["storage: object"].startswith(PROVEN)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3:/bucket/path", "no bucket"),
        ("s4://bucket/path", "neither s3://"),
        ("s3://127.0.0.1:9000/", "no bucket"),
        ("s3://AKIATESTSTORE4321:not-a-secret@127.0.0.1:9000/bucket", "credentials do not belong into the URI"),
        ("/no/such/folder", "whose parent exists: /no/such"),
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
Address = tuple[str, str, str, str]
ADDRESSES: list[Address] = [
    ("127.0.0.1:8008", "address", "no address", "http://host:port"),
    ("{store}", "API", "something else", "port 8008"),
    ("https://{host}", "address", PLAIN, "write {api}"),
    ("http://{secure}", "address", TLS, "write https://{secure}"),
    ("https://{secure}", "API", "certificate not trusted", "api.verify_certificate.*REQUESTS_CA_BUNDLE"),
]

# What is wrong with the entry in clearml.conf; the check that says so; its words; the first cure.
Entry = tuple[dict[str, Any], str, str, str]
ENTRIES: list[Entry] = [
    ({"host": "127.0.0.1"}, "entry", "the port is missing", 'write host: "{store_host}"'),
    ({"host": "127.0.0.1:1"}, "entry", "has another port", "one and the same host:port"),
    ({"host": "store.example:9000"}, "entry", "is another host", 'add an entry with host: "{store_host}"'),
    ({"host": "http://{store_host}"}, "entry", "the SDK cannot use", "without http://"),
    ({"bucket": "mod"}, "entry", "bucket 'mod' is taken for", "write the whole name"),
]


@pytest.mark.parametrize(("address", "entry"), [*zip(ADDRESSES, ENTRIES, strict=True)])
def test_neither_a_wrong_address_nor_a_wrong_entry_hides_the_other(
    ask: Ask, machine: Machine, server: ClearMLServer, stores: dict[str, Store], address: Address, entry: Entry
) -> None:
    rclone, rclone_tls = stores["rclone"], stores["tls"]
    assert isinstance(rclone, S3Store)
    places = {"api": server.api_url, "secure": rclone_tls.host}
    places |= {"host": server.api_url.partition("//")[2], "store": rclone.endpoint, "store_host": rclone.host}
    host, check, words, cure = (text.format(**places) for text in address)
    change, entry_check, entry_words, entry_cure = entry
    if "host" in change:
        change = {"host": change["host"].format(**places)}
    machine.configure(server.configuration(), rclone.clearml_conf(**change))
    report = ask("server", "storage", uri=rclone.uri("runs"), CLEARML_API_HOST=host)
    assert re.match(f"failed: .*{words}.*CLEARML_API_HOST, environment", report[f"server: {check}"])
    assert re.search(cure, report.cure)
    assert report["server: keys"].startswith("skipped")
    assert report["server: file server"].startswith("ok")
    assert re.match(f"failed: .*{entry_words}", report[f"storage: {entry_check}"])
    assert entry_cure.format(**places) in report[f"storage: {entry_check}"]
    assert "~/clearml.conf" in report["storage: entry"]
    assert report["storage: object"].startswith("skipped")


def test_a_full_disk(machine: Machine) -> None:
    """A disk of one page in a mount namespace, which goes with its process."""
    folder = machine.home / "elsewhere"
    folder.mkdir()
    script = 'mount -t tmpfs -o size=4k none "$0" && head -c 4096 /dev/zero > "$0/full" || exit 99; "$@"; ls "$0" >&2'
    command = ["unshare", "-rm", "sh", "-c", script, str(folder), sys.executable, *DOCTOR]
    command += ["--json", "--only", "storage", "--output-uri", str(folder)]
    if not shutil.which("unshare"):
        pytest.skip("no unshare here")
    done = subprocess.run(command, env=machine.environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("no mount namespaces here")
    document = json.loads(done.stdout)
    assert document["findings"][-1]["value"].startswith(f"{folder}: cannot write: refused: quota")
    assert "free space" in document["cure"]
    assert done.stderr == "full\n"  # nothing else was left there


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the SDK's pyparsing
def test_a_proof_that_fails_leaves_no_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_back(*_: object) -> Iterator[bytes]:
        raise TimeoutError("timed out")

    monkeypatch.setattr(storage.Folder, "_chunks", give_back)
    with pytest.raises(RunError, match=r"cannot read.*time-out"):
        storage.prove(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_probe_that_cannot_be_deleted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the SDK's, which comes second."""
    own, keys = storage.Folder._remove, list[str]()

    def remove_one(store: storage.Folder, key: str) -> None:
        keys.append(key)
        if len(keys) > 1:
            raise PermissionError("Permission denied")
        own(store, key)

    monkeypatch.setattr(storage.Folder, "_remove", remove_one)
    with pytest.raises(RunError, match=r"cannot delete.*access denied"):
        storage.prove(str(tmp_path))
    assert len(keys) > 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_proof_that_is_given_up_leaves_no_object(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe, own = machine.home / "probe", storage.Folder._remove

    def remove_late(store: storage.Folder, key: str) -> None:
        time.sleep(0.5)
        own(store, key)

    monkeypatch.setenv("HOME", str(machine.home))
    monkeypatch.setattr(storage.Folder, "_remove", remove_late)
    monkeypatch.setitem(doctor.LIMITS, "storage", 0.1)
    monkeypatch.setattr(sys, "argv", ["doctor", "--only", "storage", "--output-uri", str(probe)])
    assert doctor.main() == 1
    assert re.search("failed +storage: object .*time-out: no answer for 0.1 s", capsys.readouterr().out)
    assert not probe.exists()
