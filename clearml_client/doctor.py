"""Check everything that a run needs, in the order in which it can go wrong.

    uv run -m clearml_client.doctor                                     # what .env, environment and clearml.conf say
    uv run -m clearml_client.doctor --output-uri s3://host:port/bucket  # another place for the model
    uv run -m clearml_client.doctor --only storage --json               # one part; for programs

A line for each check: ok, warning, failed or skipped, what was found, and where it came from. These are the run's own
checks, taken apart and explained. Nothing is trained and nothing is left behind: one small object is written where the
model will go, read back, compared and deleted.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import dotenv

import clearml_client

clearml_client.prepare_environment()  # before the SDK, which reads variables while it is imported

from clearml import Task

from clearml_client import configuration, errors, sdk, server, storage
from clearml_client.configuration import ACCESS, FILES, HOST, VARIABLES, display_path, origin, variable
from clearml_client.errors import RunError, call_with_timeout, diagnose, last4, one_line, redact

AREAS = ("configuration", "server", "storage", "machine")
TIMEOUT = 4 * storage.STEP  # seconds for one check: an object takes that many steps
SERVER = "configuration: ClearML server"


@dataclass
class Finding:
    name: str
    state: str  # ok, warning, failed or skipped
    value: str
    source: str = ""  # file and key, variable, or default
    cure: str = ""


@dataclass
class Setup:
    """What the checks tell each other."""

    uri: str  # where the model goes
    source: str  # who says so
    blocked: dict[str, str] = field(default_factory=dict)  # why there is nothing to build on, by name of the check

    @property
    def uses_file_server(self) -> bool:
        return not self.uri or self.uri.startswith("http")


Found = tuple[str, ...] | None  # what was found, where it comes from, and a cure if it deserves a look
Check = Callable[[Setup], Found]  # raises RunError for a failure, and has nothing to say where nothing is to be checked


@contextmanager
def without_new_folders(folder: Path) -> Iterator[None]:
    """Remove the folders that a check makes on the way to this one, unless something else is in them."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in new:
            with suppress(OSError):
                each.rmdir()


def check_dotenv(_: Setup) -> Found:
    file = clearml_client.DOTENV
    if clearml_client.dotenv_problem:
        raise clearml_client.dotenv_problem
    if not file.exists():
        return f"no {display_path(file)}", ""
    values = {name: value for name, value in dotenv.dotenv_values(file, encoding="utf-8-sig").items() if value}
    outside = clearml_client.OUTSIDE
    if beaten := ", ".join(name for name, value in values.items() if outside.get(name, value) != value):
        return f"another value in the environment wins: {beaten}", display_path(file), f"unset {beaten}"
    return f"sets {', '.join(values) or 'nothing'}", display_path(file)


def check_file(_: Setup) -> Found:
    path, why = configuration.config_file()
    configuration.load(configuration.find_file())
    names = ("~/.clearml.conf", "~/clearml.conf", "clearml.conf", clearml_client.DOTENV.with_name("clearml.conf"))
    others = {Path(name).expanduser().absolute() for name in names} - {path}
    ignored = [display_path(other) for other in sorted(others) if other.is_file()]
    text = "; ".join([display_path(path) if path.is_file() else f"no {display_path(path)}", *ignored])
    if ignored and why == "default":
        return f"{text} is not read", why, f"mv {ignored[0]} {display_path(path)}, or set CLEARML_CONFIG_FILE"
    return f"{text} is not read" if ignored else text, why


def check_settings(setup: Setup) -> Found:
    if reason := configuration.why_offline():
        setup.blocked[SERVER] = reason.partition(" (")[0]
        file = configuration.config_file()[0]
        cure = f"{errors.command('clearml-init')} writes {display_path(file)}, if you have a server"
        if file.is_file():  # which clearml-init does not touch
            cure = f"add the api {{ }} section that the web UI shows to {display_path(file)}, if you have a server"
        if Task.is_offline():
            cure = f"unset {configuration.variable_in_use(configuration.OFFLINE)}"
        return f"runs are recorded offline, because {reason}", "", cure
    if not setup.uri:
        setup.uri, setup.source = storage.default_target()
    key = last4(configuration.setting(ACCESS))
    sources = "; ".join(dict.fromkeys([origin(HOST), *configuration.credentials_origin().split("; ")]))
    return f"{configuration.setting(HOST)}, access key {key}, secret key set", sources


def check_secrets(_: Setup) -> Found:
    if not errors.weak:  # which redact fills, and so each finding before this one
        return None
    words = f"too short, or too much like a word, to be redacted everywhere: {', '.join(sorted(errors.weak))}"
    return words, "", "make a random secret of 16 characters or more"


def check_cache(_: Setup) -> Found:
    with without_new_folders(Path(sdk.get_cache_dir())):
        configuration.check_cache()
    return display_path(sdk.get_cache_dir()), ""


def check_api(_: Setup) -> Found:
    server.ping()
    url = server.address()
    return f"{url} answers{server.proxy_note(url)}; its web UI is {server.web_page()}", origin(HOST)


def check_keys(_: Setup) -> Found:
    session = server.session()
    server.call("projects.get_all", page_size=1, only_fields=["id"])
    user = session.get_decoded_token(session.token).get("identity", {})
    key, user = last4(configuration.setting(ACCESS)), user.get("user_name") or user.get("user")
    return f"access key {key} is user {user}", configuration.credentials_origin()


def check_task(_: Setup) -> Found:
    """Tell of an id that an agent has set, or that is left over."""
    if Task.running_locally():
        return None
    name = configuration.variable_in_use("CLEARML_TASK_ID")
    tasks = server.call("tasks.get_all", id=[os.environ[name]], only_fields=["name", "status"])["tasks"]
    task = "{name}, which is {status}".format(**tasks[0]) if tasks else f"{os.environ[name]}, which is not there"
    return f"a run goes on in the task {task}", variable(name), f"unset {name}, unless an agent has set it"


def check_file_server(_: Setup) -> Found:
    url, source = storage.file_server(), origin(FILES, "from api.api_server")
    if url.startswith("http"):  # and no bucket in its place, which works
        answer = server.get("file server", url, source=source)
        if answer.status_code != 200 or server.is_page(answer):
            cure = f"set {FILES} ({VARIABLES[FILES]}): port 8081, or the name that begins with files."
            raise RunError(f"{url} is not ClearML's file server (HTTP {answer.status_code})", cure, source)
    return url, source


def check_target(setup: Setup) -> Found:
    if not setup.uses_file_server:
        storage.check_uri(setup.uri)
    return display_path(setup.uri) or "the ClearML server's file server", setup.source


def check_access(setup: Setup) -> Found:
    """See by what the storage is opened."""
    if setup.uses_file_server and SERVER in setup.blocked:
        return None
    store = storage.open_store(setup.uri)
    return (store.keys, store.source) if store.keys else None


def check_object(setup: Setup) -> Found:
    """Make the run's own check."""
    if setup.uses_file_server and SERVER in setup.blocked:
        return None
    begin = time.perf_counter()
    with without_new_folders(Path(setup.uri.removeprefix("file://")).expanduser()):
        uri = storage.check_access(setup.uri)
    return f"written, read, compared, deleted in {time.perf_counter() - begin:.2f} s", display_path(uri)


def check_machine(_: Setup) -> Found:
    import torch

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("clearml", "boto3", "torch")]
    best = torch.accelerator.current_accelerator(check_available=True)
    torch.ones(1, device=best or "cpu").item()
    device = f"{torch.accelerator.device_count()} x {best.type}" if best else "no accelerator"
    parts = [f"Python {sys.version.split()[0]}", *versions, device, f"{torch.get_num_threads()} CPU threads"]
    return ", ".join(parts), ""


# Each check, and those without which it makes no sense.
CHECKS: dict[str, tuple[Check, Sequence[str]]] = {
    "configuration: .env": (check_dotenv, ()),
    "configuration: file": (check_file, ()),
    SERVER: (check_settings, ["configuration: file"]),
    "configuration: cache folder": (check_cache, ["configuration: file"]),
    "server: API": (check_api, [SERVER]),
    "server: keys": (check_keys, ["server: API"]),
    "server: task": (check_task, ["server: keys"]),
    "server: file server": (check_file_server, [SERVER]),
    "storage: target": (check_target, ()),
    "storage: access": (check_access, ["configuration: file", "storage: target"]),
    "storage: object": (check_object, ["storage: access"]),
    "machine: torch": (check_machine, ()),
    "configuration: secrets": (check_secrets, ["configuration: file"]),  # last, as the least of the warnings
}


def examine(setup: Setup, name: str) -> Finding | None:
    """Make one check. Whatever it raises becomes a finding."""
    check, needs = CHECKS[name]
    if reason := next((setup.blocked[need] for need in needs if need in setup.blocked), ""):
        setup.blocked[name] = reason
        return Finding(name, "skipped", reason)
    try:
        found = call_with_timeout(TIMEOUT, "time-out", lambda: check(setup))
        state = "warning" if found and len(found) > 2 else "ok"
    except Exception as error:
        state = "failed" if name != "server: file server" or setup.uses_file_server else "warning"
        setup.blocked[name] = f"{name} failed"
        if isinstance(error, RunError):
            found = str(error), error.source or setup.source * name.startswith("storage"), error.cure
        else:
            trouble = diagnose(error)
            found = f"{trouble.words} ({one_line(error)})", "", trouble.cure
    return Finding(name, state, *(" ".join(redact(text).split()) for text in found)) if found else None


def report(findings: list[Finding], is_well: bool, as_json: bool) -> None:
    cures = {finding.state: f"{finding.name}: {finding.cure}" for finding in reversed(findings) if finding.cure}
    first = cures.get("failed") or cures.get("warning") or ""
    if as_json:
        document = {"ok": is_well, "cure": first, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(document, indent=2), flush=True)
        return
    for finding in findings:
        source = f"  [{finding.source}]" if finding.source else ""
        print(f"{finding.state:8} {finding.name:30} {finding.value}{source}")
    lead = "All works; to improve" if is_well else "Try first"
    print(f"\n{lead}: {first}" if first else "\nAll is well.", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clearml_client.doctor",
        description="Check the whole set-up: configuration, ClearML server, storage, machine. Leaves nothing behind.",
        epilog="Exit code 0: all well, perhaps with warnings; 1: something failed; 2: wrong arguments.",
    )
    parser.add_argument("--output-uri", help=f"where the model goes: {storage.GOOD_URI}; default: CLEARML_OUTPUT_URI")
    parser.add_argument("--only", nargs="+", choices=AREAS, default=AREAS, help="check only these parts")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    errors.escape_unencodable()
    args = parser.parse_args()
    logging.getLogger("clearml").handlers = [logging.NullHandler()]  # the findings say it, in words
    logging.getLogger("clearml").propagate = False
    setup = Setup(args.output_uri or "", "--output-uri" if args.output_uri else "default")
    if args.output_uri is None and (uri := os.getenv("CLEARML_OUTPUT_URI")):
        setup = Setup(uri, variable("CLEARML_OUTPUT_URI"))
    with redirect_stdout(sys.stderr):  # what libraries print: --json is only JSON
        # The others need the configuration: it is always checked, and shown where it failed.
        asked = [name for name in CHECKS if name.startswith((AREAS[0], *args.only))]
        findings = [finding for name in asked if (finding := examine(setup, name))]
    shown = [finding for finding in findings if finding.name.startswith((*args.only,)) or finding.state == "failed"]
    is_well = all(finding.state != "failed" for finding in findings)
    with suppress(OSError):  # whoever read it has gone, or the disk is full: the exit code tells
        report(shown, is_well, args.json)
    for thread in threading.enumerate():
        if thread.name == "bounded":  # given up, but it may still have to delete its object
            thread.join(2 * server.TIMEOUT)
    return int(not is_well)


if __name__ == "__main__":
    code = main()
    if "IPython" in sys.modules:
        sys.exit(code)
    os._exit(code)  # not sys.exit: a library's thread may still wait for a silent server
