"""The doctor against real stores, a stand-in server and sockets that misbehave: diagnosis, cure, and nothing left."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import pytest
from botocore.exceptions import BotoCoreError
from clearml_server import ClearMLServer
from conftest import ROOT, SECRETS, Machine, silent
from stores import CHECKSUM, FakeGCS, Rclone, S3Store, SeaweedFS, Store, free_port

from clearml_client.faults import diagnose


class Report:
    """What the doctor said with --json, and what must hold of every run."""

    def __init__(self, done: subprocess.CompletedProcess[str], machine: Machine) -> None:
        self.code, self.text = done.returncode, done.stdout + done.stderr
        assert done.stdout, self.text
        document = json.loads(done.stdout)
        self.cure: str = document["cure"]
        self.findings: dict[str, dict[str, str]] = {finding["name"]: finding for finding in document["findings"]}
        assert not [secret for secret in SECRETS if secret in self.text], "a secret was printed"
        assert self.code == (not document["ok"])
        kept = {"clearml.conf", ".clearml.conf", "other.conf", ".aws", "elsewhere", "gcs.json"}
        assert {path.name for path in machine.home.iterdir()} <= kept, "something was left in HOME"

    def state(self, name: str) -> str:
        return self.findings[name]["state"]

    def has(self, name: str, state: str, *words: str) -> bool:
        finding = self.findings[name]
        return finding["state"] == state and all(word in f"{finding['value']} {finding['source']}" for word in words)

    def well(self) -> bool:
        return self.code == 0 and all(finding["state"] in ("ok", "warning") for finding in self.findings.values())


class Doctor:
    """Runs it with --json on a machine of its own. clearml.conf stays as the last run had it, unless given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.machine = folder, Machine(folder / "home")
        self.machine.home.mkdir(parents=True, exist_ok=True)

    def __call__(self, *only: str, conf: str | None = None, uri: str | None = None, **variables: str) -> Report:
        if conf is not None:
            (self.machine.home / "clearml.conf").write_text(conf)
        arguments = ["--json", "--only", *only] + ([] if uri is None else [f"--output-uri={uri}"])
        other = Machine(self.machine.home, variables)
        return Report(other.run("-m", "clearml_client.doctor", *arguments, timeout=60), self.machine)

    def each(self, test: Callable[..., None], cases: Iterable[tuple[Any, ...]]) -> None:
        """The test with each case, side by side and each with a doctor of its own: most of a run is waiting."""
        with ThreadPoolExecutor(4) as pool:
            runs = {
                pool.submit(test, Doctor(self.folder / f"case-{number}"), *case): case
                for number, case in enumerate(cases)
            }
        for run, case in runs.items():
            assert run.exception() is None, f"{case}: {run.exception()}"


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path)


@pytest.fixture
def machine(doctor: Doctor) -> Machine:
    return doctor.machine


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ClearMLServer]:
    standin = ClearMLServer(tmp_path / "server")
    standin.start()
    yield standin
    standin.stop()
    assert not standin.tasks
    assert not [path for path in standin.files_folder.rglob("*") if path.is_file()], "an object was left"


def closed() -> str:
    return f"127.0.0.1:{free_port()}"


# --- configuration --------------------------------------------------------------------------------------------------
def test_without_any_configuration_it_warns_and_is_well(doctor: Doctor) -> None:
    report = doctor("configuration", "server", "storage")
    assert report.code == 0
    assert report.has("configuration: ClearML server", "warning", "no configuration: runs are recorded offline")
    assert report.has("server: API", "skipped", "no server is configured")
    assert "clearml-init" in report.cure


def test_a_configuration_file_that_does_not_exist(doctor: Doctor, machine: Machine, server: ClearMLServer) -> None:
    missing = doctor("configuration", CLEARML_CONFIG_FILE="~/other.conf")
    assert missing.has("configuration: file", "failed", "other.conf, and there is no such file", "CLEARML_CONFIG_FILE")
    assert "CLEARML_CONFIG_FILE" in missing.cure
    assert missing.code == 1
    (machine.home / "other.conf").write_text(server.configuration())
    cured = doctor("configuration", conf="sdk {}", CLEARML_CONFIG_FILE="~/other.conf")
    assert cured.has("configuration: file", "ok", "~/other.conf; ~/clearml.conf is not read", "CLEARML_CONFIG_FILE")
    assert cured.has("configuration: ClearML server", "ok", server.api_url, "api.api_server, ~/other.conf")


def test_the_hidden_file_is_not_read(doctor: Doctor, machine: Machine, server: ClearMLServer) -> None:
    hidden = machine.home / ".clearml.conf"
    hidden.write_text(server.configuration())
    report = doctor("configuration")
    assert report.has("configuration: file", "failed", "ClearML ignores ~/.clearml.conf")
    assert "mv ~/.clearml.conf ~/clearml.conf" in report.cure
    hidden.rename(machine.home / "clearml.conf")
    assert doctor("configuration").has("configuration: ClearML server", "ok", server.api_url)


def test_a_syntax_error_is_shown_with_its_line(doctor: Doctor, server: ClearMLServer) -> None:
    def test(doctor: Doctor, good: str, bad: str, line: int) -> None:
        report = doctor("configuration", "storage", conf=server.configuration().replace(good, bad))
        assert report.code == 1
        assert report.has("configuration: syntax", "failed", f"line {line}", "~/clearml.conf"), report.text
        assert "at or above that line" in report.cure
        assert report.state("configuration: ClearML server") == "skipped"
        assert report.state("storage: target") == "ok", "it stops at nothing"
        assert doctor("configuration", conf=server.configuration()).well()

    cases = [('stand-in-secret-key" }', "stand-in-secret-key }", 5), ("api {", "[api]\n", 3), ("\n}\n", "\n", 6)]
    doctor.each(test, cases)


def test_half_a_configuration(doctor: Doctor, server: ClearMLServer) -> None:
    half = doctor("configuration", "server", conf=f'api {{ api_server: "{server.api_url}" }}')
    assert half.code == 1
    assert half.has(
        "configuration: ClearML server", "failed", "half a ClearML configuration", "api.credentials.access_key"
    )
    assert half.state("server: API") == "skipped"
    assert "CLEARML_API_SECRET_KEY" in half.cure
    keys = {"CLEARML_API_ACCESS_KEY": server.access_key, "CLEARML_API_SECRET_KEY": server.secret_key}
    cured = doctor(
        "configuration", "server", CLEARML_FILES_HOST=server.files_url, CLEARML_WEB_HOST=server.web_url, **keys
    )
    assert cured.well()
    assert cured.has(
        "configuration: ClearML server", "ok", "api.api_server, ~/clearml.conf", "CLEARML_API_ACCESS_KEY, environment"
    )


def test_variables_that_override_the_file(doctor: Doctor, server: ClearMLServer) -> None:
    report = doctor(
        "configuration", "server", conf=server.configuration(), CLEARML_API_SECRET_KEY="a-wrong-secret-of-the-store"
    )
    assert report.has("configuration: overrides", "warning", "CLEARML_API_SECRET_KEY beats api.credentials.secret_key")
    assert report.has("server: keys", "failed", "not accepted")
    assert "unset CLEARML_API_SECRET_KEY" in report.findings["configuration: overrides"]["cure"]
    assert doctor("configuration", "server").well()
    assert doctor("configuration", "server").well()


def test_values_from_dotenv_are_named_as_such(machine: Machine, server: ClearMLServer, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "clearml_client", tmp_path / "clearml_client")
    (machine.home / "clearml.conf").write_text(server.configuration())
    (tmp_path / ".env").write_text(f"CLEARML_OUTPUT_URI={machine.home}/elsewhere\nCLEARML_API_ACCESS_KEY=inside\n")
    other = Machine(machine.home, {"PYTHON_DOTENV_DISABLED": "0", "CLEARML_API_ACCESS_KEY": "outside"})
    other.variables["PYTHONPATH"] = str(tmp_path)
    report = Report(other.run("-m", "clearml_client.doctor", "--json", "--only", "configuration", "storage"), machine)
    assert report.has("configuration: .env", "warning", "wins: CLEARML_API_ACCESS_KEY", f"{tmp_path}/.env")
    assert report.has("storage: target", "ok", "~/elsewhere", f"CLEARML_OUTPUT_URI, {tmp_path}/.env")
    assert report.state("storage: object") == "ok"


# --- server ---------------------------------------------------------------------------------------------------------
def test_a_server_that_is_well(doctor: Doctor, server: ClearMLServer) -> None:
    report = doctor("configuration", "server", "storage", conf=server.configuration())
    assert report.well()
    assert report.has("server: keys", "ok", "tester", "...-key", "~/clearml.conf")
    assert report.has("server: version", "ok", "server 2.3.0 with API 2.34", "SDK 2.")
    assert report.has("server: file server's object", "ok", "written, read, compared, deleted")
    assert report.has("storage: target", "ok", "file server")
    methods = [request.method for request in server.requests if "probe-" in request.path or request.path == "/"]
    assert "POST" in methods
    assert "DELETE" in methods


def test_wrong_keys_and_a_lost_file_server(doctor: Doctor, server: ClearMLServer) -> None:
    conf = server.configuration().replace("stand-in-access-key", "stand-in-wrong-key-abcd")
    report = doctor("server", conf=conf, CLEARML_FILES_HOST=f"http://{closed()}", CLEARML_WEB_HOST=server.files_url)
    assert report.code == 1
    assert report.has("server: keys", "failed", "...abcd", "not accepted")
    assert "make new credentials" in report.cure
    assert "wrong-key" not in report.text
    assert report.has("server: web server", "warning", "is no web page")
    assert report.has("server: file server", "failed", "refused", "CLEARML_FILES_HOST")
    assert report.state("server: file server's object") == "skipped"
    assert doctor("server", conf=server.configuration()).well()


def test_a_file_server_by_default_is_tried_as_the_run_does(doctor: Doctor, server: ClearMLServer) -> None:
    alone = doctor("storage", conf=server.configuration(), uri="")
    assert alone.has("storage: object", "ok", "written, read, compared, deleted", server.files_url)
    named = server.configuration() + f'\nsdk.development.default_output_uri: "{server.files_url}"'
    report = doctor("server", "storage", conf=named, uri="")
    assert report.well(), report.text
    assert report.has("storage: target", "ok", server.files_url, "sdk.development.default_output_uri, ~/clearml.conf")
    lost = doctor("server", "storage", conf=named, CLEARML_FILES_HOST=f"http://{closed()}")
    assert lost.state("server: file server") == lost.state("storage: object") == "failed"


# --- storage --------------------------------------------------------------------------------------------------------
def unchanged(store: Store, run: Callable[[], Report]) -> Report:
    before = store.keys()
    report = run()
    assert store.keys() == before, "an object was left"
    return report


def test_each_kind_of_target(
    doctor: Doctor, rclone: Rclone, rclone_tls: Rclone, seaweed: SeaweedFS, gcs: FakeGCS, tmp_path: Path
) -> None:
    def test(doctor: Doctor, store: Store | None, conf: str, uri: str, variables: dict[str, str]) -> None:
        report = doctor("storage", conf=conf, uri=uri, **variables)
        assert report.well(), report.text
        assert report.has("storage: object", "ok", "written, read, compared, deleted")
        if isinstance(store, S3Store):
            assert report.has("storage: credentials", "ok", "...4321")
            assert report.has("storage: endpoint", "ok", store.endpoint)
        if isinstance(store, FakeGCS):
            assert report.has("storage: credentials", "ok", "emulator", "STORAGE_EMULATOR_HOST, environment")

    folder = tmp_path / "not yet there"
    cases: list[tuple[Any, ...]] = [
        *((store, store.clearml_conf(), store.uri("a/path"), {}) for store in (rclone, seaweed)),
        *((store, "sdk {}", "s3://models/a/path", store.environment()) for store in (rclone_tls, seaweed)),
        (rclone_tls, rclone_tls.clearml_conf(), rclone_tls.uri(), CHECKSUM),
        (gcs, "sdk {}", gcs.uri("a/path"), gcs.environment()),
        (None, "sdk {}", str(folder), {}),
    ]
    doctor.each(test, cases)
    doctor.each(test, [(None, "sdk {}", folder.as_uri(), {})])
    assert not folder.exists()
    assert [store.keys() for store in (rclone, rclone_tls, seaweed, gcs)] == [[]] * 4, "an object was left"


def test_targets_that_are_none(doctor: Doctor, rclone: Rclone, tmp_path: Path) -> None:
    def test(doctor: Doctor, uri: str, words: str) -> None:
        report = doctor("storage", uri=uri)
        assert report.code == 1
        assert report.has("storage: target", "failed", words), report.text
        assert report.cure
        assert "not-a-secret" not in report.text
        assert report.state("storage: object") == "skipped"
        right = rclone.uri("x") if uri.startswith("s") else str(tmp_path)
        assert doctor("storage", conf=rclone.clearml_conf(), uri=right).well()

    cases = [
        ("s3:/bucket/path", "no bucket"),
        ("s4://bucket/path", "neither s3://"),
        ("s3://127.0.0.1:9000/", "no bucket"),
        ("s3://AKIATESTSTORE4321:not-a-secret@127.0.0.1:9000/bucket", "credentials do not belong into the URI"),
        ("/no/such/folder", "whose parent exists: /no/such"),
        (__file__, "is not a folder"),
    ]
    doctor.each(test, cases)


def test_https_and_its_certificate(doctor: Doctor, rclone_tls: Rclone) -> None:
    def test(doctor: Doctor, check: str, words: str, cure: str, change: dict[str, object]) -> None:
        report = doctor("storage", conf=rclone_tls.clearml_conf(**change), uri=rclone_tls.uri())
        assert report.has(f"storage: {check}", "failed", words), report.text
        assert cure in report.cure

    cases: list[tuple[Any, ...]] = [
        ("endpoint", "plain HTTP spoken to a TLS port", "secure: true", {"secure": False}),
        ("bucket", "certificate not trusted", "/path/ca.pem", {"verify": None}),
        ("bucket", "certificate file missing", "/path/ca.pem", {"verify": "/no/such/ca.pem"}),
        ("object", "checksum not understood", "AWS_REQUEST_CHECKSUM_CALCULATION=when_required", {}),
    ]
    doctor.each(test, cases)
    assert doctor("storage", conf=rclone_tls.clearml_conf(), uri=rclone_tls.uri(), **CHECKSUM).well(), (
        "with all four cures"
    )
    report = doctor("storage", conf=rclone_tls.clearml_conf(verify=False), uri=rclone_tls.uri(), **CHECKSUM)
    assert report.well(), report.text
    assert report.has("storage: endpoint", "warning", "certificate not checked")
    assert rclone_tls.keys() == []


def test_no_such_bucket(doctor: Doctor, rclone: Rclone, seaweed: SeaweedFS, gcs: FakeGCS) -> None:
    def test(doctor: Doctor, store: Store, conf: str, name: str) -> None:
        uri = store.uri("runs").replace("/models", "/missing")
        report = doctor("storage", conf=conf, uri=uri, **store.environment())
        assert report.code == 1
        assert report.has(name, "failed", "no such bucket", "missing"), report.text
        assert "make the bucket" in report.cure

    cases = [(store, store.clearml_conf(), "storage: bucket") for store in (rclone, seaweed)]
    doctor.each(test, [*cases, (gcs, "sdk {}", "storage: bucket")])
    for store in (rclone, seaweed):
        with closing(store.client()) as s3:
            assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == ["models"], "a bucket was made"
            s3.create_bucket(Bucket="missing")
            uri = store.uri("runs").replace("/models", "/missing")
            assert doctor("storage", conf=store.clearml_conf(), uri=uri, **store.environment()).well()
            s3.delete_bucket(Bucket="missing")


def test_clouds_without_credentials(doctor: Doctor) -> None:
    """As far as that goes without the clouds; azure-storage-blob is not among the tests' packages."""

    def test(doctor: Doctor, uri: str, checks: list[str], cure: str) -> None:
        report = doctor("storage", uri=uri, NO_GCE_CHECK="true")
        assert report.code == 1
        assert "failed" in [report.findings.get(f"storage: {check}", {}).get("state") for check in checks], report.text
        assert re.search(cure, report.cure), report.cure
        assert report.state("storage: object") == "skipped"

    azure = "azure://account.blob.core.windows.net/container/path"
    cases = [
        ("gs://models", ["credentials"], "gcloud auth application-default login"),
        (azure, ["library", "credentials"], "uv sync --group azure|AZURE_STORAGE_ACCOUNT"),
        ("s3://models", ["credentials"], "AWS_ACCESS_KEY_ID"),
    ]
    doctor.each(test, cases)


def test_access_denied(doctor: Doctor, seaweed: SeaweedFS) -> None:
    key, secret = seaweed.READER
    conf = seaweed.clearml_conf(key=key, secret=secret)
    report = unchanged(seaweed, lambda: doctor("storage", conf=conf, uri=seaweed.uri()))
    assert report.has("storage: object", "failed", "cannot write", "access denied", "AccessDenied"), report.text
    assert "permit" in report.cure
    assert report.code == 1
    assert unchanged(seaweed, lambda: doctor("storage", conf=seaweed.clearml_conf(), uri=seaweed.uri())).well()


def test_an_endpoint_that_does_not_answer(doctor: Doctor, rclone: Rclone) -> None:
    def test(doctor: Doctor, host: str, words: str, cure: str) -> None:
        begin = time.monotonic()
        report = doctor("storage", conf=rclone.clearml_conf(host=host), uri=f"s3://{host}/models")
        assert time.monotonic() - begin < 60  # a check has 15 s
        assert words in "".join(each["value"] for each in report.findings.values() if each["state"] == "failed")
        assert cure in report.cure

    with silent() as quiet:
        cases = [
            (closed(), "refused", "start the server"),
            (quiet, "time-out", "nothing answers"),
            ("no-such-host.invalid:9000", "name not resolved", "correct the host name"),
        ]
        doctor.each(test, cases)
    assert doctor("storage", conf=rclone.clearml_conf(), uri=rclone.uri()).well(), "with a host that answers"


def test_the_wrong_endpoint_in_the_environment(doctor: Doctor, rclone: Rclone, rclone_tls: Rclone) -> None:
    def test(doctor: Doctor, store: S3Store, wrong: str, words: str) -> None:
        report = doctor("storage", uri="s3://models", **store.environment() | {"AWS_ENDPOINT_URL": wrong})
        assert report.has("storage: endpoint", "failed", words, "AWS_ENDPOINT_URL, environment"), report.text
        assert store.endpoint in report.cure
        assert doctor("storage", uri="s3://models", **store.environment()).well()

    cases = [
        (rclone, rclone.endpoint.replace("http:", "https:"), "TLS spoken to a plain port"),
        (rclone_tls, rclone_tls.endpoint.replace("https:", "http:"), "plain HTTP spoken to a TLS port"),
    ]
    doctor.each(test, cases)


def test_credentials_that_only_boto3_finds(doctor: Doctor, rclone: Rclone, machine: Machine) -> None:
    """A profile counts where clearml.conf has no keys, as in pytorch_mnist.py."""
    uri, variables = "s3://models/x", {"AWS_ENDPOINT_URL": rclone.endpoint, "AWS_PROFILE": "lab"}
    report = doctor("storage", uri=uri, **variables)
    assert report.has("storage: credentials", "failed", "lab"), report.text
    (machine.home / ".aws").mkdir()
    (machine.home / ".aws/credentials").write_text(
        f"[lab]\naws_access_key_id = {rclone.access_key}\naws_secret_access_key = {rclone.secret_key}\n"
    )
    report = unchanged(rclone, lambda: doctor("storage", uri=uri, **variables))
    assert report.well(), report.text
    assert report.has("storage: credentials", "ok", "shared-credentials-file, access key ...4321")


def test_a_quota_in_the_store(doctor: Doctor, tmp_path: Path) -> None:
    """SeaweedFS makes a bucket that is over its quota read-only, and then answers uploads with 500."""
    with SeaweedFS(tmp_path / "full") as store, closing(store.client()) as s3:
        s3.put_object(Bucket=store.bucket, Key="big", Body=os.urandom(3_000_000))
        store.shell(f"s3.bucket.quota -name {store.bucket} -op set -sizeMB 1")
        deadline = time.monotonic() + 30
        while "read only" not in store.shell("s3.bucket.quota.enforce -apply") and time.monotonic() < deadline:
            time.sleep(0.5)
        report = unchanged(store, lambda: doctor("storage", conf=store.clearml_conf(), uri=store.uri()))
        assert report.has(
            "storage: object", "failed", "cannot write", "store's own error, perhaps its disk or quota", "InternalError"
        ), report.text
        assert "store's log" in report.cure
        store.shell(f"s3.bucket.quota -name {store.bucket} -op remove", "s3.bucket.quota.enforce -apply")
        assert unchanged(store, lambda: doctor("storage", uri=store.uri())).well()


def test_what_our_stores_never_do(doctor: Doctor, rclone: Rclone) -> None:
    """A quota with a code of its own, Amazon's comparison of clocks, and a store that takes and never gives back."""
    deleted = []

    class Odd(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "list-type" not in self.path:
                time.sleep(6)
            self.answer(200, "<ListBucketResult><Name>models</Name></ListBucketResult>")

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            code = self.path.split("/")[2]
            if code == "silent":
                return self.answer(200, "")
            return self.answer(403, f"<Error><Code>{code}</Code><Message>No.</Message></Error>")

        def do_DELETE(self) -> None:
            deleted.append(self.path.split("/")[2])
            self.answer(204, "")

        do_HEAD = do_GET  # noqa: N815

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode() if self.command != "HEAD" else b"")

        def log_message(self, *_: object) -> None:
            pass

    def test(doctor: Doctor, path: str, words: str) -> None:
        uri = f"s3://{host}/models/{path}"
        report = doctor("storage", conf=rclone.clearml_conf(host=host), uri=uri)
        assert report.code == 1
        assert report.has("storage: object", "failed", words), report.text
        assert report.cure

    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as http:
        host = f"127.0.0.1:{http.server_port}"
        Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        cases = [
            ("QuotaExceeded", "quota ("),
            ("RequestTimeTooSkewed", "clock skew"),
            ("silent", "time-out"),
        ]
        doctor.each(test, cases)
        http.shutdown()
    assert "silent" in deleted, "an object was left"


def test_a_full_disk(machine: Machine) -> None:
    """A disk of one page in a mount namespace, which goes with its process."""
    folder = machine.home / "elsewhere"
    folder.mkdir()
    script = """
    mount -t tmpfs -o size=4k none "$0" && head -c 4096 /dev/zero > "$0/full" || exit 99
    "$@"; rm "$0/full"; "$@"; ls -A "$0" >&2
    """
    doctor = [sys.executable, "-m", "clearml_client.doctor", "--json", "--only", "storage", "--output-uri", str(folder)]
    command = ["unshare", "-rm", "sh", "-c", script, str(folder), *doctor]
    try:
        done = subprocess.run(command, env=machine.environment, capture_output=True, text=True, timeout=60, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("no mount namespaces here")
    full, space = (json.loads(text) for text in done.stdout.replace("}\n{", "}\0{").split("\0"))
    assert full["findings"][-1]["value"].startswith(f"{folder}: cannot write: refused: quota"), full
    assert "free space" in full["cure"]
    assert space["ok"], space
    assert not done.stderr, f"an object was left: {done.stderr}"


# --- addresses and entries --------------------------------------------------------------------------------------------
# What stands where the API server should be; the check that says so; its words; its cure.
ADDRESSES = [
    ("http://no-such-host.invalid:8008", "address", "name not resolved", "correct the host name"),
    ("http://{closed}", "address", "refused", "correct the port"),
    ("http://{silent}", "API", "time-out", "nothing answers"),
    ("127.0.0.1:8008", "address", "no address", "http://host:port"),
    ("{web}", "API", "the web UI", "port 8008"),
    ("{store}", "API", "something else", "port 8008"),
    ("https://{host}", "address", "TLS spoken to a plain port", "write {api}"),
    ("http://{secure}", "address", "plain HTTP spoken to a TLS port", "write https://{secure}"),
    ("https://{secure}", "API", "certificate not trusted", "REQUESTS_CA_BUNDLE"),
]

# What is wrong with the entry in clearml.conf; the check that says so; its words; the first cure.
ENTRIES = [
    ({"host": "127.0.0.1"}, "entry", "the port is missing", 'write host: "{host}"'),
    ({"host": "127.0.0.1:1"}, "entry", "has another port", "one and the same host:port"),
    ({"host": "store.example:9000"}, "entry", "is another host", 'add an entry with host: "{host}"'),
    ({"host": "http://{host}"}, "entry", "the SDK cannot use", "without http://"),
    ({"key": None, "secret": None}, "entry", "dropped in silence", "use_credentials_chain"),
    ({"bucket": "mod"}, "entry", "bucket 'mod' is taken for", "write the whole name"),
    ({"secure": True}, "endpoint", "TLS spoken to a plain port", "secure: false"),
    ({"key": "AKIAUNKNOWN98765"}, "bucket", "unknown key", "correct the access key"),
    ({"secret": "a-wrong-secret-of-the-store"}, "bucket", "signature mismatch", "correct the secret key"),
]


def test_wrong_addresses_and_wrong_entries(
    doctor: Doctor, server: ClearMLServer, rclone: Rclone, rclone_tls: Rclone
) -> None:
    """One of each in a run: neither keeps the doctor from the other."""
    with silent() as quiet:
        places = {"web": server.web_url, "api": server.api_url, "silent": quiet, "closed": closed()}
        places |= {"host": server.api_url.partition("//")[2], "secure": rclone_tls.host, "store": rclone.endpoint}

        def test(doctor: Doctor, address: tuple[str, ...], entry: tuple[dict[str, Any], str, str, str]) -> None:
            host, check, words, cure = (text.format(**places) for text in address)
            change, entry_check, entry_words, entry_cure = entry
            if "host" in change:
                change = {"host": change["host"].format(host=rclone.host)}
            conf = server.configuration() + rclone.clearml_conf(**change)
            report = doctor("server", "storage", conf=conf, uri=rclone.uri("runs"), CLEARML_API_HOST=host)
            assert report.code == 1
            assert report.has(f"server: {check}", "failed", words, "CLEARML_API_HOST, environment"), report.text
            assert cure in report.cure, report.cure
            assert report.state("server: keys") == "skipped"
            assert report.state("server: file server") == "ok"
            assert report.has(f"storage: {entry_check}", "failed", entry_words), report.text
            assert entry_cure.format(host=rclone.host) in report.findings[f"storage: {entry_check}"]["cure"]
            assert "~/clearml.conf" in report.findings["storage: entry"]["source"]
            assert report.state("storage: object") == "skipped"
            cured = server.configuration() + rclone.clearml_conf()
            assert doctor("server", "storage", conf=cured, uri=rclone.uri("runs")).well()

        doctor.each(test, zip(ADDRESSES, ENTRIES, strict=True))
    assert rclone.keys() == []


# --- machine, and the whole -----------------------------------------------------------------------------------------
def test_everything_silent_is_soon_over(machine: Machine) -> None:
    """As a user sees it: a line each, the first cure at the end, exit code 1, and within half a minute."""
    with silent() as quiet:
        keys = f'key: "{Store.access_key}", secret: "{Store.secret_key}"'
        servers = ", ".join(f'{name}_server: "http://{quiet}"' for name in ("api", "web", "files"))
        conf = (
            f'api {{ {servers}, credentials {{ access_key: "{Store.access_key}", secret_key: "{Store.secret_key}" }} }}'
        )
        conf += f'\nsdk.aws.s3.credentials: [ {{ host: "{quiet}", secure: false, {keys} }} ]'
        (machine.home / "clearml.conf").write_text(conf)
        begin = time.monotonic()
        done = machine.run("-m", "clearml_client.doctor", "--output-uri", f"s3://{quiet}/bucket")
        assert time.monotonic() - begin < 60  # side by side, not one after the other
    assert done.returncode == 1
    assert not done.stderr
    *lines, empty, last = done.stdout.splitlines()
    assert all(
        re.match(r"(ok|warning|failed|skipped) +(configuration|server|storage|machine): ", line) for line in lines
    )
    assert not empty
    assert any(re.match("ok +machine: torch .* CPU threads", line) for line in lines)
    assert last.startswith("Try first: server: API: check host, port and firewall")
    assert Store.secret_key not in done.stdout
    assert Store.access_key not in done.stdout
    assert "\033" not in done.stdout


@pytest.mark.parametrize("way", ['"$@" >&-', '"$@" | true', '"$@" >/dev/full', 'PYTHONIOENCODING=ascii "$@"'])
def test_an_output_that_cannot_take_it(machine: Machine, way: str) -> None:
    machine.variables = {"CLEARML_CONFIG_FILE": str(machine.home / "ä.conf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "clearml_client.doctor", "--only", "configuration"]
    script = ["bash", "-o", "pipefail", "-c", way, "bash", *command]
    done = subprocess.run(script, env=machine.environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    assert ("\\xe4.conf" in done.stdout) == ("ascii" in way)


NOTEBOOK = """
import io, runpy, sys
import types
sys.modules["IPython"] = types.ModuleType("IPython")
sys.stdout, sys.argv = io.StringIO(), ["doctor", "--only", "configuration"]
try:
    runpy.run_module("clearml_client.doctor", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print(sys.stdout.getvalue(), "the kernel lives", end.code, file=sys.__stdout__)
"""


def test_a_notebook_goes_on(machine: Machine) -> None:
    machine.variables = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", NOTEBOOK]
    done = subprocess.run(command, env=machine.environment, capture_output=True, text=True, timeout=60)
    assert "configuration: ClearML server" in done.stdout
    assert done.stdout.endswith("the kernel lives 0\n"), done.stderr


# What stores say that ours never do.
ANSWERS = [
    ("(ExpiredToken) when calling the PutObject operation: The provided token has expired.", "expired key"),
    ("(InvalidToken): The provided token is malformed or otherwise invalid.", "session token not accepted"),
    ("(AuthorizationHeaderMalformed): the region 'x' is wrong; expecting 'eu-west-1'", "wrong region"),
    ("(501) when calling the PutObject operation: Not Implemented", "checksum not understood"),
    ("Unsupported value STREAMING-UNSIGNED-PAYLOAD-TRAILER", "checksum not understood"),
    ("(SlowDown): Please reduce your request rate.", "too many requests"),
    ("Invalid header value b'AWS4-HMAC-SHA256 Credential=AK\\n/2026'", "a line break or blank in a key"),
]


@pytest.mark.parametrize(("text", "words"), ANSWERS)
def test_a_stores_answer_has_words(text: str, words: str) -> None:
    assert diagnose(ValueError(text)).words == words


@pytest.mark.parametrize(
    ("profile", "arguments", "words"),
    [
        (None, {"endpoint_url": "http://my_store:9000"}, "no valid host name"),
        (None, {"region_name": "eu west"}, "wrong region"),
        ("nonesuch", {}, "unknown profile"),
    ],
)
def test_a_refusal_of_boto3_has_words(profile: str | None, arguments: dict[str, str], words: str) -> None:
    with pytest.raises((BotoCoreError, ValueError)) as error:
        boto3.Session(profile_name=profile).client("s3", **arguments).list_buckets()  # type: ignore[call-overload]
    assert diagnose(error.value).words == words


def test_help_says_what_the_exit_codes_mean(machine: Machine) -> None:
    done = machine.run("-m", "clearml_client.doctor", "--help")
    assert done.returncode == 0
    assert "Exit code 0" in " ".join(done.stdout.split())
    assert "Example: uv run -m clearml_client.doctor" in done.stdout
