"""Stores of objects, opened as the SDK's configuration has them: look, compare, list, delete.

Each tells "not there" from "forbidden" and "no answer", which the SDK does not, and names the cure. The caller names
the place. The SDK uploads, and these clients look: a check must not share the fault that it is to find.
"""

import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit
from uuid import uuid4

from clearml import StorageManager

from clearml_client import sdk, server
from clearml_client.configuration import FILES, VARIABLES, display_path, in_file, origin, variable
from clearml_client.errors import DENIED, RunError, call_with_timeout, diagnose, last4, one_line
from clearml_client.server import TIMEOUT

Result = TypeVar("Result")
GOOD_URI = "s3://host:port/bucket/path, s3://bucket/path, gs://bucket/path, azure://..., a folder, or nothing"
PLAIN_HTTP = "; plain http is secure: false in the entry of clearml.conf"
ENTRIES = "sdk.aws.s3.credentials"
PACKAGES = {"s3": ("boto3", "client"), "gs": ("google-cloud-storage", "gcs"), "azure": ("azure-storage-blob", "azure")}
STEP = 30  # seconds for each step of a check: where a store answers, the SDK may try again, with pauses
NO_RETRIES: dict[str, Any] = {"timeout": TIMEOUT, "retry": None}  # for Google's library
CHUNK = 2**20  # bytes
OPENING = Lock()  # a session of boto3's is for one thread at a time
ELSEWHERE = "for another store than Amazon S3 write s3://host:port/bucket/path, or set AWS_ENDPOINT_URL"
LIST_CURE = "allow s3:GetObject and s3:ListBucket: without the latter a missing object looks forbidden"


class StorageError(RunError):
    """What a store said no to."""


def http_status(error: object) -> int:
    """Return what boto3, Google's library, requests and the file system mean, as an HTTP status; 0: no answer."""
    if isinstance(error, OSError) and error.errno and not hasattr(error, "response"):
        return {FileNotFoundError: 404, PermissionError: 403}.get(type(error), 500)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    return int(getattr(response, "status_code", 0) or getattr(error, "code", 0) or 0)


# --- where an address points ------------------------------------------------------------------------------------------
def check_uri(text: str) -> None:
    """Raise RunError for what is no place for objects."""
    parts, cure = urlsplit(text), f"write {GOOD_URI}"
    folder = Path(text.removeprefix("file://")).expanduser().absolute()  # %20 is no blank: so the SDK has it
    if "@" in parts.netloc:
        words = "the URI holds credentials, which it must not"
        raise RunError(words, f"move them to {ENTRIES} in clearml.conf, or to .env")
    if parts.scheme in PACKAGES and text.startswith(parts.scheme):
        if not parts.netloc or ((":" in parts.netloc or parts.scheme == "azure") and not parts.path.strip("/")):
            raise RunError(f"no bucket: {parts.scheme}://bucket/path or s3://host:port/bucket/path", cure)
        if "//" in parts.path:
            raise RunError("a double slash, which stores and ClearML read differently", "write one slash")
    elif parts.scheme not in ("", "file") or parts.netloc:
        cure += PLAIN_HTTP * parts.scheme.startswith("http")
        raise RunError("neither s3://, gs://, azure:// nor a folder whose parent exists", cure)
    elif text and not folder.is_dir():
        if not re.search(r"[/\\]", text):  # more likely a slip: undefined, null, a bucket's name
            raise RunError(f"no folder {text} here", f"write ./{text} if it is to be made, or {GOOD_URI}")
        if folder.exists() or not folder.parent.is_dir():
            parent = display_path(folder.parent)
            raise RunError(f"{folder} is no folder whose parent exists", f"mkdir -p {parent}, or mount it")


def file_server() -> str:
    """Return the address of the ClearML file server. Raise RunError where the configuration has none."""
    url = str(StorageManager.get_files_server() or "").rstrip("/")
    if "://" not in url:
        cure = f"set {FILES} ({VARIABLES[FILES]}), or --output-uri"
        raise RunError(f"{FILES} is {url!r}: no address; {cure}", cure, origin(FILES))
    return url


def default_target() -> tuple[str, str]:
    """Return where objects go if nothing else is said, and who says so. Raise RunError where there is no such place."""
    name, key = "CLEARML_DEFAULT_OUTPUT_URI", "sdk.development.default_output_uri"
    by_variable = os.getenv(name)
    value = str(by_variable or sdk.setting(key, "") or "true")
    if value.lower() == "true":
        return file_server(), origin(FILES, "from api.api_server")
    return value, variable(name) if by_variable else in_file(key)


# --- stores -----------------------------------------------------------------------------------------------------------
@dataclass
class Store:
    """A place for objects, here any that the SDK knows, and a subclass for each that tells more by its own client."""

    name: str  # the address of the place: with "/" and a key it is that of an object
    bucket: Any = None  # boto3's, or that of Google's library
    source: str = ""  # what in the configuration opened it
    url: str = ""  # where requests go, if by HTTP
    keys: str = ""  # the ones by which it was opened
    suspicion: RunError | None = None  # what in the configuration may be why it says no
    trouble: str = ""  # why nothing more is asked of it
    timeout: float = 0  # seconds for one step; 0: as long as the client itself waits

    def _size(self, key: str) -> int:
        size = StorageManager.get_file_size_bytes(f"{self.name}/{key}")
        if size is None:  # or it is forbidden
            raise FileNotFoundError(2, "not there", key)
        return int(size)

    def _open(self, key: str) -> Any:
        copy = StorageManager.get_local_copy(f"{self.name}/{key}", extract_archive=False, force_download=True)
        return open(copy, "rb")

    def _keys(self, prefix: str) -> Iterator[str]:
        return iter(())  # of a store that cannot list

    def _look(self) -> bool:
        return True  # or the bucket is missing, which some stores make on the first upload

    def _remove(self, key: str) -> None:
        if not StorageManager.storage_helper.get(self.name).delete(f"{self.name}/{key}"):
            raise PermissionError(13, "cannot be deleted", key)

    def key(self, address: str) -> str:
        return address[len(self.name) :].lstrip("/")

    def tidy(self, key: str, task: str) -> None:
        """Remove what an object leaves behind when it goes: folders, where there are such things."""

    def attempt(self, verb: str, action: Callable[[], Result], again: bool = True) -> Result | None:
        """Return what the action returns; None where there is no such object. Raise StorageError otherwise."""
        if self.trouble:
            raise StorageError(f"cannot {verb}: {self.trouble}")
        try:
            return call_with_timeout(self.timeout, "time-out", action) if self.timeout else action()
        except RunError:
            raise  # of the ClearML server, and complete
        except Exception as error:
            status, trouble = http_status(error), diagnose(error)
            if again and trouble.words == "connection closed":  # by the store, while the client kept it
                return self.attempt(verb, action, again=False)
            if status == 404 and trouble.words != "no such bucket":
                return None
            meaning = {0: "no answer", 401: "wrong keys", 403: "forbidden", 404: "not there"}.get(status, "refused")
            reason = f"cannot {verb}: {meaning}: {trouble.words} ({one_line(error)}){server.proxy_note(self.url)}"
            if status == 0:
                self.trouble = f"{meaning}, as before: {trouble.words}"
            if self.suspicion:
                raise StorageError(f"{reason}; {self.suspicion}", self.suspicion.cure, self.suspicion.source) from error
            cure = LIST_CURE if (verb, trouble.words) == ("check", DENIED) else trouble.cure
            if ".amazonaws.com" in self.url and trouble.words != DENIED:
                cure += f"; {ELSEWHERE}"
            raise StorageError(reason, cure, self.source) from error

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes; None where there is none."""
        return self.attempt("check", lambda: self._size(key))

    def matches(self, key: str, path: Path) -> bool:
        """Tell whether the object is what the file is, byte for byte. Hold neither in memory."""

        def compare() -> bool:
            with open(path, "rb") as file, closing(self._open(key)) as stored:
                while chunk := stored.read(CHUNK):
                    if chunk != file.read(len(chunk)):
                        return False
                return not file.read(1)

        return bool(self.attempt("read", compare))

    def delete(self, key: str) -> None:
        """Remove the object and see it gone."""
        self.attempt("delete", lambda: self._remove(key))
        try:
            if self.size(key) is not None:
                raise StorageError(f"{key} was deleted, but is still there")
        except StorageError as error:
            if http_status(error.__cause__) != 403:  # without s3:ListBucket it may mean "not there"
                raise

    def list(self, prefix: str) -> list[str]:
        """Return the keys that begin with the prefix. File server and Azure cannot be listed here, and have none."""
        keys = self.attempt("list", lambda: [*self._keys(prefix)])
        if not keys:
            self.check_place()  # a store may list a bucket that is not there
        return keys or []

    def check_place(self) -> None:
        """See that the place answers, and that its bucket is there."""
        try:
            if not self.attempt("check", self._look):
                raise StorageError("no such bucket", "make the bucket, or correct its name in the URI", self.source)
        except StorageError as error:
            if diagnose(error).words != DENIED:  # a permission that an upload does not need
                raise

    def check_object(self, uri: str) -> None:
        """Let the SDK upload a small object (this file), as a run does; compare and delete it by this client."""
        sent, address = Path(__file__), f"{uri.rstrip('/')}/probe-{uuid4().hex}"
        key = self.key(address)

        def upload() -> None:
            with sdk.storage_errors():
                StorageManager.upload_file(str(sent), address, retries=1)
            if self.trouble:  # the time is over, and nobody else deletes it
                self._remove(key)

        try:
            self.attempt("write", upload)
            if not self.matches(key, sent):
                words = f"what the SDK wrote is not at {address}: host and bucket must be spelt as in clearml.conf"
                raise StorageError(words, f"correct {ENTRIES}", self.source)
            self.delete(key)
        except BaseException:
            with suppress(Exception):  # it may be there, whatever the answer was
                call_with_timeout(TIMEOUT, "delete", lambda: self._remove(key))
            raise


class S3(Store):
    def _size(self, key: str) -> int:
        return int(self.bucket.Object(key).content_length)

    def _open(self, key: str) -> Any:
        return self.bucket.Object(key).get()["Body"]

    def _keys(self, prefix: str) -> Iterator[str]:
        return (item.key for item in self.bucket.objects.filter(Prefix=prefix))

    def _look(self) -> bool:
        next(self._keys("probe"), None)  # in a listing, unlike in a HEAD, the store says what is wrong
        return True

    def _remove(self, key: str) -> None:
        self.bucket.Object(key).delete()


class GCS(Store):
    def _size(self, key: str) -> int:
        blob = self.bucket.blob(key)
        blob.reload(**NO_RETRIES)
        return int(blob.size)

    def _open(self, key: str) -> Any:
        return self.bucket.blob(key).open("rb", timeout=2 * TIMEOUT, chunk_size=CHUNK)

    def _keys(self, prefix: str) -> Iterator[str]:
        return (blob.name for blob in self.bucket.list_blobs(prefix=prefix, **NO_RETRIES))

    def _look(self) -> bool:
        return self.bucket.reload(**NO_RETRIES) is None

    def _remove(self, key: str) -> None:
        self.bucket.blob(key).delete(**NO_RETRIES)


class FileServer(Store):
    """Its keys are paths as they stand in the record: of artifacts and images quoted, of models (SDK 2.1.12) not."""

    def _send(self, method: str, path: str, **options: Any) -> Any:
        options["headers"] = server.session().add_auth_headers({"Accept-Encoding": "identity"})
        for spelling in dict.fromkeys((path, quote(path))):
            answer = server.http().request(method, f"{self.name}/{spelling}", timeout=2 * TIMEOUT, **options)
            if answer.status_code != 404:
                break
        server.check_redirect(answer, self.name, origin(FILES))
        answer.raise_for_status()
        return answer

    def _size(self, key: str) -> int:
        return int(self._send("HEAD", key).headers.get("Content-Length", 0))

    def _open(self, key: str) -> Any:
        return self._send("GET", key, stream=True).raw

    def _remove(self, key: str) -> None:
        self._send("DELETE", key)

    def check_place(self) -> None:
        self.size("probe")


class Folder(Store):
    def key(self, address: str) -> str:
        return address.removeprefix("file://")

    def _size(self, key: str) -> int:
        return Path(key).lstat().st_size

    def _open(self, key: str) -> Any:
        return open(key, "rb")

    def _keys(self, prefix: str) -> Iterator[str]:
        def fail(error: OSError) -> None:
            raise error

        for folder, _, names in os.walk(prefix, onerror=fail):
            yield from (os.path.join(folder, name) for name in names)

    def _remove(self, key: str) -> None:
        Path(key).unlink()

    def tidy(self, key: str, task: str) -> None:
        """Remove the folders that were the task's own and are empty now."""
        with suppress(OSError):  # not empty
            for folder in Path(key).parents:
                if task in str(folder) and folder.exists():
                    folder.rmdir()

    def check_place(self) -> None:
        self.attempt("make", lambda: Path(self.name).mkdir(exist_ok=True))


# --- opening one ------------------------------------------------------------------------------------------------------
def s3_entry(uri: str) -> tuple[Any, RunError | None]:
    """Return the SDK's entry for this URI, and a suspicion where it is none of those in the list.

    Raise RunError for another place's: the SDK compares beginnings, and without regard to case, so that an entry for
    "minio" or "minio:90" is taken for s3://minio:9000, with its own port.
    """
    place, bucket = f"{uri}/".split("/")[2:4]
    source = in_file(ENTRIES)
    cure = f'write an entry with host: "{place}", keys or use_credentials_chain: true, and the whole bucket or none'
    cure = f"{cure}, in a list outside all braces ({source})"
    try:
        entry, is_listed = sdk.s3_entry(uri)
        read = [dict(each) for each in sdk.setting(ENTRIES, None) or []]
    except Exception as error:  # of all kinds, for all that can stand there
        raise RunError(f"the SDK cannot use {ENTRIES}: {one_line(error)}", cure, source) from error
    if str(entry.secure).lower() == "false" and entry.secure:
        raise RunError('secure: "false" is a text, which the SDK takes for true', "leave out the quotes", source)
    if is_listed and (entry.host, entry.bucket) in [("", place), (place, ""), (place, bucket)]:
        return entry, None
    what = f"no entry for {uri} is in the list {one_line(read)}"
    if ":" not in place:
        what, cure = f"{uri} names no host and port, as for Amazon S3", ELSEWHERE
    if sdk.setting(f"api.{ENTRIES}", None):
        what, cure = f"{ENTRIES} is inside api {{ }}", "move it to the end of the file, outside all braces"
    for each in read:
        host = str(each.get("host"))
        if ":" in host and host != place and host.partition(":")[0] == place.partition(":")[0]:
            what, cure = f"{uri} has another port than the entry, which is for {host}", f"write s3://{host}/bucket/path"
            cure += f', or host: "{place}" in the entry' * (":" in place)
        has_keys = (each.get("key") and each.get("secret")) or each.get("use_credentials_chain")
        if host == place and each.get("bucket") in (None, "", bucket) and not has_keys:
            what, cure = f"the entry for {host} lacks key or secret", "add both, or use_credentials_chain: true"
    other = RunError(what, cure, source)
    if is_listed:
        raise other
    return entry, other if ":" in place or read else None  # AWS needs none


def set_by(*names: str) -> str:
    """Name the first of these variables that is set, and who set it."""
    return next((variable(name) for name in names if os.getenv(name)), "default")


@cache
def boto3_session(profile: str) -> Any:
    """Make a session once: it takes a tenth of a second of CPU to read what boto3 knows of S3."""
    import boto3

    return boto3.Session(profile_name=profile or None)


def open_s3(uri: str) -> S3:
    """Open a bucket with the arguments that the SDK's own has, but with short time-outs."""
    from botocore.config import Config

    entry, suspicion = s3_entry(uri)
    arguments = sdk.s3_arguments(entry)
    limits = Config(connect_timeout=TIMEOUT, read_timeout=2 * TIMEOUT, retries={"total_max_attempts": 1})
    arguments["config"] = arguments["config"].merge(limits)
    session = boto3_session(entry.profile or "")
    keys = "" if entry.use_credentials_chain or not entry.secret else f"static keys, access key {last4(entry.key)}"
    try:
        if entry.use_credentials_chain and (found := session.get_credentials()):
            found.get_frozen_credentials()  # asks for those of a role or SSO: the first request would blame the bucket
            keys = f"boto3 finds {found.method}, access key {last4(found.access_key)}"
    except Exception as error:
        if suspicion:
            trouble = diagnose(error)
            cure = f"{suspicion.cure}; for the chain also {trouble.cure}"
            raise StorageError(f"{suspicion}; {trouble.words} ({one_line(error)})", cure, suspicion.source) from error
        raise
    if not keys:
        cure = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an entry"
        reason = suspicion or RunError("boto3 finds none", cure)
        raise StorageError(f"no keys: {reason}", reason.cure, reason.source)
    name = "/".join(uri.split("/")[: 4 if entry.host else 3])
    bucket = session.resource("s3", **arguments).Bucket(name.rpartition("/")[2])
    url, by_entry = bucket.meta.client.meta.endpoint_url, entry.host and not suspicion
    source = in_file(ENTRIES) if by_entry else set_by("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")
    verify = "default" if entry.verify is None else entry.verify
    return S3(name, bucket, source, url, f"{keys}, {url}, verify: {verify}", suspicion)


def open_gcs(uri: str) -> GCS:
    """Open the SDK's own bucket."""
    key = "GOOGLE_APPLICATION_CREDENTIALS"
    if os.getenv(key, "").lstrip().startswith("{"):  # as CI systems have it
        raise StorageError(f"{key} holds the key itself", "write it to a file, and name that file", variable(key))
    with sdk.storage_errors():
        bucket = StorageManager.storage_helper.get(uri).get_object(f"{uri}/any").bucket
    keys = os.getenv(key) or "application default credentials, or those of sdk.google.storage"
    return GCS("/".join(uri.split("/")[:3]), bucket, set_by("STORAGE_EMULATOR_HOST", key), keys=keys)


def open_store(uri: str) -> Store:
    """Open the store of a place or an object, as the SDK's configuration has it. Raise RunError otherwise."""
    uri = sdk.canonical(uri)
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return Folder(str(Path(rest if separator else uri).expanduser().absolute()))
    for host in sdk.file_servers():
        if f"{uri}/".startswith(f"{host}/"):
            return FileServer(host, url=host)
    if scheme not in PACKAGES:
        cure = f"write {GOOD_URI}{PLAIN_HTTP * scheme.startswith('http')}"
        raise StorageError(f"{uri} is in no storage or file server that is configured", cure)
    package, group = PACKAGES[scheme]
    try:
        importlib.metadata.version(package)
        if scheme == "azure":
            return Store("/".join(uri.split("/")[:4]))
        with OPENING:
            return open_s3(uri) if scheme == "s3" else open_gcs(uri)
    except importlib.metadata.PackageNotFoundError:
        cure = f"uv sync --group {group}, or pip install --group {group}"
        raise StorageError(f"{package} is not installed", cure) from None
    except RunError:
        raise
    except Exception as error:
        trouble = diagnose(error)
        raise StorageError(f"{trouble.words} ({one_line(error)})", trouble.cure) from error


def check_access(uri: str) -> str:
    """See that a run can store objects below this place: each step is bounded, and not their sum. Else RunError.

    Return the place as the SDK takes it, which knows neither ~ nor a relative folder.
    """
    if not uri.startswith("http"):
        check_uri(uri)
    boto3_session.cache_clear()  # in a notebook, keys may have been corrected
    store = open_store(uri)
    store.timeout = STEP
    uri = f"file://{store.name}" if isinstance(store, Folder) else uri.rstrip("/")
    store.check_place()
    store.check_object(uri)
    return uri
