"""Set-ups as people have them: what exists and cannot be used is named, with file and cure, and without its secrets.

Script, doctor and clean-up say the same, and `--offline` helps against whatever is wrong with clearml.conf.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine
from stores import Rclone, free_port

import clearml_client
from clearml_client import configuration, faults, sdk
from clearml_client.faults import RunError

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


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine of which this process itself reads the configuration; afterwards nothing is left of it."""
    file = {"CLEARML_CONFIG_FILE": str(machine.home / "clearml.conf")}  # the SDK looked for HOME when it was imported
    monkeypatch.setattr(os, "environ", os.environ | file)
    monkeypatch.setattr(clearml_client, "DOTENV", machine.home / ".env")
    monkeypatch.setattr(clearml_client, "dotenv_problem", "")
    monkeypatch.setattr(sdk.config_obj, "_config", None)
    monkeypatch.setattr(faults, "hidden", dict(faults.hidden))
    return machine


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pyparsing, by the SDK's own parser
@pytest.mark.parametrize("kind", BROKEN)
def test_a_clearml_conf_that_cannot_be_used_is_named_and_offline_nobody_needs_it(
    here: Machine, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make, words = BROKEN[kind]
    path = here.home / "clearml.conf"
    make(path)
    with pytest.raises(RunError, match=re.escape(words)) as refusal:
        configuration.check()
    assert str(path) in str(refusal.value)
    sdk.forget_settings()
    configuration.check(offline=True)
    printed, errors = capsys.readouterr()
    assert f"ClearML: without clearml.conf, because {path}" in printed
    assert ClearMLServer.secret_key not in str(refusal.value) + printed + errors
    doctor = here.run("-m", "clearml_client.doctor", "--only", "configuration")
    assert doctor.returncode == 1
    (failed,) = [line for line in doctor.stdout.splitlines() if line.startswith("failed")]
    assert words in failed


def test_script_and_clean_up_end_with_that_line_and_an_offline_run_trains(machine: Machine) -> None:
    make, words = BROKEN["a bracket forgotten"]
    path = machine.home / "clearml.conf"
    make(path)
    for done in (machine.train("--dry-run"), machine.run("-m", "clearml_client.cleanup", "--project-name", "any")):
        (line,) = done.stderr.splitlines()
        assert (done.returncode, str(path) in line, words in line) == (1, True, True), line
        assert "offline session" not in done.stdout
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
def test_an_env_file_that_is_not_understood_is_named(here: Machine, content: bytes, words: str) -> None:
    (here.home / ".env").write_bytes(content)
    clearml_client.load_dotenv()
    with pytest.raises(RunError, match=f"^{here.home}/.env.*{words}"):
        configuration.check()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The script in a folder of its own, beside which a .env can stand."""
    shutil.copytree(ROOT / "clearml_client", tmp_path / "clearml_client")
    return Path(shutil.copy(ROOT / "pytorch_mnist.py", tmp_path))


def test_a_run_ends_with_that_line_and_offline_it_goes_without(machine: Machine, copied: Path) -> None:
    file = copied.with_name(".env")
    file.write_text("CLEARML_OUTPUT_URI: /no/such/folder\n")
    refused = machine.run(copied, "--dry-run")
    (line,) = refused.stderr.splitlines()
    assert (refused.returncode, f"error: {file}, line 1: not understood" in line) == (1, True), line
    done = machine.run(copied, "--dry-run", "--offline")
    assert done.returncode == 0, done.stderr
    assert f"ClearML: {file}, line 1: not understood" in done.stdout


def test_an_env_file_with_a_byte_order_mark_works(machine: Machine, copied: Path) -> None:
    models = copied.with_name("models")
    copied.with_name(".env").write_text(f"CLEARML_OUTPUT_URI={models}\n", encoding="utf-8-sig")
    machine.variables["PYTHON_DOTENV_DISABLED"] = "0"
    done = machine.run(copied, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert list(models.rglob("model.pt"))


def test_blanks_and_quotes_around_variables_do_not_count(machine: Machine, stand_in: ClearMLServer) -> None:
    keys = {"CLEARML_API_ACCESS_KEY": f"{stand_in.access_key}\n", "CLEARML_API_SECRET_KEY": f'"{stand_in.secret_key}"'}
    hosts = {"CLEARML_API_HOST": f" {stand_in.api_url} ", "CLEARML_FILES_HOST": stand_in.files_url}
    done = machine.train("--dry-run", **keys, **hosts, CLEARML_WEB_HOST=stand_in.web_url)
    assert done.returncode == 0, done.stderr
    assert "offline session" not in done.stdout


def test_an_aws_variable_that_is_empty_counts_as_unset(here: Machine) -> None:
    """As in a copied `.env`; boto3 would look for a profile without a name."""
    (here.home / ".env").write_text("AWS_PROFILE=\n")
    clearml_client.load_dotenv()
    assert "AWS_PROFILE" not in os.environ


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
    assert rclone.keys() == []


def test_with_a_bucket_the_file_server_does_not_matter(
    machine: Machine, stand_in: ClearMLServer, rclone: Rclone
) -> None:
    machine.configure(stand_in.configuration().replace(stand_in.files_url, "undefined"), rclone.clearml_conf())
    done = machine.train("--dry-run", "--output-uri", rclone.uri("without files"))
    assert done.returncode == 0, done.stderr
    assert len([key for key in rclone.keys() if key.startswith("without files/")]) == 3  # the picture is there, too
    assert not (machine.home / "undefined").exists()


@pytest.mark.parametrize("url", ["undefined", f"http://127.0.0.1:{free_port()}"], ids=["undefined", "dead"])
def test_without_a_bucket_the_file_server_is_needed(machine: Machine, stand_in: ClearMLServer, url: str) -> None:
    machine.configure(stand_in.configuration().replace(stand_in.files_url, url))
    done = machine.train("--dry-run")
    assert done.returncode == 1
    assert url in done.stderr
    assert not (machine.home / "undefined").exists()


def test_a_default_output_uri_counts_where_no_other_is_given(
    machine: Machine, stand_in: ClearMLServer, tmp_path: Path
) -> None:
    machine.configure(stand_in.configuration(), 'sdk.development.default_output_uri: "s3://127.0.0.1:1/dead"')
    done = machine.train("--dry-run", "--output-uri", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    alone = machine.train("--dry-run")
    assert alone.returncode == 1
    assert "no storage at s3://127.0.0.1:1/dead" in alone.stderr
    machine.configure(stand_in.configuration(), "sdk.development.default_output_uri: true")  # the file server
    assert machine.train("--dry-run").returncode == 0


def test_streams_that_are_closed(machine: Machine) -> None:
    """All of them. That with stderr alone closed the line is on stdout is in test_setups.py."""
    command = f"{sys.executable} {ROOT / 'pytorch_mnist.py'} --dry-run <&- >&- 2>&-"
    done = subprocess.run(
        ["sh", "-c", command], cwd=machine.home, env=machine.environment, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout + done.stderr == ""
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
