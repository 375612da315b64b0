"""Set-ups that people have: certificates, proxies, folders, streams, CPUs. It works, or one line names what is wrong.

What clearml.conf and .env may look like is in test_configuration.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from string import Template
from typing import Any

import botocore.exceptions
import certifi
import pytest
import requests
import trustme
import werkzeug
from clearml_server import ClearMLServer
from conftest import FEW, ROOT, Begin, Machine, mnist
from stores import Plug, Rclone, free_port

import clearml_client
from clearml_client import arguments, errors, server
from clearml_client.errors import RunError

SCRIPT = ("pytorch_mnist.py", "--dry-run")
CLEANUP = ("-m", "clearml_client.cleanup", "--project-name", "any")
DOCTOR = ("-m", "clearml_client.doctor")
SERVER, STORAGE = ((*DOCTOR, "--only", area) for area in ("server", "storage"))
Case = tuple[tuple[str, ...], str, dict[str, str], str]  # what is run, clearml.conf, variables, and what is said


# --- certificates, proxies, addresses ---------------------------------------------------------------------------------
class BehindProxy(ClearMLServer):
    """The proxy refuses a GET with a body."""

    def answer_api(self, request: werkzeug.Request) -> werkzeug.Response:
        is_refused = request.method == "GET" and request.data
        return werkzeug.Response(status=411) if is_refused else super().answer_api(request)


class Moved(BaseHTTPRequestHandler):
    """It has another address now."""

    target = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.target}{self.path}")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def places(
    stand_in: ClearMLServer, rclone: Rclone, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """What $server, $ca and the like stand for in the tables below. Only a proxy may know a name with .invalid.

    $secure is over https, with a certificate of an authority that nobody knows.
    """
    secure = ClearMLServer(tmp_path_factory.mktemp("secure"))
    no_get = BehindProxy(tmp_path_factory.mktemp("no-get"))
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(secure.files_folder / "ca.pem")
    secure.start(context)
    no_get.start()
    moved = HTTPServer(("127.0.0.1", 0), Moved)
    Moved.target = stand_in.api_url
    threading.Thread(target=moved.serve_forever, daemon=True).start()

    server, api, store = stand_in.configuration(), stand_in.api_url, rclone.host.replace("127.0.0.1", "store.invalid")
    yield {
        "server": server,
        "api": api,
        "files": stand_in.files_url,
        "unknown": server.replace("127.0.0.1", "clearml.invalid"),
        "by_proxy": server.replace(api, api.replace("127.0.0.1", "clearml.invalid")),
        "plug": Plug(int(api.rpartition(":")[2])).host,
        "nobody": f"127.0.0.1:{free_port()}",
        "secure": secure.configuration().replace("http:", "https:"),
        "ca": str(secure.files_folder / "ca.pem"),
        "no_get": no_get.configuration(),
        "moved": f"http://127.0.0.1:{moved.server_address[1]}",
        "token": stand_in.token,
        "store": rclone.clearml_conf(host=store),
        "uri": f"s3://{store}/models",
    }
    moved.shutdown()
    moved.server_close()
    for other in (secure, no_get):
        other.stop()
        assert not other.unknown


def run_case(machine: Machine, places: dict[str, str], case: Case) -> tuple[int, str]:
    """Exit code and output."""
    command, conf, variables, _ = case
    machine.configure(Template(conf).substitute(places))
    machine.variables |= {name: Template(value).substitute(places) for name, value in variables.items()}
    shutil.copy(places["ca"], machine.home)
    done = machine.run(*(Template(word).substitute(places) for word in command))
    return done.returncode, done.stdout + done.stderr


BUNDLE = {"REQUESTS_CA_BUNDLE": certifi.where()}
BY_VARIABLE = {"CLEARML_API_HOST_VERIFY_CERT": '"false"', "CURL_CA_BUNDLE": certifi.where()}
PLUG = {"HTTP_PROXY": "http://$plug", "NO_PROXY": "127.0.0.1"}
THROUGH = "ok +server: address .*clearml.invalid.*through the proxy http://127.0.0.1"

KEYS = {"CLEARML_API_ACCESS_KEY": ClearMLServer.access_key, "CLEARML_API_SECRET_KEY": ClearMLServer.secret_key}
HOSTS = {"CLEARML_API_HOST": "$api", "CLEARML_FILES_HOST": "$files", "CLEARML_WEB_HOST": "$files"}

# The doctor asks API, file server and web UI by the run's own calls.
RIGHT: list[Case] = [
    (SCRIPT, "$secure api.verify_certificate: false", BUNDLE, "Stored: https:"),
    (SERVER, "$secure", BY_VARIABLE, "All is well"),
    (SCRIPT, '$secure api.verify_certificate: "~/ca.pem"', BUNDLE, "Stored: https:"),
    (SERVER, "$secure", {"REQUESTS_CA_BUNDLE": "$ca"}, "All is well"),
    (SCRIPT, "$by_proxy", PLUG, "Stored: http:"),
    (SERVER, "$by_proxy", PLUG, THROUGH),
    (SCRIPT, "$no_get", {"CLEARML_API_DEFAULT_REQ_METHOD": "PUT"}, "Stored: http:"),
    (SCRIPT, "sdk {}", {**HOSTS, "CLEARML_AUTH_TOKEN": "$token"}, "Stored: http:"),
    (
        SCRIPT,
        "sdk {}",
        {name.replace("CLEARML", "TRAINS"): value for name, value in (HOSTS | KEYS).items()},
        "Stored: http:",
    ),
    *(
        (each, "$server", {"CLEARML_OFFLINE_MODE": "0"}, words)
        for each, words in ((SCRIPT, "Stored: http:"), (SERVER, "All is well"))
    ),
]


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_unusual_and_right_works(machine: Machine, places: dict[str, str], case: Case) -> None:
    *_, words = case
    code, said = run_case(machine, places, case)
    assert code == 0, said
    assert re.search(words, said)
    assert "repository detection" not in said  # the SDK has two lines of it at each start


@pytest.mark.parametrize(
    ("conf", "variables", "names"),
    [
        (
            'sdk.aws.s3.credentials: [ { host: "h:1", key: "k", secret: "minioadmin" } ]',
            {},
            "sdk.aws.s3.credentials.secret",
        ),
        ("$server", {"AWS_SECRET_ACCESS_KEY": "pa-55"}, "AWS_SECRET_ACCESS_KEY"),
        ("$server", {"AWS_SECRET_ACCESS_KEY": "0123456789abcdef"}, ""),
    ],
)
def test_a_weak_secret_is_named(
    machine: Machine, places: dict[str, str], conf: str, variables: dict[str, str], names: str
) -> None:
    """A random one is not."""
    _, said = run_case(machine, places, ((*DOCTOR, "--only", "configuration"), conf, variables, ""))
    found = re.search("^warning +configuration: secrets +.*stands alone: (.*)$", said, re.MULTILINE)
    assert (found[1] if found else "") == names, said


UNTRUSTED, MISSING = "certificate not trusted", r"certificate file missing \(.*/no/such.pem"
LOST = "asked through the proxy http://[*]+@127.0.0.1:[0-9]+: NO_PROXY={}.invalid goes without".format
NOBODY = {"HTTP_PROXY": "http://me:p@ss-word@$nobody", "NO_PROXY": "127.0.0.1"}
NO_ADDRESS = r"no address of the web UI.*set api.web_server \(CLEARML_WEB_HOST\)"
NO_WEB = {**KEYS, "CLEARML_API_HOST": "$api", "CLEARML_FILES_HOST": "$files"}
TARGET = 'sdk.development.default_output_uri: "/no/such/folder"'
ORIGIN = r"no storage at /no/such/folder: .*mkdir -p /no/such.* \[sdk.development.default_output_uri, ~/clearml.conf\]"
UNDEFINED = {"CLEARML_FILES_HOST": "undefined"}
DEAD = {"CLEARML_FILES_HOST": "http://$nobody"}
USER = {"CLEARML_API_HOST": "http://me:p@ss-word@$nobody"}
TO_STORE = ("--output-uri", "$uri")
TO_SMALL = ("--output-uri", "s3://store:9000/models")
LARGE = 'sdk.aws.s3.credentials: [ { host: "STORE:9000", key: "a key", secret: "a secret" } ]'  # the SDK takes it

WRONG: list[Case] = [
    (SCRIPT, "$secure", BUNDLE, f"{UNTRUSTED}.*api.verify_certificate"),  # the SDK alone would ask for ever
    (SERVER, '$secure api.verify_certificate: "/no/such.pem"', BUNDLE, f"{MISSING}.*api.verify_certificate"),
    (CLEANUP, "$unknown", NOBODY, f"{LOST('clearml')}((?!--offline).)*$"),  # it has no such option
    ((*SCRIPT, *TO_STORE), "$server $store", NOBODY, LOST("store")),
    ((*STORAGE, *TO_STORE), "$server $store", NOBODY, LOST("store")),
    *((each, "$no_get", {}, "411.*CLEARML_API_DEFAULT_REQ_METHOD=PUT") for each in (SCRIPT, CLEANUP, SERVER)),
    *((each, "sdk {}", NO_WEB, NO_ADDRESS) for each in (SCRIPT, SERVER)),
    (
        SCRIPT,
        '$server api.api_server: "$moved"',
        {},
        r"error: (http://\S+) redirects to (http://\S+): write \2 \[api.api",
    ),
    (SCRIPT, "$server", USER, "names a user.*take user and password out of api.api_server"),
    (SCRIPT, "$server", {"CLEARML_API_HOST": "http://127.0.0.1:99999"}, "no valid address; write http://host:port or"),
    (SCRIPT, f"$server {TARGET}", {}, ORIGIN),
    (SCRIPT, "$server", UNDEFINED, r"api.files_server is 'undefined': no address.*\[CLEARML_FILES_HOST, environment\]"),
    (SCRIPT, "$server", DEAD, r"no storage at http://127.0.0.1:[0-9]+: .*\[CLEARML_FILES_HOST, environment\]"),
    ((*STORAGE, *TO_STORE), "sdk.aws: 3", {}, "the SDK cannot use sdk.aws.s3.credentials"),
    ((*STORAGE, *TO_SMALL), LARGE, {}, "host 'STORE:9000' is taken for store:9000: they differ in port or case"),
    ((*STORAGE, "--output-uri", "/ü/ü"), "sdk {}", {"PYTHONIOENCODING": "ascii"}, r"whose parent exists: /\\xfc"),
]


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_in_one_line(
    machine: Machine, stand_in: ClearMLServer, places: dict[str, str], case: Case
) -> None:
    command, _, _, words = case
    before = len(stand_in.tasks)
    code, said = run_case(machine, places, case)
    assert code == 1, said
    lines = [line for line in said.splitlines() if re.search("^failed|: error: ", line)]
    assert re.search(words, said if command[:2] == DOCTOR else lines[0], re.DOTALL), said
    assert len(lines) == 1 or command[:2] == DOCTOR
    assert "ss-word" not in said
    assert len(stand_in.tasks) == before


@pytest.mark.parametrize(
    ("status", "location", "right"),
    [(301, "https://h:1/debug.ping", "https://h:1"), (308, "/api/debug.ping", "http://h/api"), (302, "/login", "")],
)
def test_the_address_behind_a_redirect_is_named(status: int, location: str, right: str) -> None:
    """Not that of a page to log in."""
    answer = requests.Response()
    answer.url, answer.status_code = "http://h/debug.ping", status
    answer.headers["Location"] = location
    with pytest.raises(RunError, match=f"^http://h redirects to {right}: write {right}$") if right else nullcontext():
        server.check_redirect(answer, "http://h")


def test_a_server_that_is_away_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([RunError("away"), RunError("away"), None])

    def ping_once() -> None:
        if error := next(answers):
            raise error

    monkeypatch.setattr(server, "ping_once", ping_once)
    monkeypatch.setattr(server, "PATIENCE", 0)
    server.ping(patience=60)
    assert capsys.readouterr().out == "waiting for the ClearML server to come back\nthe ClearML server is back\n"


# --- folders ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("uri", "folder"), [("Übung", "Übung"), ("~/Übung 🚀", "Übung 🚀")])
def test_an_offline_run_asks_nobody_and_stores_in_a_folder_by_any_name(machine: Machine, uri: str, folder: str) -> None:
    """Also where the output lacks letters of what it prints."""
    (machine.home / "Übung").mkdir()
    machine.variables |= {"no_proxy": "", "NO_PROXY": "", "PYTHONIOENCODING": "ascii"}
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        machine.variables |= dict.fromkeys(("http_proxy", "https_proxy"), f"http://127.0.0.1:{proxy.getsockname()[1]}")
        done = machine.run(*SCRIPT, "--offline", "--output-uri", uri)
        assert done.returncode == 0, done.stderr
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    (stored,) = (machine.home / folder).rglob("model.pt")
    assert stored.read_bytes() == machine.outputs("model.pt").read_bytes()
    assert f"Stored: file://{machine.home}/{ascii(folder)[1:-1]}/" in done.stdout
    assert {path.name for path in machine.home.iterdir()} == {"Übung", ".clearml", "outputs", folder}


@pytest.mark.skipif(not shutil.which("setpriv") or os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_home_of_another_user_is_named(machine: Machine) -> None:
    """As in a container that runs by number, with HOME=/root."""
    machine.home.chmod(0o700)
    command = ["setpriv", "--reuid=54321", "--clear-groups", sys.executable, *CLEANUP]
    environment = {**machine.environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert f"{machine.home}/clearml.conf cannot be read: Permission denied" in line


# --- going on, streams, notebooks -------------------------------------------------------------------------------------
def test_the_command_to_go_on_starts_from_anywhere(begin: Begin, machine: Machine, tmp_path: Path) -> None:
    """Data and checkpoint were named from the folder in which the run began."""
    (machine.home / "data").symlink_to(mnist(600, 200))
    stopped = begin("--data-dir", "data", *FEW, "--epochs", 1000)
    stopped.wait_for("epoch 1/")
    stopped.process.terminate()
    stopped.end()
    words = shlex.split(stopped.line.partition("to go on: ")[2])
    script = words.index(f"{ROOT}/pytorch_mnist.py")
    resumed = machine.start(*words[script:], cwd=tmp_path)
    resumed.wait_for("resumed after epoch ")
    resumed.process.kill()
    resumed.end()


def test_a_script_from_standard_input_with_its_outputs_closed(machine: Machine, tmp_path: Path) -> None:
    command = f"{sys.executable} - --dry-run --output-dir {tmp_path}/out >&- 2>&-"
    with open(ROOT / "pytorch_mnist.py") as script:
        done = subprocess.run(["sh", "-c", command], stdin=script, cwd=ROOT, env=machine.environment)
    assert done.returncode == 0
    assert len([*tmp_path.glob("out/*/model.pt")]) == 1


def test_no_file_gets_the_number_of_a_closed_stream_and_errors_are_said_on_stdout() -> None:
    program = "import os, sys, clearml_client; print(os.open(os.devnull, os.O_RDONLY) > 2, file=sys.stderr)"
    shell = ["sh", "-c", f"{shlex.join([sys.executable, '-c', program])} <&- 2>&-"]
    assert subprocess.run(shell, cwd=ROOT, capture_output=True, text=True).stdout == "True\n"


def test_nothing_comes_after_the_last_line_of_an_offline_run(machine: Machine) -> None:
    with open(machine.home / "log.txt", "w") as log:
        run = machine.run("pytorch_mnist.py", *FEW, "--offline", "--lr", 1e9, stdout=log.fileno(), stderr=log.fileno())
    assert run.returncode == 1
    assert (machine.home / "log.txt").read_text().splitlines()[-1].startswith("pytorch_mnist.py: error: the loss is ")
    assert machine.session().is_file()


def test_in_a_notebook_the_kernel_goes_on(machine: Machine, online: ClearMLServer) -> None:
    script = f"{ROOT}/pytorch_mnist.py --dry-run"
    codes = {f"{script} --resume none.pt": 1, "-m clearml_client.doctor": 0, shlex.join(CLEANUP): 2}
    codes |= {f"{script} --output-dir {ROOT}/LICENSE": 1, script: 0}
    before = len(online.tasks)
    done = machine.run("tests/programs/notebook.py", *codes)
    assert done.returncode == 0, done.stdout + done.stderr
    for command, code in codes.items():
        assert f"%run {command}: {code}\n" in done.stdout
    assert [task["status"] for task in online.tasks.values()][before:] == ["failed", "completed"]
    assert "Traceback" not in done.stdout + done.stderr


def test_letters_that_did_not_arrive() -> None:
    with pytest.raises(Exception, match="LC_ALL"):
        arguments.name(os.fsdecode("Übung".encode("latin-1")))


# --- the right one is blamed ------------------------------------------------------------------------------------------
def aws(code: str, message: str = "", status: int = 400) -> Exception:
    answer: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "PutObject")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (aws("ExpiredToken", "The provided token has expired."), "expired key"),
        (aws("InvalidToken", "The provided token is malformed or otherwise invalid."), "session token not accepted"),
        (aws("AuthorizationHeaderMalformed", "the region 'x' is wrong; expecting 'eu-west-1'"), "wrong region"),
        (aws("NotImplemented", "A header you provided implies functionality", 501), "checksum not understood"),
        (aws("InvalidArgument", "STREAMING-UNSIGNED-PAYLOAD-TRAILER"), "checksum not understood"),
        (aws("SlowDown", "Please reduce your request rate.", 503), "too many requests"),
        (aws("QuotaExceeded", "No.", 403), "quota"),
        (aws("InternalError", "Try again.", 500), "store's own error, perhaps its disk or quota"),  # SeaweedFS: a quota
        (aws("RequestTimeTooSkewed", "No.", 403), "clock skew"),
        (ValueError("Invalid header value b'AWS4 Credential=AK\\n/2026'"), "a line break or blank in a key"),
        (ValueError("Invalid endpoint: http://my_store:9000"), "no valid host name"),
        (botocore.exceptions.InvalidRegionError(region_name="eu west"), "wrong region"),
        (TimeoutError("127.0.0.1:42999, 127.0.0.1:40300 and 127.0.0.1:50112: timed out"), "time-out"),  # no statuses
    ],
)
def test_what_a_store_says_is_understood(error: Exception, words: str) -> None:
    assert errors.diagnose(error).words == words


# --- threads ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("limit", "count"), [("max 100000\n", 0), ("150000 100000\n", 2), (None, 0)])
def test_the_cpus_that_a_container_allows(tmp_path: Path, limit: str | None, count: int) -> None:
    if limit:
        (tmp_path / "cpu.max").write_text(limit)
    assert clearml_client.cpu_quota(tmp_path / "cpu.max") == count


@pytest.mark.parametrize(
    ("given", "quota", "added"),
    [
        ({}, 0, {"GOMP_SPINCOUNT"}),
        ({}, 1, {"GOMP_SPINCOUNT", "OMP_NUM_THREADS"}),
        ({}, 1000, {"GOMP_SPINCOUNT"}),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}, 1, set()),
        ({"GOMP_SPINCOUNT": "7"}, 0, set()),
    ],
)
def test_threads_are_set_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], quota: int, added: set[str]
) -> None:
    monkeypatch.setattr(os, "environ", {"PYTHON_DOTENV_DISABLED": "1", **given})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(clearml_client, "cpu_quota", lambda: quota)
    clearml_client.prepare_environment()
    threads = {name: value for name, value in os.environ.items() if "OMP_" in name}
    assert given.items() <= threads.items()
    assert threads.keys() - given.keys() == added
