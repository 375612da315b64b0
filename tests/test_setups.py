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
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import botocore.exceptions
import certifi
import clearml_server
import pytest
import trustme
from clearml_server import ClearMLServer
from conftest import ROOT, Begin, Machine, Run
from flask import request
from stores import Plug, Rclone, free_port
from test_faults import BUSY
from werkzeug.serving import make_server

import clearml_client
from clearml_client import arguments, configuration, faults, run

CLEANUP = ("-m", "clearml_client.cleanup", "--project-name", "any")
DOCTOR = ("-m", "clearml_client.doctor")
DRY = ("--dry-run", "--data-dir", ROOT / "data")
NOTEBOOK = """
import builtins, io, sys, types

class Stream(io.TextIOBase):  # without reconfigure() and fileno(), as a notebook's
    encoding = "utf-8"
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        return self.stream.write(text)
    def flush(self):
        self.stream.flush()

sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
builtins.__IPYTHON__ = True
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: None
"""


def the_line(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line on stderr."""
    assert done.returncode == code, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def failed(machine: Machine, *arguments: object) -> str:
    """What the doctor calls failed."""
    done = machine.run(*DOCTOR, *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith("failed"))


# --- certificates -----------------------------------------------------------------------------------------------------
class Secure(NamedTuple):
    """A ClearML server, all three parts of it, over https, and the authority that its users do not know."""

    server: ClearMLServer
    ca: Path

    def configuration(self) -> str:
        return self.server.configuration().replace("http://", "https://")


@pytest.fixture(scope="module")
def secure(live: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    if live:
        pytest.skip("looks into the stand-in server")
    folder = tmp_path_factory.mktemp("secure")
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    stand_in = ClearMLServer(folder / "server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clearml_server, "make_server", partial(make_server, ssl_context=context))
        stand_in.start()
    yield Secure(stand_in, folder / "ca.pem")
    stand_in.stop()
    assert stand_in.unknown == []


TRUSTED: dict[str, tuple[str, dict[str, str]]] = {
    "not checked": ("api.verify_certificate: false", {}),
    "not checked, beside a bundle": ("api.verify_certificate: false", {"REQUESTS_CA_BUNDLE": certifi.where()}),
    "not checked, by variable": ("", {"CLEARML_API_HOST_VERIFY_CERT": '"false"', "CURL_CA_BUNDLE": certifi.where()}),
    "its authority": ('api.verify_certificate: "{ca}"', {}),
    "its authority, beside a bundle": ('api.verify_certificate: "{ca}"', {"REQUESTS_CA_BUNDLE": certifi.where()}),
    "its authority, in HOME": ('api.verify_certificate: "~/ca.pem"', {}),
    "its authority, in the bundle": ("", {"REQUESTS_CA_BUNDLE": "{ca}"}),
}


@pytest.mark.parametrize("how", TRUSTED)
def test_a_certificate_of_its_own_authority(secure: Secure, machine: Machine, how: str) -> None:
    conf, variables = TRUSTED[how]
    shutil.copy(secure.ca, machine.home)
    machine.configure(secure.configuration(), conf.format(ca=secure.ca))
    machine.variables |= {name: value.format(ca=secure.ca) for name, value in variables.items()}
    done = machine.run("pytorch_mnist.py", *DRY)
    assert done.returncode == 0, done.stderr
    assert re.search("Stored: https://.*/model.pt", done.stdout)
    assert machine.run(*DOCTOR, "--only", "server").returncode == 0
    done = machine.run(*CLEANUP)
    assert (done.returncode, done.stderr.endswith("error: no project 'any' on the server\n")) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("conf", "words"),
    [
        ("", "certificate not trusted"),
        ('api.verify_certificate: "/no/such.pem"', "certificate file missing (.*/no/such.pem"),
    ],
    ids=["of nobody", "a file that is missing"],
)
def test_a_certificate_that_is_not_trusted(secure: Secure, machine: Machine, conf: str, words: str) -> None:
    """Soon: the SDK alone would ask for ever."""
    machine.configure(secure.configuration(), conf)
    machine.variables["REQUESTS_CA_BUNDLE"] = certifi.where()
    for line in (
        the_line(machine.run("pytorch_mnist.py", *DRY, timeout=30 + BUSY)),
        the_line(machine.run(*CLEANUP, timeout=30 + BUSY)),
        failed(machine, "--only", "server"),
    ):
        assert re.search(words.replace("(", r"\("), line)
        assert "api.verify_certificate" in line
    assert not secure.server.tasks or all(task["status"] == "completed" for task in secure.server.tasks.values())


# --- proxies ----------------------------------------------------------------------------------------------------------
class Counter:
    """A port that closes each connection, and counts them."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://me:p@ss-word@127.0.0.1:{self.listener.getsockname()[1]}"
        self.count = 0
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                self.listener.accept()[0].close()
                self.count += 1


@pytest.fixture
def counter() -> Iterator[Counter]:
    made = Counter()
    yield made
    made.listener.close()


def test_a_proxy_that_does_not_answer_is_suspected(
    machine: Machine, stand_in: ClearMLServer, rclone: Rclone, counter: Counter
) -> None:
    name = "clearml.invalid"
    machine.configure(stand_in.configuration().replace("127.0.0.1", name))
    machine.variables["HTTP_PROXY"] = counter.url
    asked = f"asked through the proxy {counter.url.replace('me:p@ss-word', '***')}: NO_PROXY={name} goes without"
    script, cleanup = the_line(machine.run("pytorch_mnist.py", *DRY)), the_line(machine.run(*CLEANUP))
    for line in (script, cleanup, failed(machine, "--only", "server")):
        assert asked in line
        assert "ss-word" not in line
    assert "--offline" in script
    assert "--offline" not in cleanup  # which has no such option
    uri, host = (text.replace("127.0.0.1", "store.invalid") for text in (rclone.uri("x"), rclone.host))
    machine.configure(stand_in.configuration(), rclone.clearml_conf(host=host))
    machine.variables["NO_PROXY"] = "127.0.0.1"
    done = machine.run("pytorch_mnist.py", *DRY, "--output-uri", uri)
    line = done.stderr.splitlines()[-1]
    assert asked.replace(name, "store.invalid") in line, done.stderr
    assert asked.replace(name, "store.invalid") in failed(machine, "--only", "storage", "--output-uri", uri)


def test_a_proxy_may_know_names_that_this_machine_does_not(machine: Machine, stand_in: ClearMLServer) -> None:
    proxy = Plug(int(stand_in.api_url.rpartition(":")[2]))
    api = stand_in.api_url.replace("127.0.0.1", "clearml.invalid")
    machine.configure(stand_in.configuration().replace(stand_in.api_url, api))
    machine.variables |= {"HTTP_PROXY": f"http://{proxy.host}", "NO_PROXY": "127.0.0.1"}
    assert machine.run("pytorch_mnist.py", *DRY).returncode == 0
    done = machine.run(*DOCTOR, "--only", "server")
    assert done.returncode == 0, done.stdout
    assert f"{api}, through the proxy http://{proxy.host}" in done.stdout


def test_a_proxy_that_refuses_get_with_a_body(machine: Machine, tmp_path: Path) -> None:
    stand_in = ClearMLServer(tmp_path / "server")
    refuse: Callable[[], Any] = lambda: ("", 411) if request.method == "GET" and request.content_length else None  # noqa: E731
    stand_in._apps["api"].before_request(refuse)
    stand_in.start()
    try:
        machine.configure(stand_in.configuration())
        script = machine.run("pytorch_mnist.py", *DRY)
        lines = [the_line(script), the_line(machine.run(*CLEANUP)), failed(machine, "--only", "server")]
        for line in lines:
            assert "411" in line
            assert "CLEARML_API_DEFAULT_REQ_METHOD=PUT" in line
            assert "credentials" not in line
        machine.variables["CLEARML_API_DEFAULT_REQ_METHOD"] = "PUT"
        assert machine.run("pytorch_mnist.py", *DRY).returncode == 0
        assert machine.run(*DOCTOR, "--only", "server").returncode == 0
    finally:
        stand_in.stop()


def test_an_offline_run_asks_nobody(machine: Machine, counter: Counter) -> None:
    names = ("http_proxy", "https_proxy", "all_proxy")
    machine.variables |= dict.fromkeys((*names, *map(str.upper, names)), counter.url)
    machine.variables |= {"no_proxy": "", "NO_PROXY": ""}
    assert machine.run("pytorch_mnist.py", *DRY, "--offline").returncode == 0
    assert counter.count == 0


# --- what clearml.conf says -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", ["api: 5", 'sdk: "hello"', "api: [1]"])
def test_a_section_that_is_none(machine: Machine, content: str) -> None:
    """It parses, and is no reason for an offline run."""
    machine.configure(content)
    words = f"{machine.home}/clearml.conf: {content[:3]} is no section"
    assert words in the_line(machine.run("pytorch_mnist.py", *DRY))
    assert words in the_line(machine.run(*CLEANUP))
    assert words in failed(machine, "--only", "configuration")
    offline = machine.run("pytorch_mnist.py", *DRY, "--offline")
    assert offline.returncode == 0, offline.stderr
    assert words in offline.stdout


@pytest.mark.parametrize("content", ['sdk.aws.s3.credentials: "x"', 'sdk.aws.s3.credentials: ["x"]', "sdk.aws: 3"])
def test_a_list_of_entries_that_is_none(machine: Machine, content: str) -> None:
    machine.configure(content)
    words, uri = "the SDK cannot use sdk.aws.s3.credentials", ("--output-uri", "s3://127.0.0.1:1/bucket")
    assert words in the_line(machine.run("pytorch_mnist.py", *DRY, "--offline", *uri))
    assert words in failed(machine, "--only", "storage", *uri)


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


def test_a_server_without_an_address_of_its_web_ui(machine: Machine, stand_in: ClearMLServer) -> None:
    """The SDK guesses it where the API has port 8008, and fails where it has not: before there is a task."""
    keys = {"CLEARML_API_ACCESS_KEY": stand_in.access_key, "CLEARML_API_SECRET_KEY": stand_in.secret_key}
    machine.variables |= keys | {"CLEARML_API_HOST": stand_in.api_url, "CLEARML_FILES_HOST": stand_in.files_url}
    before = len(stand_in.tasks)
    for line in (the_line(machine.run("pytorch_mnist.py", *DRY)), failed(machine, "--only", "server")):
        assert "no address of the web UI: set api.web_server (CLEARML_WEB_HOST)" in line
    assert len(stand_in.tasks) == before


def test_a_file_server_that_the_run_does_not_use(machine: Machine, stand_in: ClearMLServer, tmp_path: Path) -> None:
    machine.configure(stand_in.configuration().replace(stand_in.files_url, f"http://127.0.0.1:{free_port()}"))
    done = machine.run(*DOCTOR, "--output-uri", tmp_path)
    assert done.returncode == 0, done.stdout
    assert re.search("warning .*file server .*this run stores nothing there", done.stdout)
    assert "file server" in failed(machine, "--only", "server")


def test_the_origin_of_a_target_is_named(machine: Machine, stand_in: ClearMLServer) -> None:
    machine.configure(stand_in.configuration(), 'sdk.development.default_output_uri: "/no/such/folder"')
    line = machine.run("pytorch_mnist.py", *DRY).stderr.splitlines()[-1]
    assert "no storage at /no/such/folder: " in line
    assert "mkdir -p /no/such" in line
    assert "[sdk.development.default_output_uri, ~/clearml.conf]" in line
    assert "/no/such/folder: " in failed(machine, "--only", "storage")


def test_an_env_file_that_is_not_understood_and_an_offline_run(machine: Machine, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "clearml_client", tmp_path / "clearml_client")
    script = shutil.copy(ROOT / "pytorch_mnist.py", tmp_path)
    (tmp_path / ".env").write_text("CLEARML_OUTPUT_URI: /no/such/folder\n")
    done = machine.run(script, *DRY, "--offline")
    assert done.returncode == 0, done.stderr
    assert f"ClearML: {tmp_path}/.env, line 1: not understood" in done.stdout


# --- folders ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("uri", "folder"), [("models", "models"), ("./new", "new"), ("~/tilde", "tilde"), ("models/..", "")]
)
def test_a_folder_by_any_name(machine: Machine, uri: str, folder: str) -> None:
    (machine.home / "models").mkdir()
    done = machine.run("pytorch_mnist.py", *DRY, "--offline", "--output-uri", uri)
    assert done.returncode == 0, done.stderr
    stored = re.search("Stored: file://(.*)", done.stdout)
    assert stored
    assert Path(stored[1]).resolve().is_relative_to(machine.home / folder)
    assert Path(stored[1]).read_bytes() == machine.outputs("model.pt").read_bytes()
    known = {"models", ".clearml", "outputs", "mnist-training-poc", folder or "models"}
    assert {path.name for path in machine.home.iterdir()} <= known


@pytest.mark.parametrize("word", ["undefined", "null", "my-bucket"])
def test_a_word_is_no_folder_that_is_made(machine: Machine, word: str) -> None:
    machine.variables["CLEARML_OUTPUT_URI"] = word
    done = machine.run("pytorch_mnist.py", *DRY, "--offline")
    assert done.returncode == 2
    assert f"no folder {word} here" in done.stderr.splitlines()[-1]
    assert f"no folder {word} here" in failed(machine, "--only", "storage")
    assert not (machine.home / word).exists()


@pytest.mark.skipif(not shutil.which("setpriv") or os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_home_of_another_user(machine: Machine, tmp_path: Path) -> None:
    """As in a container that runs by number, with HOME=/root."""
    machine.home.chmod(0o700)
    environment = {**machine.environment, "PYTHONPATH": str(ROOT)}
    user = ["setpriv", "--reuid=54321", "--clear-groups", sys.executable]
    for command in (DOCTOR, CLEANUP):
        done = subprocess.run([*user, *command], cwd="/", env=environment, capture_output=True, text=True)
        text = done.stdout + done.stderr
        assert done.returncode == 1, text
        assert f"{machine.home}/clearml.conf cannot be looked for: Permission denied" in text
        assert "Traceback" not in text


# --- going on, streams, notebooks -------------------------------------------------------------------------------------
def test_the_command_to_go_on_starts_from_anywhere(
    begin: Begin,
    machine: Machine,
    few: list[object],
    tmp_path: Path,
) -> None:
    """Data and checkpoint were named from the folder in which the run began."""
    (machine.home / "data").symlink_to(str(few[1]))
    stopped = begin("--data-dir", "data", *few[2:], "--epochs", 1000)
    stopped.wait_for("epoch 1/")
    stopped.process.terminate()
    assert stopped.end() == 143
    found = re.search("to go on: (.*)", stopped.line)
    assert found
    uv, command, project, root, script, *options = shlex.split(found[1])
    assert (uv, command, project, root) == ("uv", "run", "--project", str(ROOT))
    resumed = Run(machine.start(script, *options, cwd=tmp_path))
    try:
        resumed.wait_for("epoch 3/")
        assert "resumed after epoch " in resumed.stdout
    finally:
        resumed.process.kill()


def test_a_script_from_standard_input_has_no_command_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SCRIPT", Path("-"))
    ending = run.Ending()
    ending.checkpoint = Path("outputs/x/checkpoint.pt")
    assert ending.saved() == "; saved: outputs/x/checkpoint.pt"


@pytest.mark.parametrize("command", [("pytorch_mnist.py", "--resume", "none.pt"), CLEANUP], ids=["script", "cleanup"])
def test_with_stderr_closed_the_line_is_on_stdout(machine: Machine, command: tuple[str, ...]) -> None:
    words = [sys.executable, *(part.replace("pytorch", f"{ROOT}/pytorch") for part in command)]
    environment = {**machine.environment, "PYTHONPATH": str(ROOT)}
    shell = ["bash", "-c", f"{shlex.join(words)} 2>&-"]
    done = subprocess.run(shell, cwd=machine.home, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert ": error: " in line


def test_in_a_notebook(machine: Machine, stand_in: ClearMLServer, tmp_path: Path) -> None:
    """As far as it can be told without Jupyter: its %run."""
    machine.configure(stand_in.configuration())
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    for command, code in (
        (("pytorch_mnist.py", *DRY), 0),
        (("pytorch_mnist.py", "--resume", "none.pt"), 1),
        (DOCTOR, 0),
        (CLEANUP, 2),
    ):
        done = machine.run(*command, prelude=tmp_path / "notebook.py")
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr


def test_a_notebook_is_not_ended_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "in_notebook", lambda: True)
    ending = run.Ending()
    ending.tell("a failure", 1, seconds=1e6)
    last_resort = ending.last_resort
    assert last_resort
    with pytest.raises(SystemExit):
        ending.leave(1)
    last_resort.join(10)
    assert not last_resort.is_alive()
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


TROUBLES: dict[str, Exception] = {
    "expired key": aws("ExpiredToken", "The provided token has expired."),
    "session token not accepted": aws("InvalidToken", "The provided token is malformed or otherwise invalid."),
    "wrong region": aws("AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong; expecting 'eu-west-1'"),
    "checksum not understood": aws("NotImplemented", "A header you provided implies functionality", 501),
    "no valid host name": ValueError("Invalid endpoint: http://my_store:9000"),
    "too many requests": aws("SlowDown", "Please reduce your request rate.", 503),
    "unknown profile": botocore.exceptions.ProfileNotFound(profile="mnist"),
}
OTHERS = {
    aws("InvalidArgument", "STREAMING-UNSIGNED-PAYLOAD-TRAILER is not supported"): "checksum not understood",
    botocore.exceptions.InvalidRegionError(region_name="eu west 1"): "wrong region",
    botocore.exceptions.HTTPClientError(
        error=ValueError("Invalid header value b'a\\n'")
    ): "a line break or blank in a key",
}


@pytest.mark.parametrize(("error", "words"), [*((e, w) for w, e in TROUBLES.items()), *OTHERS.items()])
def test_what_stores_say_is_understood(error: Exception, words: str) -> None:
    assert faults.diagnose(error).words == words


@pytest.mark.parametrize("port", [42999, 40300, 50112, 50312])
def test_a_port_is_no_status(port: int) -> None:
    assert faults.diagnose(TimeoutError(f"127.0.0.1:{port}: timed out")).words == "time-out"


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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="other systems have no affinity")
def test_the_number_of_threads_follows_the_affinity(machine: Machine) -> None:
    code = "import clearml_client; clearml_client.load_dotenv(); import torch; print(torch.get_num_threads())"
    environment = {**machine.environment, "PYTHONPATH": str(ROOT)}
    del environment["OMP_NUM_THREADS"]
    command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); {code}"]
    done = subprocess.run(command, cwd=machine.home, env=environment, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
