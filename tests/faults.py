"""The catalogue of faults: for each row of docs/when-things-go-wrong.md what provokes it, and what is said.

FAULTS are those of the set-up: configuration, server, storage. What the doctor says of them is in test_doctor.py. What
happens in the middle of a run has tests of its own in test_faults.py, each with its `row`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from clearml_server import ClearMLServer
from conftest import Machine, Run, silent
from stores import S3Store, SeaweedFS, Store

DOCTOR = "-m clearml_client.doctor"


# --- what the page says -----------------------------------------------------------------------------------------------
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


def row(beginning: str, code: int = 1, *words: str, **more: Any) -> pytest.MarkDecorator:
    """Mark a test as one that shows this row of the table."""
    return pytest.mark.row(Promise(row=beginning, code=code, words=words, **more))


def table(text: str) -> dict[str, str]:
    """What happens, by when it happens."""
    rows = [re.split(r" *(?<!\\)\| *", line)[1:4] for line in text.splitlines() if line.startswith("| ")]
    return {when: what for when, what, _ in rows if not when.startswith(("When …", "---"))}


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
@dataclass(frozen=True, kw_only=True)
class Fault(Promise):
    provoke: Provoke


def no_answer(provoke: Provoke, why: str, within: int) -> Fault:
    words = (f"no answer from the ClearML API server {{url}}: {why}", DOCTOR)
    return Fault(row="the ClearML server is down", words=words, within=within, provoke=provoke)


def wrong_key(provoke: Provoke, origin: str) -> Fault:
    new = "make new ones: {web}/settings/workspace-configuration"
    words = ("the ClearML server refused", f"(credentials: {origin})", new, DOCTOR)
    return Fault(row="the access or secret key is wrong", words=words, provoke=provoke)


def wrong_file(provoke: Provoke, *words: str) -> Fault:
    return Fault(row="clearml.conf is a folder", words=(*words, DOCTOR), provoke=provoke)


def no_storage(provoke: Provoke, *says: str) -> Fault:
    """`says` is what the store itself says, and what is made of it."""
    words = ("error: no storage at {target}: ", *says, f"{DOCTOR} --output-uri {{target}}")
    return Fault(row="the storage is missing", words=words, within=10, provoke=provoke)


SECRET = ClearMLServer.secret_key
FILE = "api.credentials.{}_key, ~/clearml.conf".format
READER = dict(zip(("key", "secret"), SeaweedFS.READER, strict=True))
NO_BUCKET = "no such bucket"

FAULTS: dict[str, Fault] = {
    "nobody listens": no_answer(server_at("http://127.0.0.1:1"), "refused", 15),
    "a silent server": no_answer(silent_server, "time-out", 30),
    "the web UI": Fault(
        row="something else answers at its address",
        words=("no ClearML API server at {url}", "the web UI answers there", DOCTOR),
        provoke=server_at("{web}"),
    ),
    "a wrong key in the file": wrong_key(
        file("clearml.conf", (SECRET, "mistyped")), f"{FILE('access')}; {FILE('secret')}"
    ),
    "a wrong key in a variable": wrong_key(
        file("clearml.conf", CLEARML_API_SECRET_KEY="mistyped"),
        f"{FILE('access')}; CLEARML_API_SECRET_KEY, environment",
    ),
    "a syntax error": wrong_file(file("clearml.conf", ("api {", "api { ] ")), "~/clearml.conf, line 1"),
    "a file that is missing": wrong_file(
        file("clearml.conf", CLEARML_CONFIG_FILE="~/other.conf"),
        *("CLEARML_CONFIG_FILE names ~/other.conf", "no such file"),
    ),
    "half a file": wrong_file(
        file("clearml.conf", ("secret_key", "sekret_key")),
        *("half a ClearML configuration", "api.credentials.secret_key", "~/clearml.conf"),
    ),
    "no such bucket where a store makes it": no_storage(store("seaweed", "s3://{host}/nonesuch"), "NoSuchBucket"),
    "no such bucket of Google's": no_storage(store("gcs", "gs://nonesuch"), NO_BUCKET),
    "a wrong secret": no_storage(store("seaweed", secret="a-wrong-secret"), "signature mismatch", "DoesNotMatch"),
    "no permission to write": no_storage(store("seaweed", **READER), "access denied", "AccessDenied"),
    "an entry without keys": no_storage(store("rclone", key=None, secret=None), "no keys"),
    "http to a TLS port": no_storage(store("tls", secure=False, verify=None)),
    "a certificate of nobody's": no_storage(store("tls", verify=None), "certificate not trusted"),
    "a closed port": no_storage(store_at("127.0.0.1:1"), "no answer: refused", "Could not connect"),
    "Google's store is down": no_storage(google_is_down, "Connection refused"),
    "a silent store": no_storage(silent_store, "no answer: time-out"),
}
# The rows that other modules show.
ELSEWHERE = (
    "a line of `.env`",
    "HOME cannot",
    "something hangs",
    "the queue of",
    "torchrun starts",
    "one of torchrun's",
)
