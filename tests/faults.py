"""The catalogue of faults: for each row of the README's table "What happens when …" what provokes it, and what is said.

FAULTS are those of the set-up: configuration, server, storage. test_faults.py provokes each once, and asks the script,
the doctor and, where the fault has words for it, the clean-up. What happens in the middle of a run has tests of its own
there, each with its `row`. ELSEWHERE are the rows that other modules show.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from clearml_server import ClearMLServer
from conftest import ROOT, Machine, Run, silent
from stores import S3Store, SeaweedFS, Store

Test = TypeVar("Test", bound=Callable[..., object])
DOCTOR = "-m clearml_client.doctor"


# --- what the README says ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a row says of the script's end."""

    row: str  # the beginning of its first cell
    code: int = 1
    words: tuple[str, ...] = ()  # of the one line on stderr
    status: str = ""  # of the task
    within: int | None = None  # seconds

    def kept(self, run: Run, **places: str) -> None:
        assert run.end(self.within) == self.code, run.everything
        assert "Traceback" not in run.stdout + run.stderr
        for words in self.words:
            assert words.format(**places) in run.line.replace(places.get("home", "~"), "~")
        # The doctor is named where it can tell more, and nowhere else.
        assert (DOCTOR in run.stderr) == any(DOCTOR in words for words in self.words), run.stderr


ROWS: list[tuple[str, Promise]] = []  # the name of the test that shows it, and the row


def row(
    beginning: str, code: int = 1, *words: str, status: str = "", within: int | None = None
) -> Callable[[Test], Test]:
    """Mark a test as one that shows this row of the table."""

    def mark(test: Test) -> Test:
        ROWS.append((test.__name__, Promise(row=beginning, code=code, words=words, status=status, within=within)))
        return test

    return mark


def promise_of(test: str, beginning: str = "", code: int | None = None) -> Promise:
    """Return the test's row; where it has several, the one that begins like this, or has this exit code."""
    rows = [promise for name, promise in ROWS if name == test and promise.row.startswith(beginning)]
    (promise,) = [promise for promise in rows if code in (None, promise.code)]
    return promise


def table(text: str) -> dict[str, str]:
    """What happens, by when it happens."""
    chapter = text.split("\n## What happens when …\n")[1].split("\n## ")[0]
    rows = [re.split(r" *(?<!\\)\| *", line)[1:4] for line in chapter.splitlines() if line.startswith("| ")]
    return {when: what for when, what, _ in rows[2:]}


# --- what provokes a fault --------------------------------------------------------------------------------------------
@dataclass
class Setup:
    """A machine that is well, with server and stores, for a fault to spoil."""

    machine: Machine
    server: ClearMLServer
    stores: dict[str, Store]
    held: ExitStack
    target: str = ""  # --output-uri
    places: dict[str, str] = field(default_factory=dict)  # what {url} and the like in the words stand for


Provoke = Callable[[Setup], None]


def server_at(url: str) -> Provoke:
    """The address of the API server is another."""

    def provoke(setup: Setup) -> None:
        setup.places["url"] = url.format(web=setup.server.web_url)
        text = setup.server.configuration().replace(setup.server.api_url, setup.places["url"])
        setup.machine.configure(text)

    return provoke


def silent_server(setup: Setup) -> None:
    server_at(f"http://{setup.held.enter_context(silent())}")(setup)


def file(name: str, *changes: tuple[str, str], **variables: str) -> Provoke:
    """The good configuration under this name, changed."""

    def provoke(setup: Setup) -> None:
        text = setup.server.configuration()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (setup.machine.home / name).write_text(text)
        setup.machine.variables |= variables

    return provoke


def store(name: str, path: str = "", **entry: object) -> Provoke:
    """The run is to store something there, by an entry of clearml.conf that is changed."""

    def provoke(setup: Setup) -> None:
        place = setup.stores[name]
        setup.target = path.format(host=place.host) or place.uri("faults")
        if isinstance(place, S3Store):
            setup.machine.configure(setup.server.configuration(), place.clearml_conf(**entry))
        else:
            setup.machine.configure(setup.server.configuration())
            setup.machine.variables |= place.environment()

    return provoke


def store_at(host: str) -> Provoke:
    """An S3 store is at another address."""
    return store("rclone", f"s3://{host}/models", host=host)


def google_is_down(setup: Setup) -> None:
    store("gcs")(setup)
    setup.machine.variables["STORAGE_EMULATOR_HOST"] = "http://127.0.0.1:1"


def silent_store(setup: Setup) -> None:
    store_at(setup.held.enter_context(silent()))(setup)


# --- the faults -------------------------------------------------------------------------------------------------------
class Others(NamedTuple):
    """What the doctor says by one of its checks, and as the first cure; and the clean-up. Regular expressions."""

    check: str
    finds: str
    cure: str
    cleanup: str = ""


@dataclass(frozen=True, kw_only=True)
class Fault(Promise):
    provoke: Provoke
    others: Others


def no_answer(provoke: Provoke, check: str, finds: str, cure: str, within: int = 15) -> Fault:
    what = "no answer from the ClearML API server {url}"
    words = (what, "--offline", DOCTOR)
    others = Others(f"server: {check}", finds, cure, what)
    return Fault(row="the ClearML server is down", words=words, within=within, provoke=provoke, others=others)


def wrong_key(provoke: Provoke, origin: str) -> Fault:
    new = "; new ones: {web}/settings/workspace-configuration)"
    finds = rf"access key \.\.\.-key and its secret are not accepted.*\[{origin}"
    others = Others("server: keys", finds, "make new credentials", f"the ClearML server refused.*{origin}")
    words = ("the ClearML server refused", f"(credentials: {origin}{new}", DOCTOR)
    return Fault(row="the access or secret key is wrong", words=words, provoke=provoke, others=others)


def wrong_file(provoke: Provoke, words: tuple[str, ...], check: str, finds: str, cure: str) -> Fault:
    others = Others(f"configuration: {check}", finds, cure, f"error: .*{'.*'.join(map(re.escape, words))}")
    return Fault(row="clearml.conf is a folder", words=(*words, DOCTOR), provoke=provoke, others=others)


def no_storage(provoke: Provoke, says: str, check: str, finds: str, cure: str, cleanup: str = "") -> Fault:
    """`says` is what the store itself says."""
    words = ("error: no storage at {target}: ", says, f"{DOCTOR} --output-uri {{target}}")
    others = Others(f"storage: {check}", finds, cure, cleanup)
    return Fault(row="the storage is missing", words=words, within=10, provoke=provoke, others=others)


SECRET = ClearMLServer.secret_key
FILE = "api.credentials.{}_key, ~/clearml.conf".format
HALF = "half a ClearML configuration"
IGNORED = "ClearML ignores ~/.clearml.conf"
READER = dict(zip(("key", "secret"), SeaweedFS.READER, strict=True))
MISSING = ("bucket", "no such bucket", "make the bucket, or correct its name")
WAIT = "check host, port and firewall"
LISTED_AND_LEFT = "; stays: .*no answer.*\n(.*\n)*left .*no answer"

FAULTS: dict[str, Fault] = {
    "nobody listens": no_answer(server_at("http://127.0.0.1:1"), "address", "refused", "correct the port"),
    "no such name": no_answer(server_at("http://clearml.invalid:8008"), "address", "name not res", "correct the host"),
    "a silent server": no_answer(silent_server, "API", "time-out", WAIT, within=30),
    "the web UI": Fault(
        row="something else answers at its address",
        words=("no ClearML API server at {url}", "the web UI answers there", DOCTOR),
        provoke=server_at("{web}"),
        others=Others("server: API", "the web UI", "port 8008", "error: no ClearML API server at {url}"),
    ),
    "a wrong key in the file": wrong_key(
        file("clearml.conf", (SECRET, "mistyped")), f"{FILE('access')}; {FILE('secret')}"
    ),
    "a wrong key in a variable": wrong_key(
        file("clearml.conf", CLEARML_API_SECRET_KEY="mistyped"),
        f"{FILE('access')}; CLEARML_API_SECRET_KEY, environment",
    ),
    # By what; words of script and clean-up; the doctor's check, its words, its cure
    "a syntax error": wrong_file(
        file("clearml.conf", ("api {", "api { ] ")),
        ("~/clearml.conf, line 1",),
        *("syntax", r"clearml.conf, line 1: .*\[~/clearml.conf\]", "correct it at or above that line"),
    ),
    "a file that is missing": wrong_file(
        file("clearml.conf", CLEARML_CONFIG_FILE="~/other.conf"),
        ("CLEARML_CONFIG_FILE names ~/other.conf", "no such file"),
        *("file", r"names .*no such file \[CLEARML_CONFIG_FILE", "correct or unset CLEARML_CONFIG_FILE"),
    ),
    "a file with a dot": wrong_file(
        file(".clearml.conf"), (IGNORED, "~/clearml.conf"), "file", IGNORED, "mv ~/.clearml.conf ~/clearml.conf"
    ),
    "half a file": wrong_file(
        file("clearml.conf", ("secret_key", "sekret_key")),
        (HALF, "api.credentials.secret_key", "~/clearml.conf"),
        *("ClearML server", f"{HALF}, api.credentials.secret_key", "add .*SECRET_KEY.* to ~/clearml.conf or .env"),
    ),
    # By what; the store's own word; the doctor's check, its words, its cure; the clean-up's words
    "no such bucket": no_storage(store("rclone", "s3://{host}/nonesuch"), "NoSuchBucket", *MISSING),
    "no such bucket where a store makes it": no_storage(
        store("seaweed", "s3://{host}/nonesuch"), "NoSuchBucket", *MISSING, "left .*no such bucket"
    ),
    "no such bucket of Google's": no_storage(
        store("gcs", "gs://nonesuch"), "no such bucket", *MISSING, "left .*no such bucket"
    ),
    "an unknown key": no_storage(
        store("rclone", key="AKIAUNKNOWN98765"),
        *("InvalidAccessKeyId", "bucket", "unknown key", "correct the access key"),
    ),
    "a wrong secret": no_storage(
        store("seaweed", secret="a-wrong-secret"),
        *("SignatureDoesNotMatch", "bucket", "signature mismatch", "correct the secret key", "left .*forbidden"),
    ),
    "no permission to write": no_storage(
        store("seaweed", **READER),
        *("AccessDenied", "object", "cannot write.*access denied.*AccessDenied", "permit", "left .*AccessDenied"),
    ),
    "an entry without keys": no_storage(
        store("rclone", key=None, secret=None),
        *("no keys", "entry", "dropped in silence", "use_credentials_chain", "left .*no keys"),
    ),
    "https to a plain port": no_storage(
        store("rclone", secure=True), "SSL", "endpoint", "TLS spoken to a plain port", "secure: false"
    ),
    "http to a TLS port": no_storage(
        store("tls", secure=False, verify=None), "", "endpoint", "plain HTTP spoken to a TLS port", "secure: true"
    ),
    "a certificate of nobody's": no_storage(
        store("tls", verify=None), "CERTIFICATE_VERIFY_FAILED", "bucket", "certificate not trusted", "/path/ca.pem"
    ),
    "a closed port": no_storage(
        store_at("127.0.0.1:1"), "Could not connect", "endpoint", "refused", "start the server", LISTED_AND_LEFT
    ),
    "a name of nobody's": no_storage(
        store_at("no-such-host.invalid:9000"), "Could not connect", "endpoint", "name not resolved", "correct the host"
    ),
    "Google's store is down": no_storage(
        google_is_down, "Connection refused", "bucket", "refused", "start the server", LISTED_AND_LEFT
    ),
    "a silent store": no_storage(silent_store, "", "bucket", "time-out", WAIT, "left .*no answer"),
}

# --- the rows that are shown elsewhere --------------------------------------------------------------------------------
ELSEWHERE = {
    "clearml.conf is a folder": [
        "test_configuration.py::test_a_clearml_conf_that_cannot_be_used_is_named_and_offline_nobody_needs_it"
    ],
    "a line of `.env`": [
        "test_configuration.py::test_an_env_file_that_is_not_understood_is_named",
        "test_configuration.py::test_a_run_ends_with_that_line_and_offline_it_goes_without",
    ],
    "HOME cannot be written": ["test_configuration.py::test_a_home_that_cannot_be_written_has_a_cure"],
    "something hangs": ["test_package.py::test_a_hang_ends_with_the_stacks_of_all_threads"],
    "SIGTERM, SIGHUP, SIGUSR1": ["test_package.py::test_every_end_is_true_and_leaves_nothing"],
    "the queue of": [
        "test_queue.py::test_what_is_refused_leaves_no_task",
        "test_queue.py::test_what_an_agent_could_not_run_is_refused",
        "test_queue.py::test_a_queue_without_a_name_or_a_server_is_wrong_use",
    ],
    "torchrun starts": ["test_torchrun.py::test_without_the_patch_it_is_refused"],
    "one of torchrun's": ["test_torchrun.py::test_the_end_of_one_process_ends_all"],
}


def is_there(test: str) -> bool:
    file, name = test.split("::")
    return f"\ndef {name}(" in (ROOT / "tests" / file).read_text()
