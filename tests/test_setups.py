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
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

import boto3
import botocore.exceptions
import certifi
import clearml_server
import pytest
import trustme
from clearml_server import ClearMLServer
from conftest import FEW, ROOT, Machine, mnist
from flask import request
from stores import Plug, Rclone, free_port
from werkzeug.serving import make_server

import clearml_client
import pytorch_mnist
from clearml_client import arguments, configuration, faults, run

SCRIPT = ("pytorch_mnist.py", "--dry-run")
CLEANUP = ("-m", "clearml_client.cleanup", "--project-name", "any")
DOCTOR = ("-m", "clearml_client.doctor")
SERVER, STORAGE = ((*DOCTOR, "--only", area) for area in ("server", "storage"))
Command = tuple[str, ...]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


# --- certificates, proxies, addresses ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def no_get(tmp_path_factory: pytest.TempPathFactory) -> ClearMLServer:
    """Behind a proxy that refuses a GET with a body."""
    server = ClearMLServer(tmp_path_factory.mktemp("no-get"))
    refuse: Callable[[], Any] = lambda: ("", 411) if request.method == "GET" and request.content_length else None  # noqa: E731
    server._apps["api"].before_request(refuse)
    return server


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> ClearMLServer:
    """Over https, with a certificate of an authority that nobody knows: files/ca.pem."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server = ClearMLServer(tmp_path_factory.mktemp("secure"))
    authority.cert_pem.write_to_path(server.files_folder / "ca.pem")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clearml_server, "make_server", partial(make_server, ssl_context=context))
        server.start()
    return server


@pytest.fixture(scope="module")
def servers(stand_in: ClearMLServer, secure: ClearMLServer, no_get: ClearMLServer) -> Iterator[list[ClearMLServer]]:
    no_get.start()
    with ExitStack() as stack:
        for server in (secure, no_get):
            stack.callback(server.stop)
        yield [stand_in, secure, no_get]
    assert not secure.unknown + no_get.unknown


@pytest.fixture(scope="module")
def places(servers: list[ClearMLServer], rclone: Rclone) -> dict[str, str]:
    """What $server, $ca and the like stand for in the tables below. Only a proxy may know a name with .invalid."""
    stand_in, secure, no_get = servers
    found = {"server": stand_in.configuration(), "no_get": no_get.configuration()}
    found |= {"api": stand_in.api_url, "files": stand_in.files_url}
    found["unknown"] = found["server"].replace("127.0.0.1", "clearml.invalid")
    found["by_proxy"] = found["server"].replace(found["api"], found["api"].replace("127.0.0.1", "clearml.invalid"))
    found |= {"secure": secure.configuration().replace("http:", "https:"), "ca": str(secure.files_folder / "ca.pem")}
    store = rclone.host.replace("127.0.0.1", "store.invalid")
    found |= {"store": rclone.clearml_conf(host=store), "uri": f"s3://{store}/models"}
    found |= {"plug": Plug(int(stand_in.api_url.rpartition(":")[2])).host, "nobody": f"127.0.0.1:{free_port()}"}
    return found


def set_up(machine: Machine, places: dict[str, str], conf: str, variables: dict[str, str]) -> None:
    machine.configure(Template(conf).substitute(places))
    machine.variables |= {name: Template(value).substitute(places) for name, value in variables.items()}


AUTHORITY, NOT_CHECKED = 'api.verify_certificate: "$ca"', "api.verify_certificate: false"
BUNDLE = {"REQUESTS_CA_BUNDLE": certifi.where()}
BY_VARIABLE = {"CLEARML_API_HOST_VERIFY_CERT": '"false"', "CURL_CA_BUNDLE": certifi.where()}
PLUG = {"HTTP_PROXY": "http://$plug", "NO_PROXY": "127.0.0.1"}


@pytest.mark.parametrize(
    ("command", "conf", "variables"),
    [
        pytest.param(SERVER, f"$secure {NOT_CHECKED}", {}, id="certificate not checked"),
        pytest.param(SCRIPT, f"$secure {NOT_CHECKED}", BUNDLE, id="not checked, beside a bundle"),
        pytest.param(SERVER, "$secure", BY_VARIABLE, id="not checked, by variable"),
        pytest.param(SERVER, f"$secure {AUTHORITY}", {}, id="its authority"),
        pytest.param(SCRIPT, f"$secure {AUTHORITY}", BUNDLE, id="its authority, beside a bundle"),
        pytest.param(SERVER, '$secure api.verify_certificate: "~/ca.pem"', {}, id="its authority, in HOME"),
        pytest.param(SERVER, "$secure", {"REQUESTS_CA_BUNDLE": "$ca"}, id="its authority, in the bundle"),
        pytest.param(SCRIPT, "$by_proxy", PLUG, id="a name that only the proxy knows"),
        pytest.param(SCRIPT, "$no_get", {"CLEARML_API_DEFAULT_REQ_METHOD": "PUT"}, id="a proxy that refuses GET"),
    ],
)
def test_what_is_unusual_and_right_works(
    machine: Machine, places: dict[str, str], command: Command, conf: str, variables: dict[str, str]
) -> None:
    """The doctor asks API, file server and web UI by the run's own calls."""
    set_up(machine, places, conf, variables)
    shutil.copy(places["ca"], machine.home)
    done = machine.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_proxy_that_knows_more_names_is_named_by_the_doctor(machine: Machine, places: dict[str, str]) -> None:
    set_up(machine, places, "$by_proxy", PLUG)
    done = machine.run(*SERVER)
    assert done.returncode == 0, done.stdout
    assert re.search(f"ok +server: address .*clearml.invalid.*through the proxy http://{places['plug']}", done.stdout)


UNTRUSTED, MISSING = "certificate not trusted", r"certificate file missing \(.*/no/such.pem"
LOST = "asked through the proxy http://[*]{3}@127.0.0.1:[0-9]+: NO_PROXY=NAME.invalid goes without"
NOBODY = {"HTTP_PROXY": "http://me:p@ss-word@$nobody", "NO_PROXY": "127.0.0.1"}
KEYS = {"CLEARML_API_ACCESS_KEY": ClearMLServer.access_key, "CLEARML_API_SECRET_KEY": ClearMLServer.secret_key}
NO_WEB = {**KEYS, "CLEARML_API_HOST": "$api", "CLEARML_FILES_HOST": "$files"}
TARGET = 'sdk.development.default_output_uri: "/no/such/folder"'
ORIGIN = r"no storage at /no/such/folder: .*mkdir -p /no/such.* \[sdk.development.default_output_uri, ~/clearml.conf\]"
TO_STORE = ("--output-uri", "$uri")


Wrong = tuple[Command, str, dict[str, str], str]
WRONG: list[Wrong] = [
    (SCRIPT, "$secure", BUNDLE, f"{UNTRUSTED}.*api.verify_certificate"),  # the SDK alone would ask for ever
    (SERVER, '$secure api.verify_certificate: "/no/such.pem"', BUNDLE, f"{MISSING}.*api.verify_certificate"),
    (SCRIPT, "$unknown", NOBODY, f"{LOST.replace('NAME', 'clearml')}.*--offline"),
    (CLEANUP, "$unknown", NOBODY, f"{LOST.replace('NAME', 'clearml')}((?!--offline).)*$"),  # it has no such option
    ((*SCRIPT, *TO_STORE), "$server $store", NOBODY, LOST.replace("NAME", "store")),
    ((*STORAGE, *TO_STORE), "$server $store", NOBODY, LOST.replace("NAME", "store")),
    *((each, "$no_get", {}, "411.*CLEARML_API_DEFAULT_REQ_METHOD=PUT") for each in (SCRIPT, CLEANUP, SERVER)),
    (SCRIPT, "sdk {}", NO_WEB, r"no address of the web UI: set api.web_server \(CLEARML_WEB_HOST\)"),
    (SERVER, "sdk {}", NO_WEB, r"no address of the web UI: set api.web_server \(CLEARML_WEB_HOST\)"),
    (SCRIPT, "api: 5", {}, "clearml.conf: api is no section"),  # it parses, and is no reason for an offline run
    (CLEANUP, 'sdk: "hello"', {}, "clearml.conf: sdk is no section"),
    (STORAGE, "api: [1]", {}, "clearml.conf: api is no section"),
    (SCRIPT, f"$server {TARGET}", {}, ORIGIN),
    ((*SCRIPT, "--offline", *TO_STORE), "sdk.aws: 3", {}, "the SDK cannot use sdk.aws.s3.credentials"),
    ((*STORAGE, *TO_STORE), 'sdk.aws.s3.credentials: ["x"]', {}, "the SDK cannot use sdk.aws.s3.credentials"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named_in_one_line(
    machine: Machine, servers: list[ClearMLServer], places: dict[str, str], wrong: Wrong
) -> None:
    command, conf, variables, words = wrong
    set_up(machine, places, conf, variables)
    before = sum(len(server.tasks) for server in servers)
    done = machine.run(*(Template(word).substitute(places) for word in command))
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if re.search("^failed|: error: ", line)]
    assert re.search(words, lines[0]), lines
    assert len(lines) == 1 or command[:2] == DOCTOR
    assert "ss-word" not in done.stdout + done.stderr
    made = sum(len(server.tasks) for server in servers) - before
    assert made == (command[0] == SCRIPT[0] and "$server" in conf)  # what is wrong with a store is the task's failure


def test_an_offline_run_asks_nobody(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        machine.variables |= dict.fromkeys(PROXIES, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        machine.variables |= {"no_proxy": "", "NO_PROXY": ""}
        assert machine.run(*SCRIPT, "--offline").returncode == 0
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


# --- files and folders ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [ {b: 1}\napi {c: {d: 1} }\n", 1),
        ("a {\n b: [1, 2\n}\n", 2),
        ('a: "}" # ]\nb: 1\n}\n', 3),
        ('a: "[{" // {\nb {"x": """[\n["""}\n', None),
    ],
)
def test_the_line_of_a_bracket_without_its_other_half(tmp_path: Path, text: str, line: int | None) -> None:
    (tmp_path / "clearml.conf").write_text(text)
    assert configuration.bad_bracket(tmp_path / "clearml.conf") == line


@pytest.mark.parametrize(("uri", "folder"), [("models", "models"), ("~/tilde", "tilde")])
def test_a_folder_by_any_name(machine: Machine, uri: str, folder: str) -> None:
    (machine.home / "models").mkdir()
    done = machine.run(*SCRIPT, "--offline", "--output-uri", uri)
    assert done.returncode == 0, done.stderr
    stored = re.search("Stored: file://(.*)", done.stdout)
    assert stored
    assert Path(stored[1]).resolve().is_relative_to(machine.home / folder)
    assert Path(stored[1]).read_bytes() == machine.outputs("model.pt").read_bytes()
    assert {path.name for path in machine.home.iterdir()} == {"models", ".clearml", "outputs", folder}


@pytest.mark.parametrize("word", ["undefined", "null", "my-bucket"])
def test_a_word_is_no_folder_that_is_made(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    monkeypatch.chdir(machine.home)
    monkeypatch.setenv("CLEARML_OUTPUT_URI", word)
    monkeypatch.setattr(sys, "argv", ["pytorch_mnist.py"])
    with pytest.raises(SystemExit, match=r"^2$"):
        pytorch_mnist.parse_args()
    assert f"no folder {word} here" in capsys.readouterr().err.splitlines()[-1]


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
def wait_for(words: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert any(words in line for line in process.stdout), process.communicate()


def test_the_command_to_go_on_starts_from_anywhere(machine: Machine, tmp_path: Path) -> None:
    """Data and checkpoint were named from the folder in which the run began."""
    (machine.home / "data").symlink_to(mnist(600, 200))
    stopped = machine.start("pytorch_mnist.py", "--data-dir", "data", *FEW, "--epochs", 1000)
    wait_for("epoch 1/", stopped)
    stopped.terminate()
    found = re.search("to go on: (.*)", stopped.communicate()[1])
    assert found
    uv, command, project, root, script, *options = shlex.split(found[1])
    assert (uv, command, project, root) == ("uv", "run", "--project", str(ROOT))
    resumed = machine.start(script, *options, cwd=tmp_path)
    wait_for("resumed after epoch ", resumed)
    resumed.kill()
    resumed.communicate()


def test_a_script_from_standard_input_has_no_command_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SCRIPT", Path("-"))
    ending = run.Ending()
    ending.checkpoint = Path("outputs/x/checkpoint.pt")
    assert ending.saved() == "; saved: outputs/x/checkpoint.pt"


def test_with_stderr_closed_the_line_is_on_stdout(machine: Machine) -> None:
    command = shlex.join([sys.executable, f"{ROOT}/pytorch_mnist.py", "--resume", "none.pt"])
    shell = ["bash", "-c", f"{command} 2>&-"]
    done = subprocess.run(shell, cwd=machine.home, env=machine.environment, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert ": error: " in line


def test_in_a_notebook_the_kernel_goes_on(machine: Machine, stand_in: ClearMLServer) -> None:
    machine.configure(stand_in.configuration())
    script = shlex.join([str(ROOT / SCRIPT[0]), *map(str, SCRIPT[1:])])
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
    assert arguments.label("Übung 👩‍💻") == "Übung 👩‍💻"


def test_a_password_with_an_at_sign_is_hidden() -> None:
    assert faults.hide("http://me:p@ss@host/a@b") == "http://***@host/a@b"


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
        (TimeoutError("127.0.0.1:42999: timed out"), "time-out"),  # ports are no statuses
        (TimeoutError("127.0.0.1:40300: timed out"), "time-out"),
        (TimeoutError("127.0.0.1:50112: timed out"), "time-out"),
    ],
)
def test_what_a_store_says_is_understood(error: Exception, words: str) -> None:
    assert faults.diagnose(error).words == words


@pytest.mark.parametrize(
    ("profile", "arguments", "words"),
    [
        (None, {"endpoint_url": "http://my_store:9000"}, "no valid host name"),
        (None, {"region_name": "eu west"}, "wrong region"),
        ("nonesuch", {}, "unknown profile"),
    ],
)
def test_what_boto3_refuses_is_understood(profile: str | None, arguments: dict[str, str], words: str) -> None:
    with pytest.raises((botocore.exceptions.BotoCoreError, ValueError)) as error:
        boto3.Session(profile_name=profile).client("s3", **arguments).list_buckets()  # type: ignore[call-overload]
    assert faults.diagnose(error.value).words == words


# --- threads ----------------------------------------------------------------------------------------------------------
CGROUPS: dict[str, tuple[str, dict[str, str], int]] = {
    "none": ("0::/\n", {}, 0),
    "no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, 0),
    "a container": ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    "a slice above": ("0::/job/step\n", {"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, 3),
    "version 1": ("3:cpuset:/\n2:cpu,cpuacct:/docker/1\n", {"cpu,cpuacct/cpu.cfs_quota_us": "400000\n"}, 4),
    "version 1, no limit": ("2:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n"}, 0),
}


@pytest.mark.parametrize("kind", CGROUPS)
def test_the_cpus_that_a_container_allows(tmp_path: Path, kind: str) -> None:
    groups, files, count = CGROUPS[kind]
    for name, content in {"cpu,cpuacct/cpu.cfs_period_us": "100000\n", **files}.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    assert clearml_client.cpu_quota(tmp_path) == count
    assert clearml_client.cpu_quota(tmp_path / "no Linux") == 0


@pytest.mark.parametrize(
    ("given", "quota", "expected"),
    [
        ({}, 0, {"GOMP_SPINCOUNT": "30000"}),
        ({}, 1, {"GOMP_SPINCOUNT": "30000", "OMP_NUM_THREADS": "1"}),
        ({}, 1000, {"GOMP_SPINCOUNT": "30000"}),
        (
            {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"},
            1,
            {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"},
        ),
        ({"GOMP_SPINCOUNT": "7"}, 0, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_threads_are_set_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], quota: int, expected: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", {"PYTHON_DOTENV_DISABLED": "1", **given})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(clearml_client, "cpu_quota", lambda: quota)
    clearml_client.load_dotenv()
    assert {name: value for name, value in os.environ.items() if "OMP_" in name} == expected
