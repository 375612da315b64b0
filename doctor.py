#!/usr/bin/env python
"""Check everything that a run of pytorch_mnist.py needs, in the order in which it can go wrong.

    uv run doctor.py                                        # what .env, the environment and clearml.conf say
    uv run doctor.py --output-uri s3://host:port/bucket     # another place for the model
    uv run doctor.py --only storage --json                  # one part; for machines

A line for each check: ok, warning, failed or skipped, what was found, and where it came from. It trains nothing
and leaves nothing behind: one small object is written where the model will go, read back, compared and deleted,
by the ClearML SDK with its own configuration, because that is what uploads the model later.
"""

import argparse
import gzip
import hashlib
import importlib.metadata
import json
import logging
import os
import queue
import re
import socket
import ssl
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values, find_dotenv, load_dotenv

OUTSIDE = dict(os.environ)
DOTENV = find_dotenv()
load_dotenv(DOTENV)  # before `import clearml`, which reads variables while it is imported
FROM_DOTENV = os.environ.keys() - OUTSIDE.keys()

OUTPUT, sys.stdout = sys.stdout, sys.stderr  # what libraries print goes to stderr: --json is only JSON
SDK_ERROR: Exception | None = None  # clearml.conf cannot be read, or worse
try:
    import boto3
    import clearml.backend_api.services
    from botocore.config import Config
    from clearml.backend_api import Session
    from clearml.backend_api.utils import get_http_session_with_retry
    from clearml.config import ConfigSDKWrapper, config_obj
    from clearml.debugging.log import LoggerRoot
    from clearml.storage.helper import StorageHelper, _Boto3Driver

    config_obj.get("sdk")
except Exception as error:
    SDK_ERROR = error

HERE = Path(__file__).resolve().parent
AREAS = ("configuration", "server", "storage", "machine")
PATIENCE = 3  # seconds for one answer from the network
LIMITS = {"machine": 120}  # seconds for one check, else 15: importing torch for the first time is slow
OLDEST_SDK = "2.1.7"  # older ones talk to the server while they are imported
HOST, ACCESS, SECRET = "api.api_server", "api.credentials.access_key", "api.credentials.secret_key"
WEB, FILES = "api.web_server", "api.files_server"
ENTRIES = "sdk.aws.s3.credentials"
VARIABLES = {
    HOST: "CLEARML_API_HOST",
    ACCESS: "CLEARML_API_ACCESS_KEY",
    SECRET: "CLEARML_API_SECRET_KEY",
    WEB: "CLEARML_WEB_HOST",
    FILES: "CLEARML_FILES_HOST",
}
PACKAGES = {"s3": ("boto3", "client"), "gs": ("google-cloud-storage", "gcs"), "azure": ("azure-storage-blob", "azure")}
GOOD_URI = "s3://host:port/bucket/path, s3://bucket/path, gs://bucket/path, azure://..., a folder, or nothing"


# --- what can go wrong, in words, with a cure -----------------------------------------------------------------------
class Trouble(NamedTuple):
    words: str
    signs: str  # a regular expression for the error's text; the first trouble that fits is the one
    cure: str


PLAIN_PORT, TLS_PORT = "TLS spoken to a plain port", "plain HTTP spoken to a TLS port"
CA = f'name its authority in verify: "/path/ca.pem" ({ENTRIES}), AWS_CA_BUNDLE, or REQUESTS_CA_BUNDLE for the server'
CHECKSUM = "set AWS_REQUEST_CHECKSUM_CALCULATION=when_required: the store does not know boto3's newer uploads"
TROUBLES = [
    Trouble("name not resolved", "gaierror|NameResolution|getaddrinfo", "correct the host name, or mend DNS or VPN"),
    Trouble(PLAIN_PORT, "(?i)wrong.version.number|record layer failure", "use http:// (secure: false)"),
    Trouble("certificate file missing", "invalid path|SSL validation.*No such file", CA),
    Trouble("untrusted certificate", "(?i)certificate.verify.failed", CA),
    Trouble("unknown key", "InvalidAccessKeyId", "correct the access key: the store does not know it"),
    Trouble("signature mismatch", "SignatureDoesNotMatch", "correct the secret key: it is not the access key's"),
    Trouble("clock skew", "RequestTimeTooSkewed", "set this machine's clock (NTP)"),
    Trouble("no such bucket", "NoSuchBucket|bucket does not exist", "make the bucket, or correct its name in the URI"),
    Trouble("quota", "Quota|No space left|File too large|StorageFull|Insufficient", "free space, or raise the quota"),
    Trouble("access denied", "[Dd]enied|Forbidden|Read-only|does not have", "permit read, write and delete there"),
    Trouble("checksum not understood", "MissingContentLength|ContentSHA256Mismatch|aws-chunked|trailer", CHECKSUM),
    Trouble("time-out", "(?i)time-?out|timed out", "check host, port and firewall, and the server: nothing answers"),
    Trouble("refused", "(?i)refused", "start the server, or correct the port: nothing listens there"),
    Trouble("connection closed", "Disconnected|Connection.*closed|by peer|EOF", "check the port, and http or https"),
    Trouble("store's own error, perhaps its disk or quota", "InternalError|Unavailable|50[0-9]", "see the store's log"),
    Trouble("unclear", "", "read the error; github.com/clearml/clearml/issues may know it"),
]


def diagnose(error: object) -> Trouble:
    """The trouble that this error, or one that caused it, is a sign of."""
    text = ""
    while error:
        text += f"{type(error).__name__}: {error}\n"
        error = getattr(error, "__cause__", None) or getattr(error, "__context__", None)
    return next(trouble for trouble in TROUBLES if re.search(trouble.signs, text))


# --- checks and findings --------------------------------------------------------------------------------------------
@dataclass
class Finding:
    state: str  # ok, warning, failed or skipped
    value: str
    source: str = ""  # file and key, variable, or default
    cure: str = ""
    name: str = ""


class Failed(Exception):  # noqa: N818
    """Raised by a check: what is wrong, the cure, and where the value came from."""

    def __init__(self, value: str, cure: str, source: str = "") -> None:
        super().__init__(value)
        self.finding = Finding("failed", value, source, cure)


class Skipped(Exception):  # noqa: N818
    """Raised by a check that cannot be made."""


@dataclass
class Setup:
    """What the checks tell each other."""

    uri: str
    uri_source: str
    offline: str = ""  # why no server is used
    kind: str = ""  # of the target: s3, gs, azure, folder or files
    folder: Path = HERE
    entry: str = ""  # the entry of sdk.aws.s3.credentials that is used
    s3: Any = None  # the SDK's S3BucketConfig
    client: Any = None  # boto3's, for it
    answer: Any = None  # of the server's debug.ping
    claims: dict[str, Any] = field(default_factory=dict)  # of the server's token


Function = Callable[[Setup], Finding | None]


class Check(NamedTuple):
    name: str
    needs: tuple[str, ...]  # it is skipped where one of these failed or was skipped
    kind: str  # the only kind of target that it is for
    function: Function


CHECKS: list[Check] = []


def check(name: str, *needs: str, kind: str = "") -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        CHECKS.append(Check(name, needs, kind, function))
        return function

    return register


def ok(value: str, source: str = "") -> Finding:
    return Finding("ok", value, source)


def warning(value: str, cure: str, source: str = "") -> Finding:
    return Finding("warning", value, source, cure)


def blame(error: Exception, what: str, source: str = "", cure: str = "") -> Failed:
    """The failure that an error means, in words, with the error's own text."""
    trouble = diagnose(error)
    return Failed(f"{what}: {trouble.words} ({str(error)[:300]})", cure or trouble.cure, source)


def bounded(seconds: float, function: Callable[[], Any]) -> Any:
    """The function's result, or TimeoutError: not everything in the libraries below takes a time-out."""
    answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((function(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True, name="bounded").start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"timed out after {seconds} s") from None
    if error:
        raise error
    return result


def examine(setup: Setup, item: Check, earlier: dict[str, Finding]) -> Finding | None:
    """Make one check. Whatever it raises becomes a finding, and the next check is made."""
    if item.kind and item.kind != setup.kind:
        return None
    area = item.name.partition(":")[0]
    bad = [earlier[need] for need in item.needs if need in earlier and earlier[need].state in ("failed", "skipped")]
    try:
        if setup.offline and area == "server":
            raise Skipped(setup.offline)
        if bad:
            raise Skipped(bad[0].value if bad[0].state == "skipped" else f"{bad[0].name} failed")
        finding: Finding | None = bounded(LIMITS.get(area, 15), lambda: item.function(setup))
    except Failed as failure:
        finding = failure.finding
    except Skipped as reason:
        finding = Finding("skipped", str(reason))
    except Exception as error:
        finding = blame(error, type(error).__name__).finding
    if finding:
        finding.name = item.name
    return finding


# --- where values come from -----------------------------------------------------------------------------------------
def nice(path: str | Path) -> str:
    return re.sub(f"^{re.escape(str(Path.home()))}(?=/|$)", "~", str(path))


def variable(name: str) -> str:
    return f"{name}, {nice(DOTENV) if name in FROM_DOTENV else 'environment'}"


def config_file() -> tuple[Path, str]:
    """The one file that the SDK reads, whether it exists or not, and why that one."""
    for name in ("CLEARML_CONFIG_FILE", "TRAINS_CONFIG_FILE"):
        if value := os.getenv(name, "").strip():
            return Path(value).expanduser(), variable(name)
    return Path.home() / "clearml.conf", "default"


def in_file(key: str) -> str:
    return f"{key}, {nice(config_file()[0])}"


def origin(key: str, default: str = "default") -> str:
    """Where the SDK takes this setting from: a variable beats the file."""
    name = VARIABLES[key]
    return variable(name) if os.getenv(name) else in_file(key) if config_obj.get(key, "") else default


def setting(key: str) -> str:
    return str(os.getenv(VARIABLES[key], "").strip() or config_obj.get(key, "") or "").strip()


def last4(key: str) -> str:
    return f"...{key[-4:]}" if len(key) > 12 else "..."


# --- configuration --------------------------------------------------------------------------------------------------
@check("configuration: .env")
def dotenv(_: Setup) -> Finding:
    if not DOTENV:
        return ok("none", f"{nice(HERE)} and above")
    values = dotenv_values(DOTENV).items()
    if beaten := ", ".join(name for name, value in values if value and OUTSIDE.get(name, value) != value):
        return warning(f"another value in the environment wins: {beaten}", f"unset {beaten}", nice(DOTENV))
    return ok(f"sets {', '.join(sorted(FROM_DOTENV)) or 'nothing'}", nice(DOTENV))


@check("configuration: file")
def file(_: Setup) -> Finding:
    path, why = config_file()
    if not path.is_file() and why != "default":
        raise Failed(f"{nice(path)} does not exist", f"correct or unset {why.partition(',')[0]}", why)
    likely = [Path.home() / ".clearml.conf", Path.home() / "clearml.conf", HERE / "clearml.conf", Path("clearml.conf")]
    ignored = {nice(other.absolute()) for other in likely if other.is_file() and other.resolve() != path.resolve()}
    text = nice(path) if path.is_file() else f"no {nice(path)}"
    if ignored - {"~/clearml.conf"} or (ignored and why == "default"):
        names = " and ".join(sorted(ignored))
        return warning(
            f"{text}; {names} is not read", f"mv {min(ignored)} {nice(path)}, or set CLEARML_CONFIG_FILE", why
        )
    return ok(text + "".join(f"; {name} is not read" for name in ignored), why)


@check("configuration: syntax")
def syntax(_: Setup) -> Finding | None:
    path = nice(config_file()[0])
    if SDK_ERROR:
        line, kind = getattr(SDK_ERROR.__cause__, "lineno", None), type(SDK_ERROR).__name__
        if line:  # the error's own text may quote the file, secrets included
            raise Failed(f"syntax error, line {line}", f"correct {path} at or above line {line}: quote, bracket?", path)
        if isinstance(SDK_ERROR, UnicodeError | PermissionError):
            raise Failed(f"not readable ({kind})", f"make {path} a readable text file (UTF-8)", path)
        raise Failed(f"the SDK does not start ({kind}: {SDK_ERROR})", "uv sync, then read the error")
    return ok("parsed", path) if config_file()[0].is_file() else None


@check("configuration: ClearML server", "configuration: syntax")
def server_settings(setup: Setup) -> Finding:
    missing = [f"{key} ({VARIABLES[key]})" for key in (HOST, ACCESS, SECRET) if not setting(key)]
    if Session._offline_mode:
        setup.offline = "CLEARML_OFFLINE_MODE is set"
        return warning("runs are recorded offline", "unset CLEARML_OFFLINE_MODE", variable("CLEARML_OFFLINE_MODE"))
    if len(missing) == 3:
        setup.offline = "no server is configured"
        cure = "uv run clearml-init writes ~/clearml.conf, if you have a server"
        return warning("no configuration: runs are recorded offline", cure)
    if missing:
        names = " and ".join(missing)
        raise Failed(f"half a configuration, no {names}", f"add {names} to {nice(config_file()[0])} or .env")
    sources = "; ".join(dict.fromkeys(origin(key) for key in (HOST, ACCESS, SECRET)))
    return ok(f"{setting(HOST)}, access key {last4(setting(ACCESS))}, secret key set", sources)


@check("configuration: overrides", "configuration: syntax")
def overrides(_: Setup) -> Finding | None:
    """Variables that beat another value in the file. The values are not shown, since some are secret."""
    both = {name: key for key, name in VARIABLES.items() if os.getenv(name) and config_obj.get(key, "")}
    if not (beaten := [name for name, key in both.items() if os.environ[name] != config_obj.get(key)]):
        return None
    text = "; ".join(f"{name} beats {both[name]}" for name in beaten)
    return warning(text, f"unset {' '.join(beaten)} if the file is right", "; ".join(map(variable, beaten)))


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
        raise Failed(f"{url}: no address", "write http://host:port or https://host", source)
    try:
        port = parts.port or (443 if https else 80)
        address = bounded(PATIENCE, lambda: socket.getaddrinfo(host, port))[0][4][0]
        tls = speaks_tls(host, port)
    except Exception as error:
        raise blame(error, url, source) from error
    if tls is not None and tls != https:
        right = url.replace(parts.scheme, "https" if tls else "http", 1)
        raise Failed(f"{url}: {TLS_PORT if tls else PLAIN_PORT}", cure or f"write {right}", source)
    return f"{url} ({address})"


def http(url: str, source: str, **options: Any) -> Any:
    """GET as the SDK does it, with its certificate settings, but once and with little patience."""
    try:
        return get_http_session_with_retry(total=0, config=config_obj).get(url, timeout=PATIENCE, **options)
    except Exception as error:
        raise blame(error, url, source) from error


def is_page(answer: Any) -> bool:
    return bool(re.search("(?i)<html|<title|<!doctype html", answer.text[:1000]))


@check("server: address", "configuration: ClearML server")
def server_address(_: Setup) -> Finding:
    return ok(reach(Session.get_api_server_host(), origin(HOST)), origin(HOST))


@check("server: API", "server: address")
def api(setup: Setup) -> Finding:
    url = Session.get_api_server_host()
    answer = setup.answer = http(f"{url}/debug.ping", origin(HOST))
    try:
        if answer.json()["meta"]["endpoint"]["name"] == "debug.ping":
            return ok("debug.ping answers", origin(HOST))
    except (ValueError, KeyError, TypeError):
        pass
    known = {setting(WEB).rstrip("/"): "the web UI", setting(FILES).rstrip("/"): "the file server"}
    page = "a web page, perhaps the web UI" if is_page(answer) else "something else"
    cure = "set the address of the API server: port 8008, or the name that begins with api."
    raise Failed(f"{url} is {known.get(url, page)}, not ClearML's API (HTTP {answer.status_code})", cure, origin(HOST))


@check("server: clock", "server: API")
def clock(setup: Setup) -> Finding:
    if not (date := setup.answer.headers.get("Date")):
        raise Skipped("the server sends no date")
    skew = time.time() - parsedate_to_datetime(date).timestamp()
    text = f"{skew:+.0f} s from the server's"
    return warning(text, "set both clocks (NTP)") if abs(skew) > 60 else ok(text)


@check("server: keys", "server: API")
def server_keys(setup: Setup) -> Finding:
    answer = http(f"{Session.get_api_server_host()}/auth.login", origin(HOST), auth=(setting(ACCESS), setting(SECRET)))
    key = f"access key {last4(setting(ACCESS))}"
    if answer.status_code == 401:
        cure = "make new credentials in the web UI (Settings, Workspace) and copy both keys"
        raise Failed(f"{key} and its secret are not accepted", cure, origin(ACCESS))
    answer.raise_for_status()
    setup.claims = Session.get_decoded_token(answer.json()["data"]["token"])
    user = setup.claims.get("identity", {})
    return ok(f"{key} is user {user.get('user_name') or user.get('user')}", origin(ACCESS))


@check("server: version", "server: keys")
def server_version(setup: Setup) -> Finding:
    """The SDK has calls for some versions of the API, and takes the newest that the server has, too."""
    folders = Path(clearml.backend_api.services.__path__[0]).glob("v*")
    known = sorted(tuple(map(int, folder.name[1:].split("_"))) for folder in folders)
    theirs = tuple(map(int, str(setup.claims.get("api_version", "2.9")).split(".")))
    text = f"server {setup.claims.get('server_version')} with API {'.'.join(map(str, theirs))}, SDK {sdk_version()}"
    if theirs < known[0]:
        raise Failed(f"{text}: this SDK cannot talk to it", "update the server")
    if theirs < known[-1]:
        return warning(f"{text}: the SDK knows newer calls", "update the server")
    return ok(text)


@check("server: web server", "configuration: ClearML server")
def web_server(_: Setup) -> Finding:
    source = origin(WEB, "from api.api_server")
    try:
        url = Session.get_app_server_host()
        if is_page(http(url, source)):
            return ok(url, source)
        problem = f"{url} is no web page"
    except (Failed, ValueError) as error:
        problem = str(error)
    return warning(problem, f"set {WEB} ({VARIABLES[WEB]}): the links that a run prints use it", source)


@check("server: file server", "configuration: ClearML server")
def file_server(_: Setup) -> Finding:
    url, source = Session.get_files_server_host(), origin(FILES, "from api.api_server")
    cure = f"set {FILES} ({VARIABLES[FILES]}): port 8081, or the name that begins with files."
    text = reach(url, source)
    answer = http(url, source)
    if answer.status_code != 200 or is_page(answer):
        raise Failed(f"{url} is not ClearML's file server (HTTP {answer.status_code})", cure, source)
    return ok(text, source)


@check("server: file server's object", "server: file server", "server: keys")
def file_server_object(_: Setup) -> Finding:
    return prove(Session.get_files_server_host())


# --- storage --------------------------------------------------------------------------------------------------------
class Log(logging.Handler):
    """What the SDK only logs: the true reason of a failure. One thread's, because checks run side by side."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines, self.of = list[str](), threading.get_ident()
        logging.getLogger("clearml.storage").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.of:
            self.lines.append(record.getMessage())


def sdk_helper(uri: str, log: Log) -> Any:
    """The SDK's own connection to this place, which it makes for an upload, too."""
    if helper := StorageHelper.get(uri):
        return helper
    raise ValueError("; ".join(log.lines) or "the SDK cannot use it")


def prove(folder: str) -> Finding:
    """Write, read, compare and delete one object through the SDK, as an upload would go."""
    begin, uri = time.perf_counter(), f"{folder.rstrip('/')}/doctor-{uuid.uuid4().hex}.txt"
    log, step, left = Log(), "write", False
    helper = sdk_helper(uri, log)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            sent, got = Path(temporary, "sent.txt"), Path(temporary, "got.txt")
            sent.write_text(uri)
            left = True  # from here on it may be there, whatever the answer
            helper.upload(str(sent), uri, retries=1)
            step = "read"
            path = helper.download_to_file(uri, str(got), overwrite_existing=True)
            if Path(path or got).read_bytes() != sent.read_bytes():
                raise ValueError("what comes back is not what was written")
        step = "delete"
        left = not helper.delete(uri)
        if left:
            raise ValueError(f"{uri} is still there")
        return ok(f"written, read, compared, deleted in {time.perf_counter() - begin:.2f} s", nice(folder))
    except Exception as error:
        raise blame(RuntimeError("; ".join([*log.lines, str(error)])), step, nice(folder)) from error
    finally:
        with suppress(Exception):  # if this fails, then because nothing is there, or for the reason given above
            if left:
                helper.delete(uri, silent=True)


@check("storage: target")
def target(setup: Setup) -> Finding:
    uri, source, parts = setup.uri, setup.uri_source, urlsplit(setup.uri)
    if not uri or (parts.scheme.startswith("http") and not SDK_ERROR and uri.startswith(setting(FILES) or "-")):
        setup.kind = "files"
        return ok(uri or "empty: the ClearML server's file server", source)
    if "@" in parts.netloc:
        raise Failed("credentials inside the URI", f"take them out; they belong in {ENTRIES} or .env", source)
    if parts.scheme == "file" and uri.startswith("file:///"):
        setup.kind, setup.folder = "folder", Path(unquote(parts.path))
    elif "://" not in uri and not re.match(r"(s3|gs|azure|file|https?):", uri):
        setup.kind, setup.folder = "folder", Path(uri).expanduser()
    elif "://" not in uri or parts.scheme not in PACKAGES:
        raise Failed(f"{uri}: no kind of storage", f"write {GOOD_URI}", source)
    elif not parts.netloc or ((":" in parts.netloc or parts.scheme == "azure") and not parts.path.strip("/")):
        raise Failed(f"{uri}: no bucket", f"write {GOOD_URI}", source)
    else:
        setup.kind = parts.scheme
        return ok(uri, source)
    if setup.folder.exists() and not setup.folder.is_dir():
        raise Failed(f"{nice(setup.folder)} is not a folder", "name a folder", source)
    if not setup.folder.parent.is_dir():
        folder = nice(setup.folder.parent)
        raise Failed(f"{folder} does not exist", f"mkdir -p {folder}, or mount it", source)
    return ok(f"folder {nice(setup.folder)}{'' if setup.folder.exists() else ', will be made'}", source)


@check("storage: library", "storage: target")
def library(setup: Setup) -> Finding | None:
    if setup.kind not in PACKAGES:
        return None
    package, group = PACKAGES[setup.kind]
    try:
        return ok(f"{package} {importlib.metadata.version(package)}")
    except importlib.metadata.PackageNotFoundError:
        raise Failed(f"{package} is not installed", f"uv sync --group {group}") from None


def bucket_name(setup: Setup) -> str:
    parts = urlsplit(setup.uri)
    return parts.path.strip("/").partition("/")[0] if setup.s3.host else parts.netloc


@check("storage: entry", "storage: library", "configuration: syntax", kind="s3")
def entry(setup: Setup) -> Finding:
    """Which entry of sdk.aws.s3.credentials the SDK uses for this URI; if none, the nearest, and why not.

    The SDK compares beginnings: an entry for "minio" or "minio:90" is taken for s3://minio:9000, with its own port.
    """
    path, parts = nice(config_file()[0]), urlsplit(setup.uri)
    wanted, (host, _, port) = parts.netloc, parts.netloc.partition(":")
    entries = [{"host": "", "bucket": "", **item} for item in config_obj.get(ENTRIES, None) or []]
    try:
        configurations = StorageHelper._s3_configurations
        used = setup.s3 = configurations.get_config_by_uri(setup.uri)
    except (TypeError, ValueError) as error:
        cure = f"correct {ENTRIES} in {path}; host is host:port without http://"
        raise Failed(f"the SDK cannot use it: {error}", cure, path) from error
    if any(used is known for known in configurations._buckets):
        same = [(item["host"], item["bucket"].strip("/")) == (used.host, used.bucket) for item in entries]
        setup.entry = f"{ENTRIES}[{same.index(True) if True in same else '?'}], {path}"
        if used.host and used.host.lower() != wanted.lower():
            why = "its port differs" if ":" in used.host else "the port is missing"
            raise Failed(f"host {used.host!r} is taken for {wanted}: {why}", f'write host: "{wanted}"', setup.entry)
        if used.bucket and used.bucket != bucket_name(setup):
            raise Failed(f"bucket {used.bucket!r} is taken for {setup.uri}", "write the whole name", setup.entry)
        place = used.host or f"bucket {used.bucket}"
        return ok(f"{place}, secure: {used.secure}, verify: {used.verify}", setup.entry)
    hosts = [item["host"] for item in entries if item["host"]]
    same_name = [other for other in hosts if other.partition(":")[0].lower() == host.lower()]
    if wanted in hosts:
        why, cure = "dropped in silence, without key and secret", "add key and secret, or use_credentials_chain: true"
    elif same_name:
        why, cure = f"{same_name[0]!r} {'has another port' if port else 'has a port'}", "use one and the same host:port"
    elif hosts and port:
        why, cure = f"{hosts[0]!r} is another host", f'add an entry with host: "{wanted}"'
    elif port:
        why, cure = "there are no entries", f'add an entry with host: "{wanted}", key, secret, secure'
    else:
        return ok("none for this bucket: the defaults", path)
    if port and used.key and used.secret and speaks_tls(host, int(port)):
        return warning(f"none for {wanted}: {why}; the defaults, over https, are used", cure, path)
    raise Failed(f"none for {wanted}: {why}", f"{cure} ({ENTRIES}, {path})", path)


@check("storage: credentials", "storage: entry", kind="s3")
def credentials(setup: Setup) -> Finding:
    """By kind and last four characters. The SDK lets boto3 search only where it is told so: hurry_sdk."""
    used = setup.s3
    if used.key and used.secret and not used.use_credentials_chain:
        default = in_file("sdk.aws.s3.key") if config_obj.get("sdk.aws.s3.key", "") else variable("AWS_ACCESS_KEY_ID")
        kind = "temporary" if used.token else "static"
        return ok(f"{kind} keys, access key {last4(used.key)}", setup.entry or default)
    try:
        found = boto3.Session(profile_name=used.profile or None).get_credentials()
    except Exception as error:
        raise Failed(str(error), "correct AWS_PROFILE, or add it to ~/.aws/credentials") from error
    if not found:
        raise Failed("no keys, boto3 finds none either", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an entry")
    return ok(f"boto3 finds {found.method}, access key {last4(found.access_key)}", setup.entry or "default")


def s3_client(setup: Setup) -> Any:
    """A client with exactly the arguments that the SDK's own has, but little patience."""
    if setup.client:
        return setup.client
    options = _Boto3Driver._get_boto_resource_kwargs_from_config(setup.s3)
    patience = Config(connect_timeout=PATIENCE, read_timeout=PATIENCE, retries={"total_max_attempts": 1})
    options["config"] = options["config"].merge(patience)
    setup.client = boto3.Session(profile_name=setup.s3.profile or None).resource("s3", **options).meta.client
    return setup.client


@check("storage: endpoint", "storage: credentials", kind="s3")
def endpoint(setup: Setup) -> Finding:
    url = s3_client(setup).meta.endpoint_url
    named = "AWS_ENDPOINT_URL" if os.getenv("AWS_ENDPOINT_URL") else ""
    source = setup.entry or (variable(named) if named else "default")
    secure = f"secure: {str(not url.startswith('https')).lower()} in {ENTRIES}"
    text = reach(url, source, secure if setup.s3.host else "")
    if url.startswith("https") and setup.s3.verify is False:
        return warning(f"{text}, certificate not checked", 'verify: "/path/ca.pem" instead of false', source)
    return ok(text, source)


@check("storage: bucket", "storage: endpoint", kind="s3")
def bucket(setup: Setup) -> Finding:
    """Looked at before anything is written: some stores make a missing bucket on the first upload."""
    name = bucket_name(setup)
    try:
        s3_client(setup).list_objects_v2(Bucket=name, MaxKeys=1)
    except Exception as error:
        if diagnose(error).words == "access denied":  # to list is a permission that an upload does not need
            return ok(f"{name}, which these keys may not list")
        raise blame(error, name, setup.entry) from error
    return ok(name)


@check("storage: Google credentials", "storage: library", "configuration: syntax", kind="gs")
def google(_: Setup) -> Finding:
    name, emulator = "GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST"
    if os.getenv(emulator):
        return ok(f"none, an emulator at {os.environ[emulator]}", variable(emulator))
    if config_obj.get("sdk.google.storage.credentials_json", ""):
        return ok("service account", in_file("sdk.google.storage.credentials_json"))
    import google.auth

    try:
        found, _project = google.auth.default()
    except Exception as error:
        raise Failed(str(error), f"gcloud auth application-default login, or {name}=key.json") from error
    return ok(type(found).__name__, variable(name) if os.getenv(name) else "application default credentials")


@check("storage: Google bucket", "storage: Google credentials", kind="gs")
def google_bucket(setup: Setup) -> Finding:
    place = sdk_helper(setup.uri, Log())._container.bucket
    if not place.exists(timeout=PATIENCE, retry=None):
        raise Failed(f"{place.name}: no such bucket", "make the bucket, or correct its name in the URI")
    return ok(place.name)


@check("storage: Azure account", "storage: library", "configuration: syntax", kind="azure")
def azure(setup: Setup) -> Finding:
    """Never tried against Azure itself."""
    used, key = StorageHelper._azure_configurations.get_config_by_uri(setup.uri), "sdk.azure.storage.containers"
    if not used or not (used.account_name and (used.account_key or used.use_default_credential)):
        cure = f"add it to {key} in {nice(config_file()[0])}, or set AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY"
        raise Failed("no account and key for this container", cure)
    return ok(f"{used.account_name}, {reach(f'https://{urlsplit(setup.uri).netloc}', '')}")


@check("storage: object", "configuration: syntax", *(item.name for item in CHECKS if item.name.startswith("storage")))
def stored_object(setup: Setup) -> Finding | None:
    if setup.kind == "files":
        return None  # "server: file server's object" is the same
    if setup.kind != "folder":
        return prove(setup.uri)
    new = not setup.folder.exists()
    try:
        setup.folder.mkdir(exist_ok=True)
        return prove(str(setup.folder.resolve()))
    finally:
        if new and setup.folder.is_dir():
            setup.folder.rmdir()


# --- machine --------------------------------------------------------------------------------------------------------
def sdk_version() -> str:
    return importlib.metadata.version("clearml")


@check("machine: packages")
def packages(_: Setup) -> Finding:
    text = f"Python {sys.version.split()[0]}, clearml {sdk_version()}, boto3 {importlib.metadata.version('boto3')}"
    found, oldest = (tuple(map(int, re.findall(r"\d+", version)[:3])) for version in (sdk_version(), OLDEST_SDK))
    return ok(text) if found >= oldest else warning(f"{text}: clearml is too old", "uv sync")


@check("machine: torch")
def torch_device(_: Setup) -> Finding:
    import torch

    best = torch.accelerator.current_accelerator(check_available=True)
    torch.ones(1, device=best or "cpu").item()
    device = f"{torch.accelerator.device_count()} x {best.type}" if best else "no accelerator"
    return ok(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} CPU threads")


@check("machine: MNIST")
def mnist(_: Setup) -> Finding:
    """The published files by their sums, and the unpacked ones by their size, which an interrupted run cuts short."""
    folder = HERE / "data" / "MNIST" / "raw"
    published = re.findall(r"(\S+\.gz) \| [\d,]+ \| (\w{32})", (HERE / "data/README.md").read_text())
    missing, bad = [], []
    for name, md5 in published:  # torchvision has them too, and takes seconds to import
        packed, plain = folder / name, folder / Path(name).stem
        if not packed.is_file():
            missing.append(name)
        elif hashlib.md5(packed.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            bad.append(packed)
        elif plain.is_file() and plain.stat().st_size != len(gzip.decompress(packed.read_bytes())):
            bad.append(plain)
    if bad:
        names = ", ".join(path.name for path in bad)
        raise Failed(f"damaged: {names}", f"rm {' '.join(map(nice, bad))}: a run makes them again", nice(folder))
    if missing:
        return warning(f"missing: {', '.join(missing)}", "let the first run download them", nice(folder))
    return ok("4 files, whole", nice(folder))


# --- main -----------------------------------------------------------------------------------------------------------
def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check the whole set-up: configuration, ClearML server, storage, machine. Leaves nothing behind.",
        epilog="Example: uv run doctor.py --output-uri s3://localhost:9000/models. "
        "Exit code 0: all well, perhaps with warnings; 1: something failed; 2: wrong arguments.",
    )
    parser.add_argument("--output-uri", help=f"where the model goes: {GOOD_URI}; default: CLEARML_OUTPUT_URI")
    parser.add_argument("--only", nargs="+", choices=AREAS, default=AREAS, help="check only these parts")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    with redirect_stdout(OUTPUT):  # --help
        return parser.parse_args()


def choose_target(given: str | None) -> Setup:
    """The place that pytorch_mnist.py would use, and who says so."""
    if given is not None:
        return Setup(given, "--output-uri")
    for name in ("CLEARML_OUTPUT_URI", "CLEARML_DEFAULT_OUTPUT_URI"):
        if os.getenv(name):
            return Setup(os.environ[name], variable(name))
    key = "sdk.development.default_output_uri"
    value = "" if SDK_ERROR else str(config_obj.get(key, None) or "")
    return Setup(value, in_file(key) if value else "default")


def hurry_sdk() -> None:
    """By default the SDK retries for hours. Here one try is enough."""
    retries = dict.fromkeys(("total", "connect", "read", "redirect", "status"), 1)
    boto3_options = {"connect_timeout": PATIENCE, "read_timeout": PATIENCE}
    chain = not config_obj.get("sdk.aws.s3.key", "")  # so does pytorch_mnist.py, for profiles and roles
    aws = {"boto3": boto3_options, "s3": {"use_credentials_chain": chain}}
    config_obj.set_overrides({"sdk": {"aws": aws}, "api": {"http": {"retries": retries}}})
    ConfigSDKWrapper.clear_config_impl()
    os.environ["AWS_MAX_ATTEMPTS"] = "1"
    LoggerRoot.get_base_logger().handlers = [logging.NullHandler()]  # the findings say it, in words


def redact(text: str) -> str:
    """Without secrets, whatever message they stand in; access keys by their end; on one line."""
    values: list[tuple[Any, Any]] = [
        pair for pair in os.environ.items() if re.match("AWS|AZURE|CLEARML|TRAINS", pair[0])
    ]
    if not SDK_ERROR:
        values += [("", config_obj.get("api")), ("", config_obj.get("sdk"))]
    hidden = {}
    for name, value in values:  # the list grows while it is read: a tree's branches come after it
        if isinstance(value, dict | list):
            values += value.items() if isinstance(value, dict) else [(name, item) for item in value]
        elif isinstance(value, str) and len(value) > 3:
            if re.search("(?i)secret|password|token|account_key|credentials_json$", name):
                hidden[value] = "***"
            elif re.search("(?i)access_key|^key$", name):
                hidden[value] = last4(value)
    for value in sorted(hidden, key=len, reverse=True):
        text = text.replace(value, hidden[value])
    return " ".join(re.sub(r"://[^/@\s]*@", "://***@", text).split())


def report(findings: list[Finding], as_json: bool) -> None:
    for finding in findings:
        finding.value, finding.source, finding.cure = map(redact, (finding.value, finding.source, finding.cure))
    cures = {finding.state: f"{finding.name}: {finding.cure}" for finding in reversed(findings) if finding.cure}
    first = cures.get("failed") or cures.get("warning") or ""
    if as_json:
        well = all(finding.state != "failed" for finding in findings)
        document = {"ok": well, "cure": first, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(document, indent=2), file=OUTPUT, flush=True)
        return
    colours = {"ok": 32, "warning": 33, "failed": 31, "skipped": 90}
    for finding in findings:
        state = f"{finding.state:8}"
        state = f"\033[{colours[finding.state]}m{state}\033[0m" if OUTPUT.isatty() else state
        source = f"  [{finding.source}]" if finding.source else ""
        print(f"{state} {finding.name:30} {finding.value}{source}", file=OUTPUT)
    print(f"\nTry first: {first}" if first else "\nAll is well.", file=OUTPUT, flush=True)


def main() -> int:
    args = parse_args()
    setup = choose_target(args.output_uri)
    if not SDK_ERROR:
        hurry_sdk()
    found: dict[str, Finding] = {}

    def examine_area(area: str) -> None:
        for item in CHECKS:
            if item.name.startswith(area) and (finding := examine(setup, item, found)):
                found[item.name] = finding

    examine_area(AREAS[0])
    threads = [threading.Thread(target=examine_area, args=(area,)) for area in AREAS[1:] if area in args.only]
    for thread in threads:  # side by side, because silent servers cost seconds
        thread.start()
    for thread in threads:
        thread.join()
    shown = [found[item.name] for item in CHECKS if item.name in found]
    findings = [f for f in shown if f.name.startswith(tuple(args.only)) or f.state == "failed"]
    report(findings, args.json)
    for thread in threading.enumerate():
        if thread.name == "bounded":  # given up, but it may still have to delete its object
            thread.join(2 * PATIENCE)
    return int(any(finding.state == "failed" for finding in findings))


if __name__ == "__main__":
    code = main()
    os._exit(code)  # not sys.exit: a library's thread may still wait for a silent server
