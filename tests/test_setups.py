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
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import botocore.exceptions
import certifi
import pytest
import trustme
import werkzeug
from clearml_server import ClearMLServer
from conftest import FEW, ROOT, Begin, Machine, Run, mnist
from stores import Plug, Rclone, free_port

import clearml_client
from clearml_client import arguments, errors, run

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
        "store": rclone.clearml_conf(host=store),
        "uri": f"s3://{store}/models",
    }
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

# The doctor asks API, file server and web UI by the run's own calls.
RIGHT: list[Case] = [
    (SCRIPT, "$secure api.verify_certificate: false", BUNDLE, "Stored: https:"),
    (SERVER, "$secure", BY_VARIABLE, "All is well"),
    (SCRIPT, '$secure api.verify_certificate: "~/ca.pem"', BUNDLE, "Stored: https:"),
    (SERVER, "$secure", {"REQUESTS_CA_BUNDLE": "$ca"}, "All is well"),
    (SCRIPT, "$by_proxy", PLUG, "Stored: http:"),
    (SERVER, "$by_proxy", PLUG, THROUGH),
    (SCRIPT, "$no_get", {"CLEARML_API_DEFAULT_REQ_METHOD": "PUT"}, "Stored: http:"),
]


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_unusual_and_right_works(machine: Machine, places: dict[str, str], case: Case) -> None:
    *_, words = case
    code, said = run_case(machine, places, case)
    assert code == 0, said
    assert re.search(words, said)


UNTRUSTED, MISSING = "certificate not trusted", r"certificate file missing \(.*/no/such.pem"
LOST = "asked through the proxy http://[*]+@127.0.0.1:[0-9]+: NO_PROXY={}.invalid goes without".format
NOBODY = {"HTTP_PROXY": "http://me:p@ss-word@$nobody", "NO_PROXY": "127.0.0.1"}
KEYS = {"CLEARML_API_ACCESS_KEY": ClearMLServer.access_key, "CLEARML_API_SECRET_KEY": ClearMLServer.secret_key}
NO_ADDRESS = r"no address of the web UI: set api.web_server \(CLEARML_WEB_HOST\)"
NO_WEB = {**KEYS, "CLEARML_API_HOST": "$api", "CLEARML_FILES_HOST": "$files"}
TARGET = 'sdk.development.default_output_uri: "/no/such/folder"'
ORIGIN = r"no storage at /no/such/folder: .*mkdir -p /no/such.* \[sdk.development.default_output_uri, ~/clearml.conf\]"
UNDEFINED = {"CLEARML_FILES_HOST": "undefined"}
DEAD = {"CLEARML_FILES_HOST": "http://$nobody"}
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
    (SCRIPT, f"$server {TARGET}", {}, ORIGIN),
    (SCRIPT, "$server", UNDEFINED, r"api.files_server is 'undefined': no address.*\[CLEARML_FILES_HOST, environment\]"),
    (SCRIPT, "$server", DEAD, r"no storage at http://127.0.0.1:[0-9]+: .*\[CLEARML_FILES_HOST, environment\]"),
    ((*STORAGE, *TO_STORE), "sdk.aws: 3", {}, "the SDK cannot use sdk.aws.s3.credentials"),
    ((*STORAGE, *TO_SMALL), LARGE, {}, "host 'STORE:9000' is taken for store:9000: they differ in case"),
    ((*STORAGE, "--output-uri", "/ü/ü"), "sdk {}", {"PYTHONIOENCODING": "ascii"}, r"whose parent exists: /\\xfc"),
]


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_in_one_line(
    machine: Machine, stand_in: ClearMLServer, places: dict[str, str], case: Case
) -> None:
    command, conf, _, words = case
    before = len(stand_in.tasks)
    code, said = run_case(machine, places, case)
    assert code == 1, said
    lines = [line for line in said.splitlines() if re.search("^failed|: error: ", line)]
    assert re.search(words, lines[0]), lines
    assert len(lines) == 1 or command[:2] == DOCTOR
    assert "ss-word" not in said
    is_of_a_store = command[0] == SCRIPT[0] and "$server" in conf
    assert len(stand_in.tasks) - before == is_of_a_store  # then it is the task's failure


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
    assert f"{machine.home}/clearml.conf cannot be looked for: Permission denied" in line


# --- going on, streams, notebooks -------------------------------------------------------------------------------------
def test_the_command_to_go_on_starts_from_anywhere(begin: Begin, machine: Machine, tmp_path: Path) -> None:
    """Data and checkpoint were named from the folder in which the run began."""
    (machine.home / "data").symlink_to(mnist(600, 200))
    stopped = begin("--data-dir", "data", *FEW, "--epochs", 1000)
    stopped.wait_for("epoch 1/")
    stopped.process.terminate()
    stopped.end()
    uv, command, project, root, script, *options = shlex.split(stopped.line.partition("to go on: ")[2])
    assert (uv, command, project, root) == ("uv", "run", "--project", str(ROOT))
    resumed = Run(machine.start(script, *options, cwd=tmp_path))
    resumed.wait_for("resumed after epoch ")
    resumed.process.kill()
    resumed.end()


def test_a_script_from_standard_input_has_no_command_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SCRIPT", Path("-"))
    ending = run.Ending()
    ending.checkpoint = Path("outputs/x/checkpoint.pt")
    assert ending.saved() == "; saved: outputs/x/checkpoint.pt"


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


def test_in_a_notebook_the_kernel_goes_on(machine: Machine, online: ClearMLServer) -> None:
    script = f"{ROOT}/pytorch_mnist.py --dry-run"
    codes = {f"{script} --resume none.pt": 1, "-m clearml_client.doctor": 0, shlex.join(CLEANUP): 2, script: 0}
    done = machine.run("tests/programs/notebook.py", *codes)
    assert done.returncode == 0, done.stdout + done.stderr
    for command, code in codes.items():
        assert f"%run {command}: {code}\n" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_notebook_is_not_ended_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "in_notebook", lambda: True)
    ending = run.Ending()
    ending.tell("a failure", 1, seconds=1e6)
    last_resort = ending.last_resort
    assert last_resort
    with pytest.raises(SystemExit):
        ending.leave(1)
    assert last_resort.finished.is_set()
    assert ending.code is None  # the next run in it is another one


def test_letters_that_did_not_arrive() -> None:
    with pytest.raises(Exception, match="LC_ALL"):
        arguments.label(os.fsdecode("Übung".encode("latin-1")))


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
CGROUPS: list[tuple[str, dict[str, str], int]] = [
    ("0::/\n", {"cpu.max": "max 100000\n"}, 0),
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),  # a container
    ("0::/job/step\n", {"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, 3),
    ("3:cpuset:/\n2:cpu,cpuacct:/docker/1\n", {"cpu,cpuacct/cpu.cfs_quota_us": "400000\n"}, 4),  # version 1
    ("2:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n"}, 0),
]


@pytest.mark.parametrize(("groups", "files", "count"), CGROUPS)
def test_the_cpus_that_a_container_allows(tmp_path: Path, groups: str, files: dict[str, str], count: int) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()} | {"proc/self/cgroup": groups}
    for name, text in {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert clearml_client.cpu_quota(tmp_path) == count
    assert clearml_client.cpu_quota(tmp_path / "no Linux") == 0


@pytest.mark.parametrize(
    ("given", "quota", "added"),
    [
        ({}, 0, {"GOMP_SPINCOUNT": "30000"}),
        ({}, 1, {"GOMP_SPINCOUNT": "30000", "OMP_NUM_THREADS": "1"}),
        ({}, 1000, {"GOMP_SPINCOUNT": "30000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}, 1, {}),
        ({"GOMP_SPINCOUNT": "7"}, 0, {}),
    ],
)
def test_threads_are_set_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], quota: int, added: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", {"PYTHON_DOTENV_DISABLED": "1", **given})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(clearml_client, "cpu_quota", lambda: quota)
    clearml_client.prepare_environment()
    assert {name: value for name, value in os.environ.items() if "OMP_" in name} == given | added
