"""Set-ups as people have them: what exists and cannot be used is named, with file and cure, and without its secrets.

Script, doctor and clean-up say the same, and `--offline` helps against whatever is wrong with clearml.conf.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine
from stores import Rclone, free_port

from clearml_client import faults

TOKEN = "a-token/that+nobody may see"
BRACKET = """sdk.aws.s3.credentials: [ { host: "store:9000", key: "KEYKEYKEY", secret: "%s", secure: false }
api { api_server: "http://127.0.0.1:1", credentials { access_key: "AKAKAKAK", secret_key: "%s" } }
"""


def secret_file(text: str, encoding: str = "utf-8") -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text.replace("%s", ClearMLServer.secret_key).encode(encoding))


GOOD = 'api { api_server: "http://127.0.0.1:1", credentials { access_key: "ÄÖÜ", secret_key: "%s" } }\n'
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bracket forgotten": (secret_file(BRACKET), "syntax error"),
    "a quote forgotten": (secret_file('api { api_server: "http://h:1\n}\n' + GOOD), "syntax error"),
    "UTF-16": (secret_file(GOOD, "utf-16"), "byte order mark"),
    "a byte order mark": (secret_file(GOOD, "utf-8-sig"), "byte order mark"),
    "Latin-1": (secret_file(GOOD, "latin-1"), "is no text in UTF-8"),
    "a variable that is set nowhere": (secret_file("a: ${NO_SUCH_VARIABLE}\n" + GOOD), "set nowhere?"),
    "a folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "empty": (lambda path: path.touch(), "says nothing"),
    "only a comment": (lambda path: path.write_text("# nothing yet\n\n"), "says nothing"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_clearml_conf_that_cannot_be_used_is_named(machine: Machine, kind: str) -> None:
    make, words = BROKEN[kind]
    path = machine.home / "clearml.conf"
    make(path)
    script = machine.train("--dry-run")
    cleanup = machine.run("-m", "clearml_client.cleanup", "--project-name", "any")
    for done in (script, cleanup):
        (line,) = done.stderr.splitlines()
        assert (done.returncode, str(path) in line, words in line) == (1, True, True), line
        assert "offline session" not in done.stdout
    doctor = machine.run("-m", "clearml_client.doctor", "--only", "configuration")
    assert doctor.returncode == 1
    (failed,) = [line for line in doctor.stdout.splitlines() if line.startswith("failed")]
    assert words in failed
    offline = machine.train("--dry-run", "--offline")
    assert offline.returncode == 0, offline.stderr
    assert f"ClearML: without clearml.conf, because {path}" in offline.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# fine\nCLEARML_OUTPUT_URI: /tmp/x\n", "line 2: not understood"),
        (b"set CLEARML_OUTPUT_URI=/tmp/x\n", "line 1: not understood"),
        ("CLEARML_OUTPUT_URI=/tmp/ü\n".encode("latin-1"), "is no text file in UTF-8"),
        ("CLEARML_OUTPUT_URI=/tmp/x\n".encode("utf-16"), "is no text file in UTF-8"),
    ],
    ids=["a colon", "set", "Latin-1", "UTF-16"],
)
def test_an_env_file_that_is_not_understood_is_named(
    machine: Machine, tmp_path: Path, content: bytes, words: str
) -> None:
    shutil.copytree(ROOT / "clearml_client", tmp_path / "clearml_client")
    script = shutil.copy(ROOT / "pytorch_mnist.py", tmp_path)
    (tmp_path / ".env").write_bytes(content)
    machine.variables["PYTHON_DOTENV_DISABLED"] = "0"
    done = machine.run(script, "--dry-run")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, f"{tmp_path}/.env" in line, words in line) == (1, True, True), line


def test_an_env_file_with_a_byte_order_mark_works(machine: Machine, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "clearml_client", tmp_path / "clearml_client")
    script = shutil.copy(ROOT / "pytorch_mnist.py", tmp_path)
    (tmp_path / ".env").write_text(f"CLEARML_OUTPUT_URI={tmp_path}/models\n", encoding="utf-8-sig")
    machine.variables["PYTHON_DOTENV_DISABLED"] = "0"
    done = machine.run(script, "--dry-run", "--data-dir", ROOT / "data")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "models").rglob("model.pt"))


def test_blanks_and_quotes_around_variables_do_not_count(machine: Machine, stand_in: ClearMLServer) -> None:
    keys = {"CLEARML_API_ACCESS_KEY": f"{stand_in.access_key}\n", "CLEARML_API_SECRET_KEY": f'"{stand_in.secret_key}"'}
    hosts = {"CLEARML_API_HOST": f" {stand_in.api_url} ", "CLEARML_FILES_HOST": stand_in.files_url}
    done = machine.train("--dry-run", **keys, **hosts, CLEARML_WEB_HOST=stand_in.web_url)
    assert done.returncode == 0, done.stderr
    assert "offline session" not in done.stdout


def test_a_secret_is_hidden_in_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", f"{TOKEN}\n")
    monkeypatch.setenv("CLEARML_API_ACCESS_KEY", "AKIA0123456789ABCD")
    for text in (
        TOKEN,
        repr(f"{TOKEN}\n"),
        f"Invalid header value b'{TOKEN}\\n'",
        "a-token%2Fthat%2Bnobody%20may%20see",
    ):
        assert "nobody" not in faults.hide(f"the store said {text}")
    assert faults.hide("key AKIA0123456789ABCD") == "key ...ABCD"
    assert faults.hide('near secret_key: "unknown-to-us", {') == 'near secret_key: "***", {'
    assert faults.hide("https://me:hunter2@host/x") == "https://***@host/x"


def test_a_home_that_cannot_be_written_has_a_cure(machine: Machine, tmp_path: Path) -> None:
    home = machine.variables["HOME"] = "/proc" if sys.platform == "linux" else "/dev"
    done = machine.train("--dry-run", "--output-dir", tmp_path / "out")
    assert done.returncode == 1
    assert f"cannot write ClearML's cache folder {home}" in done.stderr
    assert "CLEARML_CACHE_DIR" in done.stderr
    cured = machine.train("--dry-run", "--output-dir", tmp_path / "out", CLEARML_CACHE_DIR=str(tmp_path / "cache"))
    assert cured.returncode == 0, cured.stderr


def test_a_user_without_an_entry_and_without_home(machine: Machine, tmp_path: Path) -> None:
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("needs root, to be somebody else")
    user = ["setpriv", "--reuid=54321", "--clear-groups"]
    tmp_path.chmod(0o777)
    environment = {**machine.environment, "TMPDIR": str(tmp_path)}
    del environment["HOME"]
    command = [*user, sys.executable, "-m", "clearml_client.doctor", "--only", "configuration"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "Permission denied" in done.stderr and "python" in done.stderr:
        pytest.skip("others may not start this Python")
    assert "Traceback" not in done.stderr, done.stderr
    assert "CLEARML_CACHE_DIR" in done.stdout


def test_an_entry_that_differs_in_case_is_refused(machine: Machine, stand_in: ClearMLServer, rclone: Rclone) -> None:
    """The SDK takes it, and writes to another key than its own address says."""
    host = rclone.host.replace("127.0.0.1", "LOCALHOST")
    machine.configure(stand_in.configuration(), rclone.clearml_conf(host=host))
    uri = f"s3://{host.lower()}/{rclone.bucket}"
    done = machine.train("--dry-run", "--output-uri", uri)
    assert done.returncode == 1
    assert f"host {host!r} is taken for {host.lower()}: they differ in case" in done.stderr
    assert machine.train("--dry-run", "--output-uri", uri.replace("s3:", "S3:")).returncode == 2
    assert rclone.keys() == []


@pytest.mark.parametrize("files", ["undefined", "dead"])
def test_with_a_bucket_the_file_server_does_not_matter(
    machine: Machine, stand_in: ClearMLServer, rclone: Rclone, files: str
) -> None:
    url = {"undefined": "undefined", "dead": f"http://127.0.0.1:{free_port()}"}[files]
    machine.configure(stand_in.configuration().replace(stand_in.files_url, url), rclone.clearml_conf())
    uri = rclone.uri(f"files {files}")
    done = machine.train("--dry-run", "--output-uri", uri)
    assert done.returncode == 0, done.stderr
    assert len([key for key in rclone.keys() if key.startswith(f"files {files}/")]) == 3  # the picture is there, too
    without = machine.train("--dry-run")
    assert without.returncode == 1
    assert url in without.stderr
    assert not (machine.home / "undefined").exists()


@pytest.mark.parametrize("default", ["s3://127.0.0.1:1/dead", "true"])
def test_a_default_output_uri_does_not_keep_another_from_working(
    machine: Machine, stand_in: ClearMLServer, tmp_path: Path, default: str
) -> None:
    machine.configure(stand_in.configuration(), f'sdk.development.default_output_uri: "{default}"')
    done = machine.train("--dry-run", "--output-uri", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    alone = machine.train("--dry-run")
    assert alone.returncode == (0 if default == "true" else 1), alone.stderr
    assert ("no storage at s3://127.0.0.1:1/dead" in alone.stderr) == (default != "true")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(machine: Machine, closed: str) -> None:
    command = f"{sys.executable} {ROOT / 'pytorch_mnist.py'} --dry-run {closed}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=machine.home, env=machine.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert machine.outputs("model.pt").is_file()


def test_an_output_that_lacks_letters(machine: Machine) -> None:
    done = machine.train("--dry-run", "--task-name", "Übung 🚀", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    other = Machine(machine.home, {"PYTHONIOENCODING": "ascii"})
    doctor = other.run("-m", "clearml_client.doctor", "--only", "storage", "--output-uri", "/ü/ü")
    assert (doctor.returncode, "Traceback" in doctor.stderr) == (1, False)
    assert "failed" in doctor.stdout


def test_the_script_from_standard_input(machine: Machine, tmp_path: Path) -> None:
    with open(ROOT / "pytorch_mnist.py") as script:
        command = [sys.executable, "-", "--dry-run", "--output-dir", str(tmp_path / "out")]
        done = subprocess.run(command, stdin=script, cwd=ROOT, env=machine.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
