"""doctor.py against real stores, a stand-in server and sockets that misbehave: diagnosis, cure, and nothing left."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import clearml_server
import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine
from stores import CHECKSUM, FakeGCS, Rclone, S3Store, SeaweedFS, Store, free_port

SECRETS = [Store.secret_key, SeaweedFS.READER[1], ClearMLServer.secret_key, "a-wrong-secret-of-the-store"]


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


Doctor = Callable[..., Report]


@pytest.fixture
def doctor(machine: Machine) -> Doctor:
    def run(*only: str, conf: str | None = None, uri: str | None = None, **variables: str) -> Report:
        path = machine.home / "clearml.conf"
        if conf is not None:
            path.write_text(conf)
        arguments = ["--json", "--only", *only] + ([] if uri is None else [f"--output-uri={uri}"])
        other = Machine(machine.home, {**machine.variables, **variables})
        return Report(other.run("doctor.py", *arguments, timeout=60), machine)

    return run


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rclone]:
    with Rclone(tmp_path_factory.mktemp("rclone")) as store:
        yield store


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rclone]:
    with Rclone(tmp_path_factory.mktemp("secure"), tls=True) as store:
        yield store


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with SeaweedFS(tmp_path_factory.mktemp("seaweed")) as store:
        yield store


@pytest.fixture(scope="module")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGCS]:
    with FakeGCS(tmp_path_factory.mktemp("gcs")) as store:
        yield store


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ClearMLServer]:
    standin = ClearMLServer(tmp_path / "server")
    standin.start()
    yield standin
    standin.stop()
    assert not standin.tasks
    assert not [path for path in standin.files_folder.rglob("*") if path.is_file()], "an object was left"


@contextmanager
def silent() -> Iterator[str]:
    """host:port of a socket that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


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
    assert missing.has("configuration: file", "failed", "~/other.conf does not exist", "CLEARML_CONFIG_FILE")
    assert "CLEARML_CONFIG_FILE" in missing.cure
    assert missing.code == 1
    (machine.home / "other.conf").write_text(server.configuration())
    cured = doctor("configuration", conf="", CLEARML_CONFIG_FILE="~/other.conf")
    assert cured.has("configuration: file", "ok", "~/other.conf; ~/clearml.conf is not read", "CLEARML_CONFIG_FILE")
    assert cured.has("configuration: ClearML server", "ok", server.api_url, "api.api_server, ~/other.conf")


def test_the_hidden_file_is_not_read(doctor: Doctor, machine: Machine, server: ClearMLServer) -> None:
    hidden = machine.home / ".clearml.conf"
    hidden.write_text(server.configuration())
    report = doctor("configuration")
    assert report.has("configuration: file", "warning", "~/.clearml.conf is not read")
    assert "mv ~/.clearml.conf ~/clearml.conf" in report.cure
    hidden.rename(machine.home / "clearml.conf")
    assert doctor("configuration").has("configuration: ClearML server", "ok", server.api_url)


@pytest.mark.parametrize(
    ("good", "bad", "line"),
    [('stand-in-secret-key" }', "stand-in-secret-key }", 5), ("api {", "[api]\n", 3), ("\n}\n", "\n", 6)],
)
def test_a_syntax_error_is_shown_with_its_line(
    doctor: Doctor, server: ClearMLServer, good: str, bad: str, line: int
) -> None:
    report = doctor("configuration", "storage", conf=server.configuration().replace(good, bad))
    assert report.code == 1
    assert report.has("configuration: syntax", "failed", f"line {line}", "~/clearml.conf")
    assert f"line {line}" in report.cure
    assert report.state("configuration: ClearML server") == "skipped"
    assert report.state("storage: target") == "ok", "it stops at nothing"
    assert doctor("configuration", conf=server.configuration()).well()


def test_half_a_configuration(doctor: Doctor, server: ClearMLServer) -> None:
    half = doctor("configuration", "server", conf=f'api {{ api_server: "{server.api_url}" }}')
    assert half.code == 1
    assert half.has("configuration: ClearML server", "failed", "half a configuration", "api.credentials.access_key")
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


def test_values_from_dotenv_are_named_as_such(machine: Machine, server: ClearMLServer, tmp_path: Path) -> None:
    script = shutil.copy(ROOT / "doctor.py", tmp_path / "doctor.py")
    (machine.home / "clearml.conf").write_text(server.configuration())
    (tmp_path / ".env").write_text(f"CLEARML_OUTPUT_URI={machine.home}/elsewhere\nCLEARML_API_ACCESS_KEY=inside\n")
    other = Machine(machine.home, {"PYTHON_DOTENV_DISABLED": "0", "CLEARML_API_ACCESS_KEY": "outside"})
    report = Report(other.run(script, "--json", "--only", "configuration", "storage"), machine)
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
    methods = [request.method for request in server.requests if "doctor-" in request.path or request.path == "/"]
    assert "POST" in methods
    assert "DELETE" in methods


@pytest.mark.parametrize(
    ("address", "check", "words", "cure"),
    [
        ("http://no-such-host.invalid:8008", "address", "name not resolved", "correct the host name"),
        ("http://{closed}", "address", "refused", "correct the port"),
        ("http://{silent}", "API", "time-out", "nothing answers"),
        ("127.0.0.1:8008", "address", "no address", "http://host:port"),
        ("{web}", "API", "the web UI", "port 8008"),
        ("{files}", "API", "the file server", "port 8008"),
        ("{store}", "API", "something else", "port 8008"),
        ("https://{host}", "address", "TLS spoken to a plain port", "write {api}"),
        ("http://{secure}", "address", "plain HTTP spoken to a TLS port", "write https://{secure}"),
        ("https://{secure}", "API", "untrusted certificate", "REQUESTS_CA_BUNDLE"),
    ],
)
def test_an_address_that_is_not_the_api_server(
    doctor: Doctor,
    server: ClearMLServer,
    rclone: Rclone,
    secure: Rclone,
    *,
    address: str,
    check: str,
    words: str,
    cure: str,
) -> None:
    with silent() as quiet:
        places = {"web": server.web_url, "files": server.files_url, "api": server.api_url, "silent": quiet}
        places |= {"host": server.api_url.partition("//")[2], "secure": secure.host}
        places |= {"store": rclone.endpoint, "closed": closed()}
        conf = server.configuration()
        report = doctor("server", conf=conf, CLEARML_API_HOST=address.format(**places))
    assert report.code == 1
    assert report.has(f"server: {check}", "failed", words, "CLEARML_API_HOST, environment"), report.text
    assert cure.format(**places) in report.cure
    assert report.state("server: keys") == "skipped"


def test_wrong_keys_a_wrong_clock_and_a_lost_file_server(
    doctor: Doctor, server: ClearMLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)
    with monkeypatch.context() as patch:
        patch.setattr(clearml_server._Http10Handler, "date_time_string", lambda *_: late)
        conf = server.configuration().replace("stand-in-access-key", "stand-in-wrong-key-abcd")
        report = doctor("server", conf=conf, CLEARML_FILES_HOST=f"http://{closed()}", CLEARML_WEB_HOST=server.files_url)
    assert report.code == 1
    assert report.has("server: keys", "failed", "...abcd", "not accepted")
    assert "make new credentials" in report.cure
    assert "wrong-key" not in report.text
    assert report.has("server: clock", "warning", "+3600 s")
    assert report.has("server: web server", "warning", "is no web page")
    assert report.has("server: file server", "failed", "refused", "CLEARML_FILES_HOST")
    assert report.state("server: file server's object") == "skipped"
    assert doctor("server", conf=server.configuration()).well()


# --- storage --------------------------------------------------------------------------------------------------------
def unchanged(store: Store, run: Callable[[], Report]) -> Report:
    before = store.keys()
    report = run()
    assert store.keys() == before, "an object was left"
    return report


def test_each_kind_of_target(
    doctor: Doctor, rclone: Rclone, secure: Rclone, seaweed: SeaweedFS, gcs: FakeGCS, machine: Machine
) -> None:
    for store in (rclone, seaweed):
        for conf, uri, variables in (
            (store.clearml_conf(), store.uri("a/path"), {}),
            ("", f"s3://{store.bucket}/a/path", store.environment()),
        ):
            report = unchanged(store, lambda: doctor("storage", conf=conf, uri=uri, **variables))  # noqa: B023
            assert report.well(), report.text
            assert report.has("storage: credentials", "ok", "...4321")
            assert report.has("storage: endpoint", "ok", store.endpoint)
    report = unchanged(secure, lambda: doctor("storage", conf=secure.clearml_conf(), uri=secure.uri(), **CHECKSUM))
    assert report.well(), report.text
    report = unchanged(gcs, lambda: doctor("storage", conf="", uri=gcs.uri("a/path"), **gcs.environment()))
    assert report.well(), report.text
    assert report.has("storage: Google credentials", "ok", "emulator", "STORAGE_EMULATOR_HOST, environment")
    for uri in (f"{machine.home}/elsewhere", f"file://{machine.home}/elsewhere"):
        report = doctor("storage", uri=uri)
        assert report.well(), report.text
        assert not (machine.home / "elsewhere").exists()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3:/bucket/path", "no kind of storage"),
        ("s4://bucket/path", "no kind of storage"),
        ("http://127.0.0.1/bucket", "no kind of storage"),
        ("s3://", "no bucket"),
        ("s3://127.0.0.1:9000/", "no bucket"),
        ("s3://AKIATESTSTORE4321:not-a-secret@127.0.0.1:9000/bucket", "credentials inside the URI"),
        ("/no/such/folder", "/no/such does not exist"),
        (f"{__file__}", "is not a folder"),
    ],
)
def test_targets_that_are_none(doctor: Doctor, uri: str, words: str) -> None:
    report = doctor("storage", uri=uri)
    assert report.code == 1
    assert report.has("storage: target", "failed", words)
    assert report.cure
    assert "not-a-secret@" not in report.text
    assert report.state("storage: object") == "skipped"


# What is wrong with the entry in clearml.conf; the check that says so; its words; the first cure.
ENTRIES = [
    ({"host": "127.0.0.1"}, "entry", "the port is missing", 'write host: "{host}"'),
    ({"host": "127.0.0.1:1"}, "entry", "has another port", "one and the same host:port"),
    ({"host": "store.example:9000"}, "entry", "is another host", 'add an entry with host: "{host}"'),
    ({"host": "http://{host}"}, "entry", "the SDK cannot use it", "without http://"),
    ({"key": None, "secret": None}, "entry", "dropped in silence", "use_credentials_chain"),
    ({"sekret": "x"}, "entry", "the SDK cannot use it", "correct sdk.aws.s3.credentials"),
    ({"bucket": "mod"}, "entry", "bucket 'mod' is taken for", "write the whole name"),
    ({"secure": True}, "endpoint", "TLS spoken to a plain port", "secure: false"),
    ({"key": "AKIAUNKNOWN98765"}, "bucket", "unknown key", "correct the access key"),
    ({"secret": "a-wrong-secret-of-the-store"}, "bucket", "signature mismatch", "correct the secret key"),
    ({"profile": "nobody"}, "credentials", "nobody", "AWS_PROFILE"),
]


@pytest.mark.parametrize(("change", "check", "words", "cure"), ENTRIES)
def test_what_is_wrong_with_an_entry(
    doctor: Doctor, rclone: Rclone, change: dict[str, str], check: str, words: str, cure: str
) -> None:
    change = {key: value.format(host=rclone.host) if isinstance(value, str) else value for key, value in change.items()}
    conf = rclone.clearml_conf(**change)
    report = unchanged(rclone, lambda: doctor("storage", conf=conf, uri=rclone.uri("runs")))
    assert report.code == 1
    assert report.has(f"storage: {check}", "failed", words), report.text
    assert cure.format(host=rclone.host) in report.cure
    assert "~/clearml.conf" in report.findings["storage: entry"]["source"]
    assert report.state("storage: object") == "skipped"


def test_https_and_its_certificate(doctor: Doctor, secure: Rclone) -> None:
    def run(check: str, words: str, cure: str, change: dict[str, object], **variables: str) -> None:
        conf = secure.clearml_conf(**change)
        report = unchanged(secure, lambda: doctor("storage", conf=conf, uri=secure.uri(), **variables))
        assert report.has(f"storage: {check}", "failed", words), report.text
        assert cure in report.cure

    run("endpoint", "plain HTTP spoken to a TLS port", "secure: true", {"secure": False})
    run("bucket", "untrusted certificate", "/path/ca.pem", {"verify": None})
    run("bucket", "certificate file missing", "/path/ca.pem", {"verify": "/no/such/ca.pem"})
    run("object", "checksum not understood", "AWS_REQUEST_CHECKSUM_CALCULATION=when_required", {})
    conf = secure.clearml_conf(verify=False)
    report = unchanged(secure, lambda: doctor("storage", conf=conf, uri=secure.uri(), **CHECKSUM))
    assert report.well(), report.text
    assert report.has("storage: endpoint", "warning", "certificate not checked")


@pytest.mark.parametrize("kind", ["rclone", "seaweed", "gcs"])
def test_no_such_bucket(doctor: Doctor, kind: str, request: pytest.FixtureRequest) -> None:
    store: Store = request.getfixturevalue(kind)
    uri = store.uri("runs").replace(store.bucket, "missing")
    conf = store.clearml_conf() if isinstance(store, S3Store) else ""
    report = unchanged(store, lambda: doctor("storage", conf=conf, uri=uri, **store.environment()))  # type: ignore[attr-defined]
    name = "storage: Google bucket" if kind == "gcs" else "storage: bucket"
    assert report.has(name, "failed", "no such bucket", "missing"), report.text
    assert "make the bucket" in report.cure
    if isinstance(store, S3Store):
        with closing(store.client()) as s3:
            assert [b["Name"] for b in s3.list_buckets()["Buckets"]] == [store.bucket], "a bucket was made"


def test_access_denied(doctor: Doctor, seaweed: SeaweedFS) -> None:
    key, secret = seaweed.READER
    conf = seaweed.clearml_conf(key=key, secret=secret)
    report = unchanged(seaweed, lambda: doctor("storage", conf=conf, uri=seaweed.uri()))
    assert report.has("storage: object", "failed", "write: access denied", "AccessDenied"), report.text
    assert "permit" in report.cure
    assert report.code == 1


def test_an_endpoint_that_does_not_answer(doctor: Doctor, rclone: Rclone) -> None:
    with silent() as quiet:
        for host, words, cure in (
            (closed(), "refused", "start the server"),
            (quiet, "time-out", "nothing answers"),
            ("no-such-host.invalid:9000", "name not resolved", "correct the host name"),
        ):
            begin = time.monotonic()
            report = doctor("storage", conf=rclone.clearml_conf(host=host), uri=f"s3://{host}/models")
            assert words in json.dumps([f for f in report.findings.values() if f["state"] == "failed"]), report.text
            assert cure in report.cure
            assert time.monotonic() - begin < 20


def test_the_wrong_endpoint_in_the_environment(doctor: Doctor, rclone: Rclone, secure: Rclone) -> None:
    for store in (rclone, secure):
        other = store.endpoint.replace("http:", "x:").replace("https:", "http:").replace("x:", "https:")
        variables = store.environment() | {"AWS_ENDPOINT_URL": other}
        report = doctor("storage", uri="s3://models", **variables)
        assert report.has("storage: endpoint", "failed", "spoken to a", "AWS_ENDPOINT_URL, environment"), report.text
        assert store.endpoint in report.cure


def test_credentials_that_only_boto3_finds(doctor: Doctor, rclone: Rclone, machine: Machine) -> None:
    """~/.aws/credentials is read only where clearml.conf says so, and then AWS_PROFILE too."""
    uri, variables = "s3://models/x", {"AWS_ENDPOINT_URL": rclone.endpoint, "AWS_PROFILE": "lab"}
    report = doctor("storage", uri=uri, **variables)
    assert report.has("storage: credentials", "failed", "lab"), report.text
    (machine.home / ".aws").mkdir()
    (machine.home / ".aws/credentials").write_text(
        f"[lab]\naws_access_key_id = {rclone.access_key}\naws_secret_access_key = {rclone.secret_key}\n"
    )
    report = doctor("storage", uri=uri, **variables)
    assert report.has("storage: credentials", "failed", "shared-credentials-file, access key ...4321", "does not ask")
    cure = re.search(r"add (sdk .*}) to ~/clearml.conf", report.cure)
    assert cure
    report = unchanged(rclone, lambda: doctor("storage", conf=cure[1], uri=uri, **variables))
    assert report.well(), report.text
    assert report.has("storage: credentials", "ok", "shared-credentials-file", "use_credentials_chain, ~/clearml.conf")


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
            "storage: object", "failed", "write: store's own error, often a full disk or a quota", "InternalError"
        ), report.text
        assert "quota" in report.cure
        store.shell(f"s3.bucket.quota -name {store.bucket} -op remove", "s3.bucket.quota.enforce -apply")
        assert unchanged(store, lambda: doctor("storage", uri=store.uri())).well()


@pytest.mark.parametrize(("code", "words"), [("QuotaExceeded", "quota"), ("RequestTimeTooSkewed", "clock skew")])
def test_what_our_stores_never_answer(doctor: Doctor, rclone: Rclone, code: str, words: str) -> None:
    """Ceph and others have a quota of their own; Amazon compares clocks."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, "<ListBucketResult><Name>models</Name></ListBucketResult>")

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(403, f"<Error><Code>{code}</Code><Message>No.</Message></Error>")

        do_HEAD = do_DELETE = do_GET  # noqa: N815

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode() if self.command != "HEAD" else b"")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as http:
        Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        host = f"127.0.0.1:{http.server_port}"
        report = doctor("storage", conf=rclone.clearml_conf(host=host), uri=f"s3://{host}/models")
        http.shutdown()
    assert report.has("storage: object", "failed", f"write: {words}", code), report.text
    assert report.cure


def test_a_full_disk(machine: Machine) -> None:
    """A disk of one page in a mount namespace, which goes with its process."""
    folder = machine.home / "elsewhere"
    folder.mkdir()
    script = """
    mount -t tmpfs -o size=4k none "$0" && head -c 4096 /dev/zero > "$0/full" || exit 99
    "$@"; rm "$0/full"; "$@"; ls -A "$0" >&2
    """
    doctor = [sys.executable, str(ROOT / "doctor.py"), "--json", "--only", "storage", "--output-uri", str(folder)]
    command = ["unshare", "-rm", "sh", "-c", script, str(folder), *doctor]
    try:
        done = subprocess.run(command, env=machine.environment, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("no mount namespaces here")
    full, space = (json.loads(text) for text in done.stdout.replace("}\n{", "}\0{").split("\0"))
    assert full["findings"][-1]["value"].startswith("write: quota"), full
    assert "free space" in full["cure"]
    assert space["ok"], space
    assert not done.stderr, "an object was left"


# --- machine, and the whole -----------------------------------------------------------------------------------------
def test_damaged_mnist_files(machine: Machine, tmp_path: Path) -> None:
    script = shutil.copy(ROOT / "doctor.py", tmp_path / "doctor.py")
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for path in (ROOT / "data/MNIST/raw").glob("*.gz"):
        shutil.copy(path, raw)
    plain, packed = raw / "t10k-labels-idx1-ubyte", raw / "t10k-labels-idx1-ubyte.gz"

    def run() -> Report:
        return Report(machine.run(script, "--json", "--only", "machine"), machine)

    plain.write_bytes(b"cut short")
    report = run()
    assert report.has("machine: MNIST", "failed", "t10k-labels-idx1-ubyte is cut short")
    assert "rm " in report.cure
    plain.unlink()
    report = run()
    assert report.well()
    assert report.has("machine: torch", "ok", "CPU threads")
    packed.write_bytes(packed.read_bytes()[:-1])
    assert run().has("machine: MNIST", "failed", "t10k-labels-idx1-ubyte.gz is damaged")


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
        done = machine.run("doctor.py", "--output-uri", f"s3://{quiet}/bucket")
        assert time.monotonic() - begin < 30
    assert done.returncode == 1
    assert not done.stderr
    *lines, empty, last = done.stdout.splitlines()
    assert all(
        re.match(r"(ok|warning|failed|skipped) +(configuration|server|storage|machine): ", line) for line in lines
    )
    assert not empty
    assert last.startswith("Try first: server: API: check host, port and firewall")
    assert Store.secret_key not in done.stdout
    assert Store.access_key not in done.stdout
    assert "\033" not in done.stdout


def test_help_says_what_the_exit_codes_mean(machine: Machine) -> None:
    done = machine.run("doctor.py", "--help")
    assert done.returncode == 0
    assert "Exit code 0" in done.stdout
    assert "Example: uv run doctor.py" in done.stdout
