"""clearml.conf, .env and variables as people have them: what cannot be used is named, with its cure and no secret.

`--offline` helps against whatever is wrong with the files. What script, doctor and clean-up say is in faults.py.
"""

import os
import pwd
import re
import sys
from pathlib import Path

import pytest
from clearml_server import ClearMLServer
from conftest import Machine, copy_script

import clearml_client
from clearml_client import configuration, errors, sdk
from clearml_client.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pyparsing, by the SDK's own parser
TOKEN = "a-token/that+nobody may see"
SECRET = ClearMLServer.secret_key
GOOD = f'api {{ api_server: "http://127.0.0.1:1", credentials {{ access_key: "ÄÖÜ", secret_key: "{SECRET}" }} }}\n'
BRACKET = (
    f'sdk.aws.s3.credentials: [ {{ host: "store:9000", key: "KEYKEYKEY", secret: "{SECRET}", secure: false }}\n{GOOD}'
)
BROKEN: dict[str, tuple[bytes | None, str]] = {
    "a bracket forgotten": (BRACKET.encode(), "line 1: syntax error"),
    "a quote forgotten": (f'api {{ api_server: "http://h:1\n}}\n{GOOD}'.encode(), "syntax error"),
    "UTF-16": (GOOD.encode("utf-16"), "byte order mark"),
    "a byte order mark": (GOOD.encode("utf-8-sig"), "byte order mark"),
    "Latin-1": (GOOD.encode("latin-1"), "is no text in UTF-8"),
    "a variable that is set nowhere": (f"a: ${{NO_SUCH_VARIABLE}}\n{GOOD}".encode(), "set nowhere?"),
    "a folder": (None, "is a folder, not a file"),
    "empty": (b"", "says nothing"),
    "only a comment": (b"# nothing yet\n\n", "says nothing"),
    "a number": (b"api: 5", "api is no section"),  # these two parse, and are no reason for an offline run
    "a text": (b'sdk: "hello"', "sdk is no section"),
}


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine of which this process itself reads the configuration; afterwards nothing is left of it."""
    file = {"CLEARML_CONFIG_FILE": str(machine.home / "clearml.conf")}  # the SDK looked for HOME when it was imported
    monkeypatch.setattr(os, "environ", os.environ | file)
    monkeypatch.setattr(clearml_client, "DOTENV", machine.home / ".env")
    monkeypatch.setattr(clearml_client, "dotenv_problem", "")
    monkeypatch.setattr(sdk.config_obj, "_config", None)
    monkeypatch.setattr(errors, "hidden", dict(errors.hidden))
    return machine


@pytest.mark.parametrize("kind", BROKEN)
def test_a_clearml_conf_that_cannot_be_used_is_named_and_offline_nobody_needs_it(
    here: Machine, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    content, words = BROKEN[kind]
    path = here.home / "clearml.conf"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(RunError, match=re.escape(words)) as refusal:
        configuration.check()
    assert str(path) in str(refusal.value)
    sdk.forget_settings()
    configuration.check(offline=True)
    printed, errors = capsys.readouterr()
    assert f"ClearML: without clearml.conf, because {path}" in printed
    assert SECRET not in str(refusal.value) + printed + errors


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# fine\nCLEARML_OUTPUT_URI: /tmp/x\n", "line 2: not understood"),
        ("CLEARML_OUTPUT_URI=/tmp/ü\n".encode("latin-1"), "is no text file in UTF-8"),
        ("CLEARML_OUTPUT_URI=/tmp/x\n".encode("utf-16"), "is no text file in UTF-8"),
    ],
)
def test_an_env_file_that_is_not_understood_is_named(here: Machine, content: bytes, words: str) -> None:
    (here.home / ".env").write_bytes(content)
    clearml_client.prepare_environment()
    with pytest.raises(RunError, match=f"^{here.home}/.env.*{words}"):
        configuration.check()


def test_a_run_ends_with_that_line_and_offline_it_goes_without(machine: Machine, tmp_path: Path) -> None:
    """Without .env, and without a clearml.conf that is broken, too."""
    script, file = copy_script(tmp_path), tmp_path / ".env"
    file.write_text("CLEARML_OUTPUT_URI: /no/such/folder\n")
    machine.configure(BRACKET)
    refused = machine.run(script, "--dry-run")
    (line,) = refused.stderr.splitlines()
    assert (refused.returncode, f"error: {file}, line 1: not understood" in line) == (1, True), line
    done = machine.run(script, "--dry-run", "--offline")
    assert done.returncode == 0, done.stderr
    assert f"ClearML: {file}, line 1: not understood" in done.stdout
    assert f"ClearML: without clearml.conf, because {machine.home}/clearml.conf" in done.stdout


def test_blanks_and_quotes_around_variables_do_not_count(here: Machine) -> None:
    """And an empty one of AWS, as in a copied `.env`, is none: boto3 would look for a profile without a name."""
    (here.home / ".env").write_text("AWS_PROFILE=\n")
    given = {"CLEARML_API_HOST": " http://h:1 ", "CLEARML_API_ACCESS_KEY": "a key\n", "AWS_SESSION_TOKEN": '"a token"'}
    os.environ |= given
    clearml_client.prepare_environment()
    assert [os.environ[name] for name in given] == ["http://h:1", "a key", "a token"]
    assert "AWS_PROFILE" not in os.environ


def test_a_secret_is_hidden_in_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", f"{TOKEN}\n")
    monkeypatch.setenv("CLEARML_API_ACCESS_KEY", "AKIA0123456789ABCD")
    quoted = "a-token%2Fthat%2Bnobody%20may%20see"
    for text in (TOKEN, repr(f"{TOKEN}\n"), f"Invalid header value b'{TOKEN}\\n'", quoted):
        assert "nobody" not in errors.redact(f"the store said {text}")
    assert errors.redact("key AKIA0123456789ABCD") == "key ...ABCD"
    assert errors.redact('near secret_key: "unknown-to-us", {') == 'near secret_key: "***", {'
    assert errors.redact("https://me:hunter2@host/x") == "https://***@host/x"
    assert errors.redact("http://me:p@ss@host/a@b") == "http://***@host/a@b"


def test_a_home_that_cannot_be_written_has_a_cure(machine: Machine, tmp_path: Path) -> None:
    home = machine.variables["HOME"] = "/proc" if sys.platform == "linux" else "/dev"
    done = machine.train("--dry-run", "--output-dir", tmp_path / "out")
    assert done.returncode == 1
    assert f"cannot write ClearML's cache folder {home}" in done.stderr
    assert "CLEARML_CACHE_DIR" in done.stderr
    cured = machine.train("--dry-run", "--output-dir", tmp_path / "out", CLEARML_CACHE_DIR=str(tmp_path / "cache"))
    assert cured.returncode == 0, cured.stderr


def test_no_home_has_that_cure_too(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs by number: no variable, and no entry of the user."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", dict[int, str]().__getitem__)
    monkeypatch.chdir(here.home)
    with pytest.raises(RunError, match=r"no home folder.*CLEARML_CACHE_DIR"):
        configuration.check_cache()
    assert configuration.display_path("/a/path") == "/a/path"
    assert list(here.home.iterdir()) == []
