"""Check everything that a run needs, in the order in which it can go wrong.

    uv run -m clearml_client.doctor                                     # what .env, environment and clearml.conf say
    uv run -m clearml_client.doctor --output-uri s3://host:port/bucket  # another place for the model
    uv run -m clearml_client.doctor --only storage --json               # one part; for machines

A line for each check: ok, warning, failed or skipped, what was found, and where it came from. These are the run's own
checks, taken apart and explained: what fails here fails there, for the same reason. Nothing is trained and nothing is
left behind: one small object is written where the model will go, read back, compared and deleted.
"""

import argparse
import importlib.metadata
import json
import logging
import os
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import dotenv

import clearml_client

clearml_client.prepare_environment()  # before the SDK, which reads variables while it is imported

from clearml_client import configuration, sdk, server, storage
from clearml_client.configuration import (
    ACCESS,
    FILES,
    HOST,
    SECRET,
    VARIABLES,
    WEB,
    display_path,
    in_file,
    origin,
    variable,
)
from clearml_client.errors import (
    DENIED,
    PLAIN_PORT,
    TLS_PORT,
    RunError,
    call_with_timeout,
    diagnose,
    escape_unencodable,
    last4,
    one_line,
    redact,
)

AREAS = ("configuration", "server", "storage", "machine")
PATIENCE = 3  # seconds for one answer from the network
LIMITS = {"machine": 120}  # seconds for one check, else 15: importing torch for the first time is slow
OLDEST_SDK = "2.1.7"  # older ones talk to the server while they are imported


@dataclass
class Finding:
    state: str  # ok, warning, failed or skipped
    value: str
    source: str = ""  # file and key, variable, or default
    cure: str = ""
    name: str = ""


@dataclass
class Setup:
    """What the checks tell each other."""

    uri: str
    source: str
    kind: str = ""  # of the target: s3, gs, azure, folder or files
    offline: str = ""  # why no server is used
    store: Any = None
    entry: Any = None  # of sdk.aws.s3.credentials, as the SDK uses it
    claims: dict[str, Any] = field(default_factory=dict)  # of the server's token


Check = Callable[[Setup], Finding | None]


def ok(value: str, source: str = "") -> Finding:
    return Finding("ok", value, source)


def warning(value: str, cure: str, source: str = "") -> Finding:
    return Finding("warning", value, source, cure)


def blame(error: BaseException, what: str, source: str = "", cure: str = "") -> RunError:
    """The failure that an error means, in words, with the error's own text."""
    trouble = diagnose(error)
    return RunError(f"{what}: {trouble.words} ({one_line(error)})", cure or trouble.cure, source)


def examine(setup: Setup, name: str, check: Check) -> Finding | None:
    """Make one check. Whatever it raises becomes a finding."""
    try:
        finding = call_with_timeout(LIMITS.get(name.partition(":")[0], 15), "time-out", lambda: check(setup))
    except RunError as error:
        finding = Finding("failed", str(error), error.source, error.cure)
    except Exception as error:
        failure = blame(error, type(error).__name__)
        finding = Finding("failed", str(failure), "", failure.cure)
    if finding:
        finding.name = name
    return finding


@contextmanager
def unmade(folder: Path) -> Iterator[None]:
    """Folders that a check makes on the way to this one are gone afterwards, unless something else is in them."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in new:
            with suppress(OSError):
                each.rmdir()


# --- configuration --------------------------------------------------------------------------------------------------
def check_dotenv(_: Setup) -> Finding:
    file = clearml_client.DOTENV
    if clearml_client.dotenv_problem:
        raise RunError(clearml_client.dotenv_problem, "correct it", display_path(file))
    if not file.is_file() or os.getenv("PYTHON_DOTENV_DISABLED", "0") not in ("0", ""):
        return ok("none", display_path(file.parent))
    values = dotenv.dotenv_values(file, encoding="utf-8-sig").items()
    outside = clearml_client.OUTSIDE
    if beaten := ", ".join(name for name, value in values if value and outside.get(name, value) != value):
        return warning(f"another value in the environment wins: {beaten}", f"unset {beaten}", display_path(file))
    return ok(f"sets {', '.join(sorted(name for name, value in values if value)) or 'nothing'}", display_path(file))


def check_file(_: Setup) -> Finding:
    path = configuration.find_file()
    why = configuration.config_file()[1]
    homes = [Path(os.path.expanduser(name)) for name in ("~/.clearml.conf", "~/clearml.conf")]
    likely = [*homes, clearml_client.DOTENV.with_name("clearml.conf"), Path("clearml.conf")]
    ignored = {
        display_path(other.absolute()) for other in likely if other.is_file() and other.resolve() != path.resolve()
    }
    text = display_path(path) if path.is_file() else f"no {display_path(path)}"
    if ignored - {"~/clearml.conf"} or (ignored and why == "default"):
        cure = f"mv {min(ignored)} {display_path(path)}, or set CLEARML_CONFIG_FILE"
        return warning(f"{text}; {' and '.join(sorted(ignored))} is not read", cure, why)
    return ok(text + "".join(f"; {name} is not read" for name in ignored), why)


def check_syntax(_: Setup) -> Finding | None:
    path = configuration.config_file()[0]
    configuration.load(path)
    return ok("parsed", display_path(path)) if path.is_file() else None


def check_settings(setup: Setup) -> Finding:
    setup.offline = configuration.why_offline()
    if sdk.is_offline():
        return warning("runs are recorded offline", "unset CLEARML_OFFLINE_MODE", variable("CLEARML_OFFLINE_MODE"))
    if setup.offline:
        setup.offline = "no server is configured"
        cure = "uv run clearml-init writes ~/clearml.conf, if you have a server"
        return warning("no configuration: runs are recorded offline", cure)
    sources = "; ".join(dict.fromkeys(origin(key) for key in (HOST, ACCESS, SECRET)))
    key = last4(configuration.setting(ACCESS))
    return ok(f"{configuration.setting(HOST)}, access key {key}, secret key set", sources)


def check_overrides(_: Setup) -> Finding | None:
    both = {name: key for key, name in VARIABLES.items() if os.getenv(name) and sdk.setting(key, "")}
    if not (beaten := [name for name, key in both.items() if os.environ[name] != sdk.setting(key)]):
        return None
    text = "; ".join(f"{name} beats {both[name]}" for name in beaten)  # without the values, of which some are secret
    return warning(text, f"unset {' '.join(beaten)} if the file is right", "; ".join(map(variable, beaten)))


def check_cache(_: Setup) -> Finding:
    with unmade(Path(sdk.get_cache_dir())):
        configuration.check_cache()
    return ok(display_path(sdk.get_cache_dir()))


# --- server ---------------------------------------------------------------------------------------------------------
def speaks_tls(host: str, port: int) -> bool | None:
    """Whether a port answers a TLS greeting. None if what it does tells nothing; OSError if it is not open."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, port), PATIENCE) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=host):
                return True
        except OSError as error:
            return False if diagnose(error).words == PLAIN_PORT else None


def reach(url: str, source: str, cure: str = "") -> str:
    """Resolve the name, open the port, and see that it speaks http or https as the address says."""
    parts = urlsplit(url)
    host, https = parts.hostname or "", parts.scheme == "https"
    if parts.scheme not in ("http", "https") or not host:
        raise RunError(f"{url}: no address", "write http://host:port or https://host", source)
    if used := server.proxy(url):  # which resolves the name, and opens the port
        return f"{url}, through the proxy {used}"
    try:
        port = parts.port or (443 if https else 80)
        address = call_with_timeout(PATIENCE, host, lambda: socket.getaddrinfo(host, port))[0][4][0]
        tls = speaks_tls(host, port)
    except Exception as error:
        raise blame(error, url, source) from error
    if tls is not None and tls != https:
        right = url.replace(parts.scheme, "https" if tls else "http", 1)
        raise RunError(f"{url}: {TLS_PORT if tls else PLAIN_PORT}", cure or f"write {right}", source)
    return f"{url} ({address})"


def get(url: str, source: str) -> Any:
    try:
        return server.http().get(url, timeout=PATIENCE)
    except Exception as error:
        raise blame(error, f"{url}{server.proxy_note(url)}", source) from error


def check_address(_: Setup) -> Finding:
    return ok(reach(server.address(), origin(HOST)), origin(HOST))


def check_api(_: Setup) -> Finding:
    server.ping()
    return ok("debug.ping answers", origin(HOST))


def check_keys(setup: Setup) -> Finding:
    source = "; ".join(dict.fromkeys(origin(key) for key in (ACCESS, SECRET)))
    key = f"access key {last4(configuration.setting(ACCESS))}"
    try:
        session = server.session()
    except RunError as error:
        cure = error.cure or "make new credentials in the web UI (Settings, Workspace) and copy both keys"
        raise RunError(f"{key} and its secret are not accepted: {error}", cure, source) from error
    answer = session.send_request("projects", "get_all", json={"page_size": 1, "only_fields": ["id"]})
    if answer.status_code in (405, 411):  # of a proxy, to a GET with a body
        raise server.refusal(f"HTTP {answer.status_code}")
    setup.claims = session.get_decoded_token(session.token)
    user = setup.claims.get("identity", {})
    return ok(f"{key} is user {user.get('user_name') or user.get('user')}", source)


def check_version(setup: Setup) -> Finding:
    # The SDK has calls for some versions of the API, and takes the newest that the server has, too.
    known = sdk.api_versions()
    theirs = tuple(map(int, str(setup.claims.get("api_version", "2.9")).split(".")))
    text = f"server {setup.claims.get('server_version')} with API {'.'.join(map(str, theirs))}, SDK {sdk_version()}"
    if theirs < known[0]:
        raise RunError(f"{text}: this SDK cannot talk to it", "update the server")
    return warning(f"{text}: the SDK knows newer calls", "update the server") if theirs < known[-1] else ok(text)


def check_web_server(_: Setup) -> Finding:
    source = origin(WEB, "from api.api_server")
    url = server.web_page()
    try:
        if server.is_page(get(url, source)):
            return ok(url, source)
        problem = f"{url} is no web page"
    except RunError as error:
        problem = str(error)
    return warning(problem, f"set {WEB} ({VARIABLES[WEB]}): the links that a run prints use it", source)


def stores_there(setup: Setup) -> bool:
    """Whether the file server is the target."""
    return not setup.uri or setup.uri.startswith("http")


def optional(check: Check) -> Check:
    """A warning in place of a failure where the run stores everything elsewhere."""

    def checked(setup: Setup) -> Finding | None:
        try:
            return check(setup)
        except RunError as error:
            if stores_there(setup):
                raise
            return warning(f"{error}; this run stores nothing there", error.cure, error.source)

    return checked


def check_file_server(_: Setup) -> Finding:
    url, source = storage.file_server(), origin(FILES, "from api.api_server")
    if not url.startswith("http"):  # a bucket in its place, which works
        return ok(url, source)
    text = reach(url, source)
    answer = get(url, source)
    if answer.status_code != 200 or server.is_page(answer):
        cure = f"set {FILES} ({VARIABLES[FILES]}): port 8081, or the name that begins with files."
        raise RunError(f"{url} is not ClearML's file server (HTTP {answer.status_code})", cure, source)
    return ok(text, source)


def check_file_server_object(setup: Setup) -> Finding | None:
    return prove(storage.file_server()) if stores_there(setup) else None


# --- storage --------------------------------------------------------------------------------------------------------
def prove(uri: str) -> Finding:
    """The run's own proof."""
    begin = time.perf_counter()
    storage.check_access(uri)
    return ok(f"written, read, compared, deleted in {time.perf_counter() - begin:.2f} s", display_path(uri))


def folder_of(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).expanduser()


def check_target(setup: Setup) -> Finding:
    uri = setup.uri
    by_default = setup.source.partition(",")[0] not in ("--output-uri", "CLEARML_OUTPUT_URI")
    if by_default and uri.startswith("http"):  # a file server, which the run takes here, and not as an argument
        setup.kind = "files"
        return ok(uri, setup.source)
    try:
        storage.check_uri(uri)
    except RunError as error:
        shown = "" if "credentials" in str(error) else f"{uri}: "
        raise RunError(f"{shown}{error}", error.cure, setup.source) from error
    setup.kind = urlsplit(uri).scheme if uri else "files"
    if setup.kind in ("", "file"):
        setup.kind, folder = "folder", folder_of(uri)
        return ok(f"folder {display_path(folder)}{'' if folder.exists() else ', will be made'}", setup.source)
    return ok(uri or "empty: the ClearML server's file server", setup.source)


def check_library(setup: Setup) -> Finding | None:
    if setup.kind not in storage.PACKAGES:
        return None
    package = storage.check_package(setup.kind)
    return ok(f"{package} {importlib.metadata.version(package)}")


def check_entry(setup: Setup) -> Finding | None:
    if setup.kind != "s3":
        return None
    setup.entry, source = storage.s3_entry(setup.uri)
    used, path = setup.entry, display_path(configuration.config_file()[0])
    if source:
        return ok(f"{used.host or f'bucket {used.bucket}'}, secure: {used.secure}, verify: {used.verify}", source)
    if not (slip := getattr(used, "missing", None)):
        return ok("none for this bucket: the defaults", path)
    words = f"none for {urlsplit(setup.uri).netloc}: {slip[0]}"
    host, _, port = urlsplit(setup.uri).netloc.partition(":")
    if used.key and used.secret and speaks_tls(host, int(port)):
        return warning(f"{words}; the defaults, over https, are used", slip[1], path)
    raise RunError(words, slip[1], path)


def check_credentials(setup: Setup) -> Finding | None:
    if setup.kind == "gs":
        return google_credentials()
    if setup.kind == "azure":
        return azure_credentials(setup)
    if setup.kind != "s3":
        return None
    setup.store, used = storage.open_s3(setup.uri), setup.entry
    if used.key and used.secret and not used.use_credentials_chain:
        default = in_file("sdk.aws.s3.key") if sdk.setting("sdk.aws.s3.key", "") else variable("AWS_ACCESS_KEY_ID")
        kind = "temporary" if used.token else "static"
        return ok(f"{kind} keys, access key {last4(used.key)}", setup.store.source or default)
    found = boto3.Session(profile_name=used.profile or None).get_credentials()
    if not found:
        raise RunError(
            "no keys, boto3 finds none either", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an entry"
        )
    return ok(f"boto3 finds {found.method}, access key {last4(found.access_key)}", setup.store.source or "default")


def google_credentials() -> Finding:
    name, emulator = "GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"
    if os.getenv(emulator):
        return ok(f"none, an emulator at {os.environ[emulator]}", variable(emulator))
    if sdk.setting("sdk.google.storage.credentials_json", ""):
        return ok("service account", in_file("sdk.google.storage.credentials_json"))
    import google.auth

    try:
        found, _project = google.auth.default()
    except Exception as error:
        raise RunError(str(error), f"gcloud auth application-default login, or {name}=key.json") from error
    return ok(type(found).__name__, variable(name) if os.getenv(name) else "application default credentials")


def azure_credentials(setup: Setup) -> Finding:
    """Never tried against Azure itself."""
    used, key = sdk.azure_entry(setup.uri), "sdk.azure.storage.containers"
    if not used or not (used.account_name and (used.account_key or used.use_default_credential)):
        file = display_path(configuration.config_file()[0])
        cure = f"add it to {key} in {file}, or set AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY"
        raise RunError("no account and key for this container", cure)
    return ok(f"{used.account_name}, {reach(f'https://{urlsplit(setup.uri).netloc}', '')}")


def check_endpoint(setup: Setup) -> Finding | None:
    if setup.kind != "s3":
        return None
    url = setup.store.client.meta.client.meta.endpoint_url
    named = "AWS_ENDPOINT_URL" if os.getenv("AWS_ENDPOINT_URL") else ""
    source = setup.store.source or (variable(named) if named else "default")
    secure = f"secure: {str(not url.startswith('https')).lower()} in {storage.ENTRIES}"
    text = reach(url, source, secure if setup.entry.host else "")
    if url.startswith("https") and setup.entry.verify is False:
        return warning(f"{text}, certificate not checked", 'verify: "/path/ca.pem" instead of false', source)
    return ok(text, source)


def check_bucket(setup: Setup) -> Finding | None:
    # Looked at before anything is written: some stores make a missing one on the first upload.
    if setup.kind == "gs":
        bucket = storage.open_store(setup.uri).client
        if not bucket.exists(timeout=PATIENCE, retry=None):
            raise RunError(f"{bucket.name}: no such bucket", "make the bucket, or correct its name in the URI")
        return ok(bucket.name)
    if setup.kind != "s3":
        return None
    name = setup.store.bucket
    try:
        setup.store.client.meta.client.list_objects_v2(Bucket=name, MaxKeys=1)
    except Exception as error:
        if diagnose(error).words == DENIED:  # to list is a permission that an upload does not need
            return ok(f"{name}, which these keys may not list")
        raise blame(error, f"{name}{server.proxy_note(setup.store.url)}", setup.store.source) from error
    return ok(name)


def check_object(setup: Setup) -> Finding | None:
    if setup.kind == "files":
        return None if setup.offline else prove(setup.uri or storage.file_server())
    with unmade(folder_of(setup.uri) if setup.kind == "folder" else Path()):
        return prove(setup.uri)


# --- machine --------------------------------------------------------------------------------------------------------
def sdk_version() -> str:
    return importlib.metadata.version("clearml")


def check_packages(_: Setup) -> Finding:
    text = f"Python {sys.version.split()[0]}, clearml {sdk_version()}, boto3 {importlib.metadata.version('boto3')}"
    found, oldest = (tuple(map(int, re.findall(r"\d+", version)[:3])) for version in (sdk_version(), OLDEST_SDK))
    return ok(text) if found >= oldest else warning(f"{text}: clearml is too old", "uv sync")


def check_torch(_: Setup) -> Finding:
    import torch

    best = torch.accelerator.current_accelerator(check_available=True)
    torch.ones(1, device=best or "cpu").item()
    device = f"{torch.accelerator.device_count()} x {best.type}" if best else "no accelerator"
    return ok(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} CPU threads")


# --- main -----------------------------------------------------------------------------------------------------------
# In each chain a check needs those before it: after one that failed the others are skipped.
CHAINS: dict[str, list[list[tuple[str, Check]]]] = {
    "configuration": [
        [(".env", check_dotenv)],
        [
            ("file", check_file),
            ("syntax", check_syntax),
            ("ClearML server", check_settings),
            ("overrides", check_overrides),
            ("cache folder", check_cache),
        ],
    ],
    "server": [
        [("address", check_address), ("API", check_api), ("keys", check_keys), ("version", check_version)],
        [("web server", check_web_server)],
        [("file server", optional(check_file_server)), ("file server's object", check_file_server_object)],
    ],
    "storage": [
        [
            ("target", check_target),
            ("library", check_library),
            ("entry", check_entry),
            ("credentials", check_credentials),
            ("endpoint", check_endpoint),
            ("bucket", check_bucket),
            ("object", check_object),
        ],
    ],
    "machine": [[("packages", check_packages)], [("torch", check_torch)]],
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m clearml_client.doctor",
        description="Check the whole set-up: configuration, ClearML server, storage, machine. Leaves nothing behind.",
        epilog="Example: uv run -m clearml_client.doctor --output-uri s3://localhost:9000/models. "
        "Exit code 0: all well, perhaps with warnings; 1: something failed; 2: wrong arguments.",
    )
    where = f"where the model goes: {storage.GOOD_URI}; default: CLEARML_OUTPUT_URI"
    parser.add_argument("--output-uri", help=where)
    parser.add_argument("--only", nargs="+", choices=AREAS, default=AREAS, help="check only these parts")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    return parser.parse_args()


def choose_target(given: str | None, loaded: bool) -> Setup:
    """The place that the run would use, and who says so."""
    for uri, source in ((given, "--output-uri"), (os.getenv("CLEARML_OUTPUT_URI"), variable("CLEARML_OUTPUT_URI"))):
        if uri:
            return Setup(uri, source)
        if uri is not None:  # an empty one: the default
            break
    return Setup(*(storage.default_target() if loaded else ("", "default")))


def report(findings: list[Finding], as_json: bool) -> None:
    for finding in findings:
        finding.value, finding.source, finding.cure = (
            " ".join(redact(text).split()) for text in (finding.value, finding.source, finding.cure)
        )
    cures = {finding.state: f"{finding.name}: {finding.cure}" for finding in reversed(findings) if finding.cure}
    first = cures.get("failed") or cures.get("warning") or ""
    if as_json:
        well = all(finding.state != "failed" for finding in findings)
        document = {"ok": well, "cure": first, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(document, indent=2), flush=True)
        return
    colours = {"ok": 32, "warning": 33, "failed": 31, "skipped": 90}
    for finding in findings:
        state = f"{finding.state:8}"
        state = f"\033[{colours[finding.state]}m{state}\033[0m" if sys.stdout.isatty() else state
        source = f"  [{finding.source}]" if finding.source else ""
        print(f"{state} {finding.name:30} {finding.value}{source}")
    print(f"\nTry first: {first}" if first else "\nAll is well.", flush=True)


def main() -> int:
    escape_unencodable()
    args = parse_args()
    logging.getLogger("clearml").handlers = [logging.NullHandler()]  # the findings say it, in words
    logging.getLogger("clearml").propagate = False
    setup = Setup("", "")
    found: dict[str, list[Finding]] = {}

    def examine_area(area: str, skipped: str = "") -> None:
        found[area] = []
        for chain in CHAINS[area]:
            failed = skipped
            for short, check in chain:
                name = f"{area}: {short}"
                # The target is a text, which can be looked at whatever is broken.
                made = not failed or check is check_target
                finding = examine(setup, name, check) if made else Finding("skipped", failed, name=name)
                if finding:
                    found[area].append(finding)
                    failed = failed or (f"{name} failed" if finding.state == "failed" else "")

    with redirect_stdout(sys.stderr):  # what libraries print: --json is only JSON
        examine_area(AREAS[0])
        broken = [
            each.name
            for each in found[AREAS[0]]
            if each.name.endswith((": file", ": syntax")) and each.state == "failed"
        ]
        chosen = choose_target(args.output_uri, loaded=not broken)
        setup.uri, setup.source = chosen.uri, chosen.source
        bad = f"{broken[0]} failed" if broken else ""
        settings = next((each for each in found[AREAS[0]] if each.name.endswith("ClearML server")), None)
        no_server = setup.offline or bad or ("half a configuration" if settings and settings.state == "failed" else "")
        setup.offline = no_server
        skipped = {"server": no_server, "storage": bad, "machine": ""}
        threads = [
            threading.Thread(target=examine_area, args=(area, skipped[area])) for area in AREAS[1:] if area in args.only
        ]
        for thread in threads:  # side by side, because silent servers cost seconds
            thread.start()
        for thread in threads:
            thread.join()
    everything = [finding for area in AREAS for finding in found.get(area, [])]
    findings = [f for f in everything if f.name.startswith(tuple(args.only)) or f.state == "failed"]
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
