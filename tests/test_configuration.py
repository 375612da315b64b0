"""clearml.conf, .env and variables as people have them: what cannot be used is named, with its cure and no secret.

`--offline` helps against whatever is wrong with the files. What a run says of it is in test_faults.py, too.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from clearml_server import ClearMLServer
from conftest import Machine, copy_script

import clearml_client
from clearml_client import configuration, errors, sdk
from clearml_client.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pyparsing, by the SDK's own parser
TOKEN = "a-token/that+nobody may see"
PROCESS = "error when retrieving credentials from custom-process: "
SECRET = ClearMLServer.secret_key
GOOD = f'api {{ api_server: "http://127.0.0.1:1", credentials {{ access_key: "ÄÖÜ", secret_key: "{SECRET}" }} }}\n'
UNCLOSED = "# {\n" + GOOD.replace("} }", "}  # } closes nothing") + "sdk.aws.s3.credentials: [\n  {}\n]  // {\n"
BRACKET = f'sdk.aws.s3.credentials: [ {{ host: "store:9000", secret: "{SECRET}" }}\n{GOOD}'
BY_UV = "uv = 0.13.9\n"  # in pyvenv.cfg
CONF, ENV = "clearml.conf", ".env"
BROKEN: dict[str, tuple[str, bytes | Callable[[Path], None], str]] = {
    "a bracket forgotten": (CONF, BRACKET.encode(), "line 2: syntax error"),  # where the parser finds it
    "a brace forgotten": (CONF, UNCLOSED.encode(), "line 2: syntax error (ConfigurationError); the bracket"),
    "a quote forgotten": (CONF, f'{GOOD}sdk {{ a: "b }}'.encode(), "line 2: syntax error (ConfigurationError); corr"),
    "a byte order mark": (CONF, GOOD.encode("utf-8-sig"), "byte order mark"),
    "Latin-1": (CONF, GOOD.encode("latin-1"), "is no text in UTF-8"),
    "a variable that is set nowhere": (CONF, f"a: ${{NO_SUCH}}\n{GOOD}".encode(), "is ${NO_SUCH} set nowhere?"),
    "an included file that is missing": (
        CONF,
        f'include "other.conf"\n{GOOD}'.encode(),
        "other.conf. File does not",
    ),
    "a folder": (CONF, Path.mkdir, "is no file, but a folder"),
    "a pipe": (CONF, os.mkfifo, "is no file, but a folder, a pipe"),  # as of <(command): a look would empty it, or wait
    # As the HOME of another user, in a container that runs by number:
    "what cannot be read": (CONF, lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic"),
    "empty": (CONF, b"", "sets nothing"),
    "only comments": (CONF, b"# nothing yet\n\n  // as before\n", "sets nothing"),
    "a number": (CONF, b"api: 5", "api is no section"),  # which parses, and is no reason for an offline run
    "a line that sets nothing": (ENV, b"# fine\nCLEARML_OUTPUT_URI: /tmp/x\n", "line 2: not understood"),
    "a name alone": (ENV, b"CLEARML_OUTPUT_URI\n", "line 1: not understood"),
    "a variable misspelt": (ENV, b"A=1\n\n\n CLEARML_OUTPUT_URL=x", "line 4: there is no CLEARML_OUTPUT_URL; write C"),
    "a variable without its prefix": (ENV, b"OUTPUT_URI=x", "there is no OUTPUT_URI; write CLEARML_OUTPUT_URI"),
    "a variable in lower case": (ENV, b"clearml_output_uri=x", "there is no clearml_output_uri; write CLEARML_OUTPUT"),
    "a variable of Google's": (ENV, b"GOOGLE_APPLICATION_CREDENTIAL=x", "write GOOGLE_APPLICATION_CREDENTIALS"),
    "variables in Latin-1": (ENV, "CLEARML_OUTPUT_URI=/tmp/ü\n".encode("latin-1"), "is no text file in UTF-8"),
    "variables in UTF-16": (ENV, "CLEARML_OUTPUT_URI=/tmp/x\n".encode("utf-16"), "is no text file in UTF-8"),
}


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine of which this process itself reads the configuration; afterwards nothing is left of it."""
    file = {"CLEARML_CONFIG_FILE": str(machine.home / "clearml.conf")}  # the SDK looked for HOME when it was imported
    monkeypatch.setattr(os, "environ", os.environ | file)
    monkeypatch.setattr(clearml_client, "DOTENV", machine.home / ".env")
    monkeypatch.setattr(clearml_client, "dotenv_problem", None)
    monkeypatch.setattr(sdk.config_obj, "_config", None)
    monkeypatch.setattr(errors, "hidden", dict(errors.hidden))
    return machine


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_used_is_named_and_offline_nobody_needs_it(
    here: Machine, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    name, content, words = BROKEN[kind]
    path = here.home / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    clearml_client.prepare_environment()
    with pytest.raises(RunError) as refusal:
        configuration.check()
    said = refusal.value.message()
    assert words in said
    assert str(path) in said
    sdk.forget_settings()
    configuration.check(offline=True)
    printed, errors = capsys.readouterr()
    assert re.match(f"ClearML: without (clearml.conf|.env), because {path}", printed)
    assert SECRET not in said + printed + errors


MISSPELT = {
    "apii {}": "apii; write api",
    "API { api_server: x }": "API; write api",
    GOOD.replace("api_server", "api_sever"): "api_sever; write api_server",
    GOOD.replace("access_key", "acces_key"): "acces_key; write access_key",
    'api_server: "http://127.0.0.1:1"': "api_server; write it inside api { }",
}


@pytest.mark.parametrize(("text", "words"), MISSPELT.items())
def test_a_misspelt_name_is_no_offline_run_in_silence(here: Machine, text: str, words: str) -> None:
    """And beside the right one it is nobody's business."""
    (here.home / "clearml.conf").write_text(text)
    configuration.check()
    with pytest.raises(RunError) as refusal:
        configuration.why_offline()
    assert refusal.value.message().endswith(f"clearml.conf: there is no setting {words}")
    (here.home / "clearml.conf").write_text(f"{text}\n{GOOD}\napi2 {{}}")
    sdk.forget_settings()
    configuration.check()
    assert configuration.why_offline() == ""


@pytest.mark.parametrize(("wrong", "right"), [("file_server", "files_server"), ("webserver", "web_server")])
def test_a_misspelt_name_is_named_where_the_server_is_found_without_it(here: Machine, wrong: str, right: str) -> None:
    """The SDK would guess the address."""
    (here.home / "clearml.conf").write_text(f"{GOOD}api.{wrong}: x")
    configuration.check()
    with pytest.raises(RunError, match=f"there is no setting {wrong}") as refusal:
        configuration.why_offline()
    assert refusal.value.cure == f"write {right}"
    (here.home / "clearml.conf").write_text(f"{GOOD}api.{wrong}: x\napi.{right}: x")
    sdk.forget_settings()
    configuration.check()
    assert configuration.why_offline() == ""


def test_a_warning_that_became_an_error_is_named(here: Machine) -> None:
    """As with PYTHONWARNINGS=error; clearml.conf is well."""
    (here.home / "clearml.conf").write_text(GOOD)
    warnings.simplefilter("error")
    with pytest.raises(RunError, match=r"^a warning .* made an error: \w+DeprecationWarning: '\w+' deprecated"):
        configuration.check()


def test_a_run_ends_with_that_line_and_offline_it_goes_without(machine: Machine, tmp_path: Path) -> None:
    """Without .env, and without a clearml.conf that is broken, too."""
    script, file = copy_script(tmp_path), tmp_path / ".env"
    file.write_text("CLEARML_OUTPUT_URI: /no/such/folder\n")
    machine.configure(BRACKET)
    refused, done = machine.run(script, "--dry-run", code=1), machine.run(script, "--dry-run", "--offline")
    assert f"error: {file}, line 1: not understood" in refused.line
    assert f"ClearML: without .env, because {file}, line 1: not understood" in done.stdout
    assert f"ClearML: without clearml.conf, because {machine.home}/clearml.conf" in done.stdout


def test_blanks_and_quotes_around_variables_do_not_count(here: Machine) -> None:
    """And an empty one of AWS, as in a copied `.env`, is none: boto3 would look for a profile without a name."""
    (here.home / ".env").write_text("AWS_PROFILE=\nAWS_ENDPOINT_URL=x\nAWS_ENDPOINT_URL_2=y\n")
    given = {"CLEARML_API_HOST": " http://h:1 ", "CLEARML_API_ACCESS_KEY": "a key\n", "AWS_SESSION_TOKEN": '"a token"'}
    os.environ |= given
    clearml_client.prepare_environment()
    assert [os.environ[name] for name in given] == ["http://h:1", "a key", "a token"]
    assert "AWS_PROFILE" not in os.environ
    assert os.environ["AWS_ENDPOINT_URL_2"] == "y"  # beside the right one it is no slip


def test_what_the_files_say_holds_for_all_parts(here: Machine) -> None:
    """A key for all buckets; and boto3 has the certificates which requests would prefer to the setting."""
    (here.home / "clearml.conf").write_text(f'{GOOD}sdk.aws.s3.key: "k"\napi.verify_certificate: false')
    os.environ["REQUESTS_CA_BUNDLE"] = "ca.pem"
    configuration.check()
    assert not sdk.setting("sdk.aws.s3.use_credentials_chain", False)
    assert os.environ["AWS_CA_BUNDLE"] == "ca.pem"


OLD = {"TRAINS_API_HOST": "http://h:1", "TRAINS_API_ACCESS_KEY": "a key", "TRAINS_API_SECRET_KEY": "a secret"}
BY_TOKEN = {"CLEARML_API_HOST": "http://h:1", "CLEARML_AUTH_TOKEN": "a token"}


@pytest.mark.parametrize(
    ("variables", "credentials"),
    [(OLD, "TRAINS_API_ACCESS_KEY, .*; TRAINS_API_SECRET_KEY, "), (BY_TOKEN, "CLEARML_AUTH_TOKEN, ")],
)
def test_the_variable_that_the_sdk_uses_is_used_and_named(
    here: Machine, variables: dict[str, str], credentials: str
) -> None:
    os.environ |= variables
    assert configuration.why_offline() == ""
    assert configuration.setting(configuration.HOST) == "http://h:1"
    host = next(name for name in variables if name.endswith("HOST"))
    assert configuration.origin(configuration.HOST).startswith(f"{host}, ")
    assert re.match(credentials, configuration.credentials_origin())
    os.environ[host] = ""
    with pytest.raises(RunError, match=r"half a ClearML configuration, api.api_server .* missing"):
        configuration.why_offline()


BLOCK = '{{"id": 1, "key": "{}\\n"}}'.format
SHOWN = {
    f"Invalid header value b'{TOKEN}\\n'": "Invalid header value b'***'",
    "a-token%2Fthat%2Bnobody%20may%20see": "***",
    f"{TOKEN} which is longer": "***",  # and begins with the other one
    "key AKIA0123456789ABCD, key of-12-bytes/": "key ...ABCD, key ...",
    'near secret_key: "unknown-to-us", {': 'near secret_key: "***", {',
    "http://me:p@ss@host/a@b": "http://***@host/a@b",
    BLOCK("-----BEGIN PRIVATE KEY-----\\nMII/9+\\n-----END PRIVATE KEY-----"): BLOCK("***"),
    "got -----BEGIN RSA PRIVATE KEY-----\nMII": "got ***",  # cut off
    f"{PROCESS}access denied for t0ken\nbye": f"{PROCESS}***",
    "'wrong', user=wrong&x /home/wrong.conf wrongly not-wrong": "'***', user=***&x /home/wrong.conf wrongly not-wrong",
}


@pytest.mark.parametrize(("text", "shown"), SHOWN.items())
def test_a_secret_is_redacted_in_every_spelling(monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
    """A word, which is a weak secret, only where it stands alone."""
    variables = {"AWS_SESSION_TOKEN": f"{TOKEN}\n", "CLEARML_API_ACCESS_KEY": "AKIA0123456789ABCD"}
    variables["TRAINS_API_ACCESS_KEY"] = "of-12-bytes/"
    monkeypatch.setattr(errors, "hidden", {})
    errors.register_secret("sdk", {"s3": {"credentials": [{"secret": f"{TOKEN} which is longer"}]}})
    monkeypatch.setattr(os, "environ", os.environ | variables | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert errors.redact(text) == shown
    assert errors.redact(f"{shown}; the cure") == f"{shown}; the cure"


def test_a_missing_package_has_a_cure() -> None:
    assert "pip install" in errors.diagnose(ModuleNotFoundError("No module named 'torch'")).cure


def test_what_a_credential_process_prints_is_no_sign() -> None:
    error = OSError(f"{PROCESS}access denied")
    error.__cause__ = error  # and a circle of causes has an end
    assert errors.diagnose(error).words != errors.DENIED


@pytest.mark.parametrize(
    ("uv", "made_by", "folder", "module", "script"),
    [
        (True, BY_UV, "project", "uv run -m a.b x", "uv run s.py"),
        (True, BY_UV, "other", "uv run --directory {project} -m a.b x", "uv run --project {project} s.py"),
        (True, "", "project", "{python} -m a.b x", "{python} s.py"),  # by pip: uv would install it anew
        (False, BY_UV, "project", "{python} -m a.b x", "{python} s.py"),
        (False, BY_UV, "other", "cd {project} && {python} -m a.b x", "{python} s.py"),
    ],
)
def test_a_command_is_one_that_the_user_can_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uv: bool, made_by: str, folder: str, module: str, script: str
) -> None:
    project, python = tmp_path / "project", tmp_path / "project/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    (project / ".venv/pyvenv.cfg").write_text(f"home = /usr/bin\n{made_by}version_info = 3.11.7\n")
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(errors, "ROOT", project)
    monkeypatch.setattr(sys, "prefix", str(project / ".venv"))
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path / folder)
    if uv:
        (tmp_path / "uv").touch(0o755)
    said = errors.command("-m", "a.b", "x"), errors.command("s.py")
    assert said == tuple(text.format(project=project, python=python) for text in (module, script))
    monkeypatch.setenv("PATH", str(python.parent))  # the environment is active
    assert errors.command("s.py", "a b") == "python s.py 'a b'"
    assert errors.command("clearml-task") == str(python.with_name("clearml-task"))  # which is not there


def test_a_home_that_cannot_be_written_has_a_cure(machine: Machine, tmp_path: Path) -> None:
    home = machine.variables["HOME"] = "/proc" if sys.platform == "linux" else "/dev"
    done = machine.train("--dry-run", "--output-dir", tmp_path / "out", code=1)
    assert f"cannot write ClearML's cache folder {home}" in done.stderr
    assert "CLEARML_CACHE_DIR" in done.stderr
    machine.train("--dry-run", "--output-dir", tmp_path / "out", CLEARML_CACHE_DIR=str(tmp_path / "cache"))
