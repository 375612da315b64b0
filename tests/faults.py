"""The catalogue of faults: for each row of the README's table "What happens when …" what provokes it, and what is said.

FAULTS are those of the set-up: server, configuration, storage. test_faults.py provokes each once, and asks the script,
the doctor and, where the fault has words for it, the clean-up. What happens in the middle of a run has tests of its own
there, each with its `row`. ELSEWHERE are the rows that other modules show.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

from clearml_server import ClearMLServer
from conftest import ROOT, Machine, Run, silent
from stores import S3Store, SeaweedFS, Store, free_port

Test = TypeVar("Test", bound=Callable[..., object])


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


ROWS: list[tuple[str, Promise]] = []  # the name of the test that shows it, and the row


def row(
    beginning: str, code: int = 1, *words: str, status: str = "", within: int | None = None
) -> Callable[[Test], Test]:
    """Marks a test as one that shows this row of the table."""

    def mark(test: Test) -> Test:
        ROWS.append((test.__name__, Promise(row=beginning, code=code, words=words, status=status, within=within)))
        return test

    return mark


def promise_of(test: str, beginning: str = "") -> Promise:
    """The test's row; the one that begins like this, where it has several."""
    (promise,) = [promise for name, promise in ROWS if name == test and promise.row.startswith(beginning)]
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

    def at(self, url: str) -> None:
        """The configuration has another address of the API server."""
        self.places["url"] = url
        self.machine.configure(self.server.configuration().replace(self.server.api_url, url))

    def with_file(self, name: str, *changes: tuple[str, str], **variables: str) -> None:
        """The good configuration under this name, changed."""
        text = self.server.configuration()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (self.machine.home / name).write_text(text)
        self.machine.variables |= variables

    def with_store(self, name: str, path: str = "", **entry: object) -> None:
        """The run is to store something there, by an entry that is changed."""
        store = self.stores[name]
        self.target = path.format(host=store.host) or store.uri("faults")
        if isinstance(store, S3Store):
            self.machine.configure(self.server.configuration(), store.clearml_conf(**entry))
        else:
            self.machine.configure(self.server.configuration())
            self.machine.variables |= store.environment()

    def with_store_at(self, host: str) -> None:
        self.with_store("rclone", f"s3://{host}/models", host=host)


def silent_server(setup: Setup) -> None:
    setup.at(f"http://{setup.held.enter_context(silent())}")


def silent_store(setup: Setup) -> None:
    setup.with_store_at(setup.held.enter_context(silent()))


def closed_port(setup: Setup) -> None:
    setup.with_store_at(f"127.0.0.1:{free_port()}")


# --- the faults -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Fault(Promise):
    """What each says; of the doctor a check, its words and what to try first. All are regular expressions."""

    provoke: Callable[[Setup], None]
    finds: tuple[str, str]
    cure: str
    cleanup: str = ""


def no_answer(provoke: Callable[[Setup], None], finds: tuple[str, str], cure: str, within: int = 15) -> Fault:
    what = "no answer from the ClearML API server {url}"
    return Fault(
        row="the ClearML server is down",
        words=(what, "--offline", "clearml_client.doctor"),
        within=within,
        provoke=provoke,
        finds=finds,
        cure=cure,
        cleanup=what,
    )


def wrong_key(origin: str, provoke: Callable[[Setup], None]) -> Fault:
    where = f"(credentials: {origin}; new ones: {{web}}/settings/workspace-configuration)"
    return Fault(
        row="the access or secret key is wrong",
        words=("the ClearML server refused", where),
        provoke=provoke,
        finds=("server: keys", rf"access key \.\.\.-key and its secret are not accepted.*\[{origin}"),
        cure="make new credentials",
        cleanup=f"the ClearML server refused.*{origin}",
    )


def wrong_file(provoke: Callable[[Setup], None], words: tuple[str, ...], finds: tuple[str, str], cure: str) -> Fault:
    said = ".*".join(map(re.escape, words))
    return Fault(
        row="clearml.conf is a folder", words=words, provoke=provoke, finds=finds, cure=cure, cleanup=f"error: .*{said}"
    )


def no_storage(
    provoke: Callable[[Setup], None], says: str, finds: tuple[str, str], cure: str, cleanup: str = ""
) -> Fault:
    """`says` is what the store itself says."""
    return Fault(
        row="the storage is missing",
        words=("error: no storage at {target}: ", says, "-m clearml_client.doctor --output-uri {target}"),
        status="failed",
        within=15,
        provoke=provoke,
        finds=finds,
        cure=cure,
        cleanup=cleanup,
    )


SECRET = ClearMLServer.secret_key
FILE = "api.credentials.{}_key, ~/clearml.conf".format
READER = dict(zip(("key", "secret"), SeaweedFS.READER, strict=True))
NO_BUCKET = "make the bucket, or correct its name"

FAULTS: dict[str, Fault] = {
    # the server
    "nobody listens": no_answer(
        provoke=lambda setup: setup.at(f"http://127.0.0.1:{free_port()}"),
        finds=("server: address", "refused"),
        cure="correct the port",
    ),
    "no such name": no_answer(
        provoke=lambda setup: setup.at("http://clearml.invalid:8008"),
        finds=("server: address", "name not resolved"),
        cure="correct the host name",
    ),
    "a silent server": no_answer(
        provoke=silent_server,
        finds=("server: API", "time-out"),
        cure="check host, port and firewall",
        within=30,
    ),
    "the web UI": Fault(
        row="something else answers at its address",
        words=("no ClearML API server at {url}", "the web UI answers there", "clearml_client.doctor"),
        provoke=lambda setup: setup.at(setup.server.web_url),
        finds=("server: API", "the web UI"),
        cure="port 8008",
        cleanup="error: no ClearML API server at {url}",
    ),
    "a wrong key in the file": wrong_key(
        f"{FILE('access')}; {FILE('secret')}",
        lambda setup: setup.with_file("clearml.conf", (SECRET, "mistyped")),
    ),
    "a wrong key in a variable": wrong_key(
        f"{FILE('access')}; CLEARML_API_SECRET_KEY, environment",
        lambda setup: setup.with_file("clearml.conf", CLEARML_API_SECRET_KEY="mistyped"),
    ),
    # clearml.conf
    "a syntax error": wrong_file(
        provoke=lambda setup: setup.with_file("clearml.conf", ("api {", "api { ] ")),
        words=("~/clearml.conf, line 1",),
        finds=("configuration: syntax", r"clearml.conf, line 1: .*\[~/clearml.conf\]"),
        cure="correct it at or above that line",
    ),
    "a file that is missing": wrong_file(
        provoke=lambda setup: setup.with_file("clearml.conf", CLEARML_CONFIG_FILE="~/other.conf"),
        words=("CLEARML_CONFIG_FILE names ~/other.conf", "no such file"),
        finds=("configuration: file", r"names .*other.conf, and there is no such file \[CLEARML_CONFIG_FILE"),
        cure="correct or unset CLEARML_CONFIG_FILE",
    ),
    "a file with a dot": wrong_file(
        provoke=lambda setup: setup.with_file(".clearml.conf"),
        words=("~/.clearml.conf", "~/clearml.conf"),
        finds=("configuration: file", "ClearML ignores ~/.clearml.conf"),
        cure="mv ~/.clearml.conf ~/clearml.conf",
    ),
    "half a file": wrong_file(
        provoke=lambda setup: setup.with_file("clearml.conf", ("secret_key", "sekret_key")),
        words=("half a ClearML configuration", "api.credentials.secret_key", "~/clearml.conf"),
        finds=("configuration: ClearML server", "half a ClearML configuration, api.credentials.secret_key"),
        cure="add .*CLEARML_API_SECRET_KEY.* to ~/clearml.conf or .env",
    ),
    # the storage
    "no such bucket": no_storage(
        provoke=lambda setup: setup.with_store("rclone", "s3://{host}/nonesuch"),
        says="NoSuchBucket",
        finds=("storage: bucket", "nonesuch: no such bucket"),
        cure=NO_BUCKET,
    ),
    "no such bucket where a store makes it": no_storage(
        provoke=lambda setup: setup.with_store("seaweed", "s3://{host}/nonesuch"),
        says="NoSuchBucket",
        finds=("storage: bucket", "nonesuch: no such bucket"),
        cure=NO_BUCKET,
        cleanup="left .*no such bucket",
    ),
    "no such bucket of Google's": no_storage(
        provoke=lambda setup: setup.with_store("gcs", "gs://nonesuch"),
        says="no such bucket",
        finds=("storage: bucket", "nonesuch: no such bucket"),
        cure=NO_BUCKET,
        cleanup="left .*no such bucket",
    ),
    "an unknown key": no_storage(
        provoke=lambda setup: setup.with_store("seaweed", key="AKIAUNKNOWN98765"),
        says="InvalidAccessKeyId",
        finds=("storage: bucket", "unknown key"),
        cure="correct the access key",
    ),
    "a wrong secret": no_storage(
        provoke=lambda setup: setup.with_store("seaweed", secret="a-wrong-secret"),
        says="SignatureDoesNotMatch",
        finds=("storage: bucket", "signature mismatch"),
        cure="correct the secret key",
        cleanup="left .*forbidden",
    ),
    "no permission to write": no_storage(
        provoke=lambda setup: setup.with_store("seaweed", **READER),
        says="AccessDenied",
        finds=("storage: object", "cannot write.*access denied.*AccessDenied"),
        cure="permit",
        cleanup="left .*AccessDenied",
    ),
    "an entry without keys": no_storage(
        provoke=lambda setup: setup.with_store("rclone", key=None, secret=None),
        says="no keys",
        finds=("storage: entry", "dropped in silence"),
        cure="use_credentials_chain",
        cleanup="left .*no keys",
    ),
    "https to a plain port": no_storage(
        provoke=lambda setup: setup.with_store("rclone", secure=True),
        says="SSL",
        finds=("storage: endpoint", "TLS spoken to a plain port"),
        cure="secure: false",
    ),
    "http to a TLS port": no_storage(
        provoke=lambda setup: setup.with_store("tls", secure=False, verify=None),
        says="",
        finds=("storage: endpoint", "plain HTTP spoken to a TLS port"),
        cure="secure: true",
    ),
    "a certificate of nobody's": no_storage(
        provoke=lambda setup: setup.with_store("tls", verify=None),
        says="CERTIFICATE_VERIFY_FAILED",
        finds=("storage: bucket", "certificate not trusted"),
        cure="/path/ca.pem",
    ),
    "a closed port": no_storage(
        provoke=closed_port,
        says="Could not connect",
        finds=("storage: endpoint", "refused"),
        cure="start the server",
        cleanup="left .*no answer",
    ),
    "a name of nobody's": no_storage(
        provoke=lambda setup: setup.with_store_at("no-such-host.invalid:9000"),
        says="Could not connect",
        finds=("storage: endpoint", "name not resolved"),
        cure="correct the host",
    ),
    "a silent store": no_storage(
        provoke=silent_store,
        says="",
        finds=("storage: bucket", "time-out"),
        cure="check host, port and firewall",
        cleanup="left .*no answer",
    ),
}

# --- the rows that are shown elsewhere --------------------------------------------------------------------------------
ELSEWHERE = {
    "clearml.conf is a folder": ["test_configuration.py::test_a_clearml_conf_that_cannot_be_used_is_named"],
    "a line of `.env`": [
        "test_configuration.py::test_an_env_file_that_is_not_understood_is_named",
        "test_setups.py::test_an_offline_run_goes_without_an_env_file_that_is_not_understood",
    ],
    "HOME cannot be written": ["test_configuration.py::test_a_home_that_cannot_be_written_has_a_cure"],
    "something hangs": ["test_package.py::test_a_hang_ends_with_the_stacks_of_all_threads"],
    "SIGTERM, SIGHUP, SIGUSR1": ["test_package.py::test_copied_it_ends_truthfully"],
    "the queue of": [
        "test_queue.py::test_a_missing_queue_is_told_with_those_that_exist",
        "test_queue.py::test_what_an_agent_could_not_run_is_refused",
        "test_queue.py::test_a_queue_without_a_server_or_a_name_is_wrong_use",
    ],
    "one of torchrun's processes dies": ["test_ranks.py::test_a_rank_that_is_killed_fails_the_run"],
    "torchrun's processes have other arguments": ["test_ranks.py::test_ranks_with_other_arguments_are_refused"],
}


def is_there(test: str) -> bool:
    file, name = test.split("::")
    return f"\ndef {name}(" in (ROOT / "tests" / file).read_text()
