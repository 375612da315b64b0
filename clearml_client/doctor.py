"""Check everything that a run needs, in the order in which it can go wrong.

    uv run -m clearml_client.doctor                                     # what .env, environment and clearml.conf say
    uv run -m clearml_client.doctor --output-uri s3://host:port/bucket  # another place for the model
    uv run -m clearml_client.doctor --only storage --json               # one part; for machines

A line for each check: ok, warning, failed or skipped, what was found, and where it came from. These are the run's own
checks, taken apart and explained. Nothing is trained and nothing is left behind: one small object is written where the
model will go, read back, compared and deleted.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import dotenv

import clearml_client

clearml_client.prepare_environment()  # before the SDK, which reads variables while it is imported

from clearml import Task

from clearml_client import configuration, errors, sdk, server, storage
from clearml_client.configuration import ACCESS, FILES, HOST, WEB, display_path, in_file, origin, variable
from clearml_client.errors import PLAIN_PORT, TLS_PORT, RunError, call_with_timeout, diagnose, last4, one_line, redact

AREAS = ("configuration", "server", "storage", "machine")
PATIENCE = 3  # seconds for one answer from the network
LIMITS = {"object": 4 * storage.STEP, "torch": 120}  # seconds for one check, else 15: the first import of torch is slow


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

    uri: str = ""
    source: str = "default"
    offline: str = ""  # why no server is used
    store: Any = None
    entry: Any = None  # of sdk.aws.s3.credentials, as the SDK uses it

    @property
    def kind(self) -> str:
        """Of the target: s3, gs, azure, files (of the ClearML server) or folder."""
        scheme = urlsplit(self.uri).scheme
        if not self.uri or scheme in ("http", "https"):
            return "files"
        return scheme if scheme in storage.PACKAGES else "folder"


Found = tuple[str, ...] | None  # what was found, where it comes from, and a cure if it deserves a look
Check = Callable[[Setup], Found]  # raises RunError for a failure, and has nothing to say where nothing is to be checked


@contextmanager
def explained(what: str, source: str = "") -> Iterator[None]:
    """Make a failure with its cure of any error."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        trouble = diagnose(error)
        raise RunError(f"{what}: {trouble.words} ({one_line(error)})", trouble.cure, source) from error


def examine(setup: Setup, name: str, check: Check) -> Finding | None:
    """Make one check. Whatever it raises becomes a finding."""
    short = name.partition(": ")[2]
    try:
        with explained(short):
            found = call_with_timeout(LIMITS.get(short, 15), "time-out", lambda: check(setup))
        state = "warning" if found and len(found) > 2 else "ok"
    except RunError as error:
        state, found = "failed", (str(error), error.source, error.cure)
    return Finding(name, state, *(" ".join(redact(text).split()) for text in found)) if found else None


@contextmanager
def unmade(folder: Path) -> Iterator[None]:
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
        raise RunError(clearml_client.dotenv_problem, "correct it", display_path(file))
    if not file.is_file() or os.getenv("PYTHON_DOTENV_DISABLED", "0") not in ("0", ""):
        return "none", display_path(file.parent)
    values = {name: value for name, value in dotenv.dotenv_values(file, encoding="utf-8-sig").items() if value}
    outside = clearml_client.OUTSIDE
    if beaten := ", ".join(name for name, value in values.items() if outside.get(name, value) != value):
        return f"another value in the environment wins: {beaten}", display_path(file), f"unset {beaten}"
    return f"sets {', '.join(sorted(values)) or 'nothing'}", display_path(file)


def check_file(_: Setup) -> Found:
    path, why = configuration.find_file(), configuration.config_file()[1]
    names = ("~/.clearml.conf", "~/clearml.conf", "clearml.conf", clearml_client.DOTENV.with_name("clearml.conf"))
    likely = [Path(os.path.expanduser(name)) for name in names]
    others = {other.absolute() for other in likely if other.is_file() and other.resolve() != path.resolve()}
    ignored = sorted(map(display_path, others))
    text = f"{'' if path.is_file() else 'no '}{display_path(path)}"
    if ignored and (why == "default" or ignored != ["~/clearml.conf"]):
        cure = f"mv {ignored[0]} {display_path(path)}, or set CLEARML_CONFIG_FILE"
        return f"{text}; {' and '.join(ignored)} is not read", why, cure
    return text + "".join(f"; {name} is not read" for name in ignored), why


def check_syntax(_: Setup) -> Found:
    path = configuration.config_file()[0]
    configuration.load(path)
    return ("parsed", display_path(path)) if path.is_file() else None


def check_settings(setup: Setup) -> Found:
    setup.offline = configuration.why_offline()
    if Task.is_offline():
        name = configuration.variable_in_use(configuration.OFFLINE)
        return "runs are recorded offline", variable(name), f"unset {name}"
    if setup.offline:
        setup.offline = "no server is configured"
        words = "no configuration: runs are recorded offline"
        return words, "default", "uv run clearml-init writes ~/clearml.conf, if you have a server"
    key = last4(configuration.setting(ACCESS))
    sources = "; ".join(dict.fromkeys([origin(HOST), *configuration.credentials_origin().split("; ")]))
    return f"{configuration.setting(HOST)}, access key {key}, secret key set", sources


def check_secrets(_: Setup) -> Found:
    redact("")  # which looks into the variables
    if not errors.weak:
        return None
    words = f"too short, or perhaps a word: redacted only where it stands alone: {', '.join(sorted(errors.weak))}"
    return words, "", "make a random secret of 16 characters or more"


def check_cache(_: Setup) -> Found:
    with unmade(Path(sdk.get_cache_dir())):
        configuration.check_cache()
    return display_path(sdk.get_cache_dir()), ""


def reach(url: str, source: str, cure: str = "") -> str:
    """Resolve the name, open the port, and see that it speaks http or https as the address says."""
    parts = urlsplit(url)
    host, https = parts.hostname or "", parts.scheme == "https"
    if parts.scheme not in ("http", "https") or not host:
        raise RunError(f"{url}: no address", "write http://host:port or https://host", source)
    if used := server.proxy(url):  # which resolves the name, and opens the port
        return f"{url}, through the proxy {used}"
    context, right = ssl.create_default_context(), parts.scheme
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = parts.port or (443 if https else 80)
    with explained(url, source), socket.create_connection((host, port), PATIENCE) as plain:
        address = plain.getpeername()[0]
        try:
            context.wrap_socket(plain, server_hostname=host).close()
            right = "https"
        except OSError as error:  # the port is a plain one, or what it does tells nothing
            right = "http" if diagnose(error).words == PLAIN_PORT else right
    if right != parts.scheme:
        words = PLAIN_PORT if https else TLS_PORT
        raise RunError(f"{url}: {words}", cure or f"write {url.replace(parts.scheme, right, 1)}", source)
    return f"{url} ({address})"


def get(url: str, source: str) -> Any:
    with explained(f"{url}{server.proxy_note(url)}", source):
        return server.http().get(url, timeout=PATIENCE)


def check_address(_: Setup) -> Found:
    return reach(server.address(), origin(HOST)), origin(HOST)


def check_api(_: Setup) -> Found:
    server.ping()
    return "debug.ping answers", origin(HOST)


def check_keys(_: Setup) -> Found:
    key, source = f"access key {last4(configuration.setting(ACCESS))}", configuration.credentials_origin()
    try:
        session = server.session()
    except RunError as error:
        cure = error.cure or "make new credentials in the web UI (Settings, Workspace) and copy both keys"
        raise RunError(f"{key} and its secret are not accepted: {error}", cure, source) from error
    answer = session.send_request("projects", "get_all", json={"page_size": 1, "only_fields": ["id"]})
    if answer.status_code in (405, 411):  # of a proxy, to a GET with a body
        raise server.refusal(f"HTTP {answer.status_code}")
    user = session.get_decoded_token(session.token).get("identity", {})
    return f"{key} is user {user.get('user_name') or user.get('user')}", source


def check_task(_: Setup) -> Found:
    if Task.running_locally():
        return None
    name = configuration.variable_in_use("CLEARML_TASK_ID")
    asked = {"id": [os.environ[name]], "only_fields": ["name", "status"]}
    tasks = server.session().send_request("tasks", "get_all", json=asked).json()["data"]["tasks"]
    task = "{name}, which is {status}".format(**tasks[0]) if tasks else f"{os.environ[name]}, which is not there"
    return f"a run is not a new task, but {task}", variable(name), f"unset {name}, unless an agent has set it"


def check_web_server(_: Setup) -> Found:
    url, source = server.web_page(), origin(WEB, "from api.api_server")
    try:
        problem = "" if server.is_page(get(url, source)) else f"{url} is no web page"
    except RunError as error:
        problem = str(error)
    cure = f"set {WEB} ({configuration.VARIABLES[WEB]}): the links that a run prints use it"
    return (problem, source, cure) if problem else (url, source)


def check_file_server(setup: Setup) -> Found:
    source = origin(FILES, "from api.api_server")
    try:
        url = storage.file_server()
        if not url.startswith("http"):  # a bucket in its place, which works
            return url, source
        text, answer = reach(url, source), get(url, source)
        if answer.status_code != 200 or server.is_page(answer):
            cure = f"set {FILES} ({configuration.VARIABLES[FILES]}): port 8081, or the name that begins with files."
            raise RunError(f"{url} is not ClearML's file server (HTTP {answer.status_code})", cure, source)
        return text, source
    except RunError as error:
        if setup.kind == "files":
            raise
        return f"{error}; this run stores nothing there", error.source, error.cure


def folder_of(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).expanduser()


def check_target(setup: Setup) -> Found:
    uri = setup.uri
    given = setup.source.partition(",")[0] in ("--output-uri", "CLEARML_OUTPUT_URI")
    if given or not uri.startswith("http"):  # the configuration may name a file server, and an argument may not
        try:
            storage.check_uri(uri)
        except RunError as error:
            raise RunError(f"{uri}: {error}", error.cure, setup.source) from error
    if setup.kind == "folder":
        new = "" if folder_of(uri).exists() else ", will be made"
        return f"folder {display_path(folder_of(uri))}{new}", setup.source
    return uri or "empty: the ClearML server's file server", setup.source


def check_entry(setup: Setup) -> Found:
    setup.entry, source, slip = storage.s3_entry(setup.uri)
    used = setup.entry
    if slip and not (used.key and used.secret):
        raise slip
    if slip:
        return f"{slip}; the defaults, over https, are used", slip.source, slip.cure
    if not source:
        return "none for this bucket: the defaults", display_path(configuration.config_file()[0])
    return f"{used.host or f'bucket {used.bucket}'}, secure: {used.secure}, verify: {used.verify}", source


def check_credentials(setup: Setup) -> Found:
    setup.store, used = storage.open_store(setup.uri), setup.entry
    if setup.kind == "gs":
        for name in ("STORAGE_EMULATOR_HOST", storage.GOOGLE_KEY):
            if os.getenv(name):
                return os.environ[name], variable(name)
        return "application default credentials, or those of sdk.google.storage", "default"
    if setup.kind == "azure":  # the SDK has them, and tells nothing of them
        return None
    if used.key and used.secret and not used.use_credentials_chain:
        return f"static keys, access key {last4(used.key)}", setup.store.source or in_file("sdk.aws.s3.key")
    found: Any = boto3.Session(profile_name=used.profile or None).get_credentials()
    return f"boto3 finds {found.method}, access key {last4(found.access_key)}", setup.store.source or "default"


def check_endpoint(setup: Setup) -> Found:
    url, named = setup.store.url, "AWS_ENDPOINT_URL"
    source = setup.store.source or (variable(named) if os.getenv(named) else "default")
    secure = f"secure: {str(not url.startswith('https')).lower()} in {storage.ENTRIES}"
    text = reach(url, source, secure if setup.entry.host else "")
    if url.startswith("https") and setup.entry.verify is False:
        return f"{text}, certificate not checked", source, 'verify: "/path/ca.pem" instead of false'
    return text, source


def check_bucket(setup: Setup) -> Found:
    setup.store.check_place()
    return setup.store.name, ""


def check_object(setup: Setup) -> Found:
    """Make the run's own check."""
    if setup.kind == "files" and setup.offline:
        return None
    begin, uri = time.perf_counter(), setup.uri or storage.file_server()
    with unmade(folder_of(uri) if setup.kind == "folder" else Path()):
        storage.check_access(uri)
    return f"written, read, compared, deleted in {time.perf_counter() - begin:.2f} s", display_path(uri)


def check_packages(_: Setup) -> Found:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("clearml", "boto3")]
    return ", ".join([f"Python {sys.version.split()[0]}", *versions]), ""


def check_torch(_: Setup) -> Found:
    import torch

    best = torch.accelerator.current_accelerator(check_available=True)
    torch.ones(1, device=best or "cpu").item()
    device = f"{torch.accelerator.device_count()} x {best.type}" if best else "no accelerator"
    return f"torch {torch.__version__}, {device}, {torch.get_num_threads()} CPU threads", ""


CHECKS: dict[str, Check] = {
    "configuration: .env": check_dotenv,
    "configuration: file": check_file,
    "configuration: syntax": check_syntax,
    "configuration: ClearML server": check_settings,
    "configuration: secrets": check_secrets,
    "configuration: cache folder": check_cache,
    "server: address": check_address,
    "server: API": check_api,
    "server: keys": check_keys,
    "server: task": check_task,
    "server: web server": check_web_server,
    "server: file server": check_file_server,
    "storage: target": check_target,
    "storage: entry": check_entry,
    "storage: credentials": check_credentials,
    "storage: endpoint": check_endpoint,
    "storage: bucket": check_bucket,
    "storage: object": check_object,
    "machine: packages": check_packages,
    "machine: torch": check_torch,
}
# A check needs those before it in its area, but for these.
ALONE = ("configuration: file", "server: web server", "server: file server", "machine: torch")
# Checks of some kinds of storage; the others are of all.
KINDS = {
    "storage: entry": ("s3",),
    "storage: credentials": ("s3", "gs", "azure"),
    "storage: endpoint": ("s3",),
    "storage: bucket": ("s3", "gs"),
}


def examine_area(setup: Setup, area: str, skipped: str = "") -> list[Finding]:
    """Make the checks of an area; after one that failed, and all if they are to be `skipped`, say why not."""
    findings, failed = [], skipped
    for name, check in CHECKS.items():
        if not name.startswith(area) or setup.kind not in KINDS.get(name, setup.kind):
            continue
        failed = skipped if name in ALONE else failed
        made = not failed or check is check_target  # which looks at a text, whatever is broken
        if finding := examine(setup, name, check) if made else Finding(name, "skipped", failed):
            findings.append(finding)
            failed = f"{name} failed" if finding.state == "failed" else failed
    return findings


def examine_all(output_uri: str | None, areas: Sequence[str]) -> list[Finding]:
    """Make the checks of these areas, and those of the configuration, without which the others cannot be made."""
    setup, first = Setup(), AREAS[0]
    findings = examine_area(setup, first)
    failed = {finding.name: f"{finding.name} failed" for finding in findings if finding.state == "failed"}
    unread = failed.get(f"{first}: file") or failed.get(f"{first}: syntax", "")
    setup.offline = setup.offline or unread or failed.get(f"{first}: ClearML server", "")
    if output_uri is not None:
        setup.uri, setup.source = output_uri, "--output-uri"
    elif "CLEARML_OUTPUT_URI" in os.environ:
        setup.uri, setup.source = os.environ["CLEARML_OUTPUT_URI"], variable("CLEARML_OUTPUT_URI")
    if not (setup.uri or unread):
        setup.uri, setup.source = storage.default_target()
    skipped = {"server": setup.offline, "storage": unread, "machine": ""}
    with ThreadPoolExecutor() as pool:  # side by side, because silent servers cost seconds
        asked = [area for area in AREAS[1:] if area in areas]
        others = pool.map(lambda area: examine_area(setup, area, skipped[area]), asked)
        findings = [finding for finding in findings if first in areas or finding.state == "failed"]
        return findings + [finding for other in others for finding in other]


def report(findings: list[Finding], as_json: bool) -> None:
    cures = {finding.state: f"{finding.name}: {finding.cure}" for finding in reversed(findings) if finding.cure}
    first = cures.get("failed") or cures.get("warning") or ""
    if as_json:
        well = all(finding.state != "failed" for finding in findings)
        document = {"ok": well, "cure": first, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(document, indent=2), flush=True)
        return
    for finding in findings:
        source = f"  [{finding.source}]" if finding.source else ""
        print(f"{finding.state:8} {finding.name:30} {finding.value}{source}")
    print(f"\nTry first: {first}" if first else "\nAll is well.", flush=True)


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
    with redirect_stdout(sys.stderr):  # what libraries print: --json is only JSON
        findings = examine_all(args.output_uri, args.only)
    with suppress(OSError):  # whoever read it has gone, or the disk is full: the exit code tells
        report(findings, args.json)
    for thread in threading.enumerate():
        if thread.name == "bounded":  # given up, but it may still have to delete its object
            thread.join(2 * PATIENCE)
    return int(any(finding.state == "failed" for finding in findings))


if __name__ == "__main__":
    code = main()
    if "IPython" in sys.modules:
        sys.exit(code)
    os._exit(code)  # not sys.exit: a library's thread may still wait for a silent server
