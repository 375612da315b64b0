"""Set-ups that people have: certificates, proxies, folders, streams, CPUs. It works, or one line names what is wrong.

What clearml.conf and .env may look like is in test_configuration.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, NamedTuple
from unittest.mock import Mock

import botocore.exceptions
import certifi
import pytest
import trustme
import werkzeug
from clearml_server import ClearMLServer
from conftest import FEW, ROOT, Begin, Machine, mnist
from stores import Rclone, free_port
from werkzeug.utils import redirect

import clearml_client
from clearml_client import arguments, ending, errors, server
from clearml_client.errors import RunError

SCRIPT = ("pytorch_mnist.py", "--dry-run")
CLEANUP = ("-m", "clearml_client.cleanup", "--project-name", "any")
DOCTOR = ("-m", "clearml_client.doctor")
SERVER, STORAGE = ((*DOCTOR, "--only", area) for area in ("server", "storage"))


# --- certificates, proxies, addresses ---------------------------------------------------------------------------------
class Unusual(ClearMLServer):
    """Before it is a proxy that refuses a GET with a body; /moved and /files have another address now, /page
    wants a login, and /busy lets nobody in."""

    def answer_api(self, request: werkzeug.Request) -> werkzeug.Response:
        if request.path.startswith("/moved"):
            return redirect(self.api_url + request.path.removeprefix("/moved"))
        if request.path.startswith("/files"):
            return redirect(self.files_url + request.path.removeprefix("/files"))
        if request.path.startswith("/busy") and request.path.endswith("auth.login"):
            return werkzeug.Response(status=503)
        if request.path.startswith("/page"):
            return redirect("/login")
        if request.path == "/login" or (request.method == "GET" and request.data):
            return werkzeug.Response(status=404 if request.path == "/login" else 411)
        return super().answer_api(request)


@pytest.fixture(scope="module")
def places(
    stand_in: ClearMLServer, rclone: Rclone, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """What $server, $ca and the like stand for in the tables below. Only a proxy may know a name with .invalid.

    $secure is over https, with a certificate of an authority that nobody knows.
    """
    secure, unusual = ClearMLServer(tmp_path_factory.mktemp("secure")), Unusual(tmp_path_factory.mktemp("unusual"))
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(ca := secure.files_folder / "ca.pem")
    secure.start(context)
    unusual.start()
    server, api, store = stand_in.configuration(), stand_in.api_url, rclone.host.replace("127.0.0.1", "store.invalid")
    yield {
        "server": server,
        "api": api,
        "files": stand_in.files_url,
        "unknown": server.replace("127.0.0.1", "clearml.invalid"),
        "by_proxy": server.replace(api, api.replace("127.0.0.1", "clearml.invalid")),
        "nobody": f"127.0.0.1:{free_port()}",
        "secure": secure.configuration().replace("http:", "https:"),
        "ca": str(ca),
        "unusual": unusual.configuration(),
        "other": unusual.api_url,
        "token": stand_in.token,
        "store": rclone.clearml_conf(host=store),
        "uri": f"s3://{store}/models",
    }
    for each in (secure, unusual):
        each.stop()
        assert not each.unknown


class Case(NamedTuple):
    command: tuple[str, ...]
    conf: str  # clearml.conf
    variables: dict[str, str]
    words: str  # of the output, where it works; else of the one line, or of the doctor


BUNDLE = {"REQUESTS_CA_BUNDLE": certifi.where()}
WEAK = {"AWS_SECRET_ACCESS_KEY": "pa-55"}
BY_VARIABLE = {"CLEARML_API_HOST_VERIFY_CERT": '"false"', "CURL_CA_BUNDLE": certifi.where()}
PROXY = {"HTTP_PROXY": "$api", "NO_PROXY": "127.0.0.1"}  # which answers for any name
LOST = "asked through the proxy http://[*]+@127.0.0.1:[0-9]+: NO_PROXY={}.invalid bypasses it".format
NOBODY = {"HTTP_PROXY": "http://me:p@ss-word@$nobody", "NO_PROXY": "127.0.0.1"}
KEYS = {"CLEARML_API_ACCESS_KEY": ClearMLServer.access_key, "CLEARML_API_SECRET_KEY": ClearMLServer.secret_key}
HOSTS = {"CLEARML_API_HOST": "$api", "CLEARML_FILES_HOST": "$files"}
TOKEN = {**HOSTS, "CLEARML_WEB_HOST": "$files", "CLEARML_AUTH_TOKEN": "$token"}
NO_WEB = r"no address of the web UI.*set api.web_server \(CLEARML_WEB_HOST\)"
MOVED = r"(http://\S+) redirects to (http://\S+): write \2 \[api.api_server, ~/clearml.conf\]"
TARGET = 'sdk.development.default_output_uri: "/no/such/folder"'
ORIGIN = r"no storage at /no/such/folder: .*mkdir -p /no/such.* \[sdk.development.default_output_uri, ~/clearml.conf\]"
BEATEN = {"CLEARML_OFFLINE_MODE": "0", "CLEARML_DEFAULT_OUTPUT_URI": "$files"}
TO_STORE = (*SCRIPT, "--output-uri", "$uri")
FILES = (*DOCTOR, "--only", "configuration")

RIGHT = [
    Case(SERVER, "$secure", BY_VARIABLE, "All is well"),
    Case(SCRIPT, '$secure api.verify_certificate: "~/ca.pem"', BUNDLE, "Stored: https:"),
    Case(SERVER, "$secure", {"REQUESTS_CA_BUNDLE": "$ca"}, "All is well"),
    Case(SERVER, "$by_proxy", PROXY, "ok +server: API .*clearml.invalid.*through the proxy http://127.0.0.1"),
    Case(SCRIPT, "$unusual", {"CLEARML_API_DEFAULT_REQ_METHOD": "PUT"}, "Stored: http:"),
    Case(SCRIPT, "sdk {}", TOKEN, "Stored: http:"),
    Case(SCRIPT, f"$server {TARGET}", BEATEN, "Stored: http:"),
    Case(FILES, "$server", WEAK, r"(?s)warning .*secrets .*everywhere: AWS_SECRET_ACCESS.*\nAll works; to improve: "),
    Case(FILES, "$server", {"AWS_SECRET_ACCESS_KEY": "0123456789abcdef"}, "All is well"),
]
WRONG = [
    Case(SCRIPT, "$secure", BUNDLE, "certificate not trusted.*api.verify_certificate"),  # the SDK would ask for ever
    Case(SERVER, '$secure api.verify_certificate: "/no/such.pem"', BUNDLE, "certificate file missing"),
    Case(CLEANUP, "$unknown", NOBODY, f"{LOST('clearml')}((?!--offline).)*$"),  # it has no such option
    Case(TO_STORE, "$server $store", NOBODY, LOST("store")),
    Case(TO_STORE, "$server api { $store }", {}, r"no keys: \S+ is inside api { }; move it to the end of the file"),
    *(Case(each, "$unusual", {}, "411.*CLEARML_API_DEFAULT_REQ_METHOD=PUT") for each in (SCRIPT, CLEANUP, SERVER)),
    *(Case(each, "sdk {}", KEYS | HOSTS, NO_WEB) for each in (SCRIPT, SERVER)),
    Case(SCRIPT, '$server api.api_server: "$other/moved"', {}, MOVED),
    Case(SCRIPT, '$server api.files_server: "$other/files"', {}, MOVED.replace("api_server", "files_server")),
    Case(SCRIPT, "$server", {"CLEARML_API_HOST": "$other/busy"}, "503"),
    Case(STORAGE, "api: {", {}, "failed +configuration: file .*syntax error"),
    Case(SCRIPT, "$server", {"CLEARML_API_HOST": "$other/page"}, "something else .HTTP 404. answers there"),
    Case(SCRIPT, "$server", {"CLEARML_API_HOST": "http://me:p@ss-word@$nobody"}, "take user and password out of api"),
    Case(SCRIPT, "$server", {"CLEARML_API_HOST": "http://127.0.0.1:99999"}, "no valid address; write http://host:port"),
    Case(SCRIPT, f"$server {TARGET}", {}, ORIGIN),
    Case(SCRIPT, "$server", {"CLEARML_FILES_HOST": "undefined"}, r"is 'undefined': no.*\[CLEARML_FILES_HOST, environ"),
    Case(SCRIPT, "$server", {"CLEARML_FILES_HOST": "http://$nobody"}, r"no storage at http:.*\[CLEARML_FILES_HOST, en"),
    Case((*STORAGE, "--output-uri", "/ü/ü"), "", {"PYTHONIOENCODING": "ascii"}, r"/\\xfc/\\xfc is no folder whose par"),
]


@pytest.mark.parametrize("case", RIGHT + WRONG)
def test_what_is_unusual_works_and_what_is_wrong_is_named_in_one_line(
    machine: Machine, stand_in: ClearMLServer, places: dict[str, str], case: Case
) -> None:
    machine.configure("sdk {} ", Template(case.conf).substitute(places))
    machine.variables |= {name: Template(value).substitute(places) for name, value in case.variables.items()}
    shutil.copy(places["ca"], machine.home)
    before = len(stand_in.tasks)
    done = machine.run(*(Template(word).substitute(places) for word in case.command), code=int(case in WRONG))
    said = done.stdout + done.stderr
    if case in RIGHT:
        assert re.search(case.words, said), said
        assert "repository" not in said  # of which the SDK tells at each start
        return
    lines = [line for line in said.splitlines() if re.search("^failed|: error: ", line)]
    assert re.search(case.words, said if case.command[:2] == DOCTOR else lines[0], re.DOTALL), said
    assert len(lines) == 1 or case.command[:2] == DOCTOR
    assert "ss-word" not in said
    assert len(stand_in.tasks) == before


def test_a_server_that_is_away_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "ping_once", Mock(side_effect=[RunError("away"), RunError("away"), None]))
    monkeypatch.setattr(server, "TIMEOUT", 0)
    server.ping(patience=60)
    assert capsys.readouterr().out == "waiting for the ClearML server to come back\nthe ClearML server is back\n"


# --- folders ----------------------------------------------------------------------------------------------------------
READ_ONLY = "mount -t tmpfs -o ro,size=1M tmpfs"
NO_PLACE = [
    (f"{READ_ONLY} /tmp; {READ_ONLY} /var/tmp; cd /proc", "no folder for temporary files: No usable .*; set TMPDIR to"),
    (f"{READ_ONLY} /dev/shm", "no semaphore can be made: Read-only file system; free space in /dev/shm, or"),
]


@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="needs root, to mount")
@pytest.mark.parametrize(("mounts", "words"), NO_PLACE)
def test_a_machine_without_a_place_for_temporary_files(machine: Machine, mounts: str, words: str) -> None:
    """Of which `import clearml` makes a traceback."""
    script = shlex.join([sys.executable, str(ROOT / "pytorch_mnist.py"), "--offline"])
    unshared = ["unshare", "--mount", "env", "--unset=TMPDIR", "sh", "-c", f"{mounts}; exec {script}"]
    done = subprocess.run(unshared, cwd=machine.home, env=machine.environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.match(f"pytorch_mnist.py: error: {words}", done.stderr), done.stderr


def test_an_interrupt_before_the_guard_is_one_line(begin: Begin, machine: Machine) -> None:
    """While torch is imported, say."""
    (machine.home / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    run = begin("--dry-run", PYTHONPATH=str(machine.home))
    assert run.end() == -signal.SIGINT
    assert run.stderr == "pytorch_mnist.py: interrupted\n"


@pytest.mark.parametrize(("uri", "folder"), [("Übung", "Übung"), ("~/Übung 🚀", "Übung 🚀")])
def test_an_offline_run_asks_nobody_and_stores_in_a_folder_by_any_name(machine: Machine, uri: str, folder: str) -> None:
    """Also where the output lacks letters of what it prints."""
    (machine.home / "Übung").mkdir()
    machine.variables |= {"no_proxy": "", "NO_PROXY": "", "PYTHONIOENCODING": "ascii"}
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        machine.variables |= dict.fromkeys(("http_proxy", "https_proxy"), f"http://127.0.0.1:{proxy.getsockname()[1]}")
        done = machine.run(*SCRIPT, "--offline", "--output-uri", uri)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    (stored,) = (machine.home / folder).rglob("model.pt")
    assert stored.read_bytes() == machine.outputs("model.pt").read_bytes()
    assert f"Stored: file://{machine.home}/{ascii(folder)[1:-1]}/" in done.stdout
    assert {path.name for path in machine.home.iterdir()} == {"Übung", ".clearml", "outputs", folder}


# --- going on, streams, notebooks -------------------------------------------------------------------------------------
def test_the_command_to_go_on_starts_from_anywhere(begin: Begin, machine: Machine, tmp_path: Path) -> None:
    """Data and checkpoint were named from the folder in which the run began."""
    (machine.home / "data").symlink_to(mnist(300, 200))
    stopped = begin("--data-dir", "data", *FEW, "--epochs", 1000)
    stopped.wait_for("epoch 1/")
    stopped.process.terminate()
    stopped.end()
    words = shlex.split(stopped.line.partition("to go on: ")[2])
    resumed = machine.start(*words[words.index(f"{ROOT}/pytorch_mnist.py") :], cwd=tmp_path)
    resumed.wait_for("resumed after epoch ")
    resumed.kill()
    resumed.end()


def test_no_file_gets_the_number_of_a_closed_stream_and_errors_are_said_on_stdout() -> None:
    program = "import os, sys, clearml_client; print(os.open(os.devnull, os.O_RDONLY) > 2, file=sys.stderr)"
    shell = ["sh", "-c", f"{shlex.join([sys.executable, '-c', program])} <&- 2>&-"]
    assert subprocess.run(shell, cwd=ROOT, capture_output=True, text=True).stdout == "True\n"


def test_nothing_comes_after_the_last_line_of_an_offline_run(machine: Machine) -> None:
    with open(machine.home / "log.txt", "w") as log:
        streams = dict.fromkeys(("stdout", "stderr"), log.fileno())
        machine.run("pytorch_mnist.py", *FEW, "--offline", "--lr", 1e9, code=1, **streams)
    assert (machine.home / "log.txt").read_text().splitlines()[-1].startswith("pytorch_mnist.py: error: the loss is ")
    assert machine.session().is_file()


def test_in_a_notebook_the_kernel_goes_on(machine: Machine, online: ClearMLServer) -> None:
    script = f"{ROOT}/pytorch_mnist.py --dry-run"
    codes = {f"{script} --resume none.pt": 2, "-m clearml_client.doctor": 0, shlex.join(CLEANUP): 2}
    codes |= {f"{script} --output-dir {ROOT}/LICENSE": 1, script: 0}
    before = len(online.tasks)
    done = machine.run("tests/programs/notebook.py", *codes)
    for command, code in codes.items():
        assert f"%run {command}: {code}\n" in done.stdout
    assert [task["status"] for task in online.tasks.values()][before:] == ["failed", "completed"]
    assert "Traceback" not in done.stdout + done.stderr


def test_after_a_failed_run_nothing_ends_the_kernel() -> None:
    run = ending.Ending()
    run.say("of a test", 1, "failed", seconds=600)
    timer = run.last_resort
    run.reset()
    assert timer
    assert timer.finished.is_set()


def test_letters_that_did_not_arrive() -> None:
    with pytest.raises(Exception, match="LC_ALL"):
        arguments.name(os.fsdecode("Übung".encode("latin-1")))


# --- the right one is blamed ------------------------------------------------------------------------------------------
def aws(code: str, message: str = "", status: int = 400) -> Exception:
    answer: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "PutObject")


SAID = [
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
    (aws("SecondLevelDomainForbidden", "Use virtual hosting."), "the store wants virtual-host addresses"),
    (botocore.exceptions.InvalidRegionError(region_name="eu west"), "wrong region"),
    (TimeoutError("127.0.0.1:42999, 127.0.0.1:40300 and 127.0.0.1:50112: timed out"), "time-out"),  # no statuses
]


@pytest.mark.parametrize(("error", "words"), SAID)
def test_what_a_store_says_is_understood(error: Exception, words: str) -> None:
    assert errors.diagnose(error).words == words


# --- threads ----------------------------------------------------------------------------------------------------------
SPIN = {"GOMP_SPINCOUNT": "1000"}


@pytest.mark.parametrize(
    ("given", "limit", "added"),
    [
        ({}, None, SPIN),
        ({}, "max 100000", SPIN),
        ({}, "150000 100000", {**SPIN, "OMP_NUM_THREADS": "2"}),  # one and a half
        ({}, "9900000 100000", SPIN),
        ({"GOMP_SPINCOUNT": "7"}, "100000 100000", {"OMP_NUM_THREADS": "1"}),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}, "100000 100000", {}),
    ],
)
def test_a_container_has_a_thread_for_each_cpu_that_it_may_use_unless_the_user_says_how_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, str], limit: str | None, added: dict[str, str]
) -> None:
    quota = partial(clearml_client.cpu_quota, tmp_path / "cpu.max")
    if limit:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(os, "environ", {"PYTHON_DOTENV_DISABLED": "1", **given})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(clearml_client, "cpu_quota", quota)
    clearml_client.prepare_environment()
    assert {name: value for name, value in os.environ.items() if "OMP_" in name} == given | added
