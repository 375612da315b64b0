"""Stores of objects, opened as the SDK's configuration has them: look, compare, list, delete.

Each tells "not there" from "forbidden" and "no answer", which the SDK does not, and names the cure. The caller names
the place. The SDK uploads, and these clients look: a check must not share the fault that it is to find.
"""

import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit
from uuid import uuid4

from clearml import StorageManager

from clearml_client import sdk, server
from clearml_client.configuration import FILES, VARIABLES, display_path, in_file, origin, variable
from clearml_client.errors import DENIED, RunError, call_with_timeout, diagnose, one_line

Result = TypeVar("Result")
GOOD_URI = "s3://host:port/bucket/path, s3://bucket/path, gs://bucket/path, azure://..., a folder, or nothing"
ENTRIES = "sdk.aws.s3.credentials"
PACKAGES = {"s3": ("boto3", "client"), "gs": ("google-cloud-storage", "gcs"), "azure": ("azure-storage-blob", "azure")}
PATIENCE = 5  # seconds for a connection; twice that for each answer
STEP = 30  # seconds for each step of a check: where a store answers, the SDK may try again, with pauses
CHUNK = 2**20  # bytes
LIST_CURE = "permit s3:GetObject, and s3:ListBucket, without which what is not there is forbidden, too"
GOOGLE_KEY = "GOOGLE_APPLICATION_CREDENTIALS"


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
    neither = "neither s3://, gs://, azure:// nor a folder whose parent exists"
    folder = Path(text.removeprefix("file://")).expanduser().absolute()  # %20 is no blank: so the SDK has it
    if "@" in parts.netloc:
        words = "credentials do not belong into the URI, but into clearml.conf or variables"
        raise RunError(words, f"take them out; they belong in {ENTRIES} or .env")
    if parts.scheme in PACKAGES and text.startswith(parts.scheme):
        if not parts.netloc or ((":" in parts.netloc or parts.scheme == "azure") and not parts.path.strip("/")):
            raise RunError(f"no bucket: {parts.scheme}://bucket/path or s3://host:port/bucket/path", cure)
    elif parts.scheme not in ("", "file") or parts.netloc:
        raise RunError(neither, cure)
    elif text and not folder.is_dir():
        if folder.exists():
            raise RunError(f"{display_path(folder)} is not a folder", "name a folder")
        if not re.search(r"[/\\]", text):  # more likely a slip: undefined, null, a bucket's name
            raise RunError(f"no folder {text} here", f"write ./{text} if it is to be made, or {GOOD_URI}")
        if not folder.parent.is_dir():
            parent = display_path(folder.parent)
            raise RunError(f"{neither}: {parent}", f"mkdir -p {parent}, or mount it")


def file_server() -> str:
    """Return the address of the ClearML file server. Raise RunError where the configuration has none."""
    url = str(StorageManager.get_files_server() or "").rstrip("/")
    if "://" not in url:
        cure = f"set {FILES} ({VARIABLES[FILES]}), or --output-uri"
        raise RunError(f"{FILES} is {url!r}: no address; {cure}", cure, origin(FILES))
    return url


def default_target() -> tuple[str, str]:
    """Return where objects go if nothing else is said, "" for the file server, and who says so."""
    name, key = "CLEARML_DEFAULT_OUTPUT_URI", "sdk.development.default_output_uri"
    value = str(os.getenv(name) or sdk.setting(key, "") or "")
    source = variable(name) if os.getenv(name) else in_file(key) if value else "default"
    return ("" if value.lower() == "true" else value), source


# --- stores -----------------------------------------------------------------------------------------------------------
@dataclass
class Store:
    """A place for objects, here any that the SDK knows, and a subclass for each that tells more by its own client."""

    name: str  # the address of the place: with "/" and a key it is that of an object
    client: Any = None  # boto3's client, or a bucket of Google's library
    source: str = ""  # what in the configuration opened it
    url: str = ""  # where requests go, if by HTTP
    bucket: str = ""  # of S3
    trouble: str = ""  # why nothing more is asked of it
    patience: float = 0  # seconds for one step; 0: as long as the client itself waits

    def _size(self, key: str) -> int:
        size = StorageManager.get_file_size_bytes(f"{self.name}/{key}")
        if size is None:  # or it is forbidden
            raise FileNotFoundError(2, "not there", key)
        return int(size)

    def _chunks(self, key: str) -> Iterator[bytes]:
        copy = StorageManager.get_local_copy(f"{self.name}/{key}", extract_archive=False, force_download=True)
        with open(copy, "rb") as file:
            yield from iter(lambda: file.read(CHUNK), b"")

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
            raise StorageError(self.trouble)
        try:
            return call_with_timeout(self.patience, "time-out", action) if self.patience else action()
        except Exception as error:
            status, trouble = http_status(error), diagnose(error)
            if again and trouble.words == "connection closed":  # by the store, while the client kept it
                return self.attempt(verb, action, again=False)
            if status == 404 and trouble.words != "no such bucket":
                return None
            meaning = {0: "no answer", 401: "wrong keys", 403: "forbidden", 404: "not there"}.get(status, "refused")
            reason = f"cannot {verb}: {meaning}: {trouble.words} ({one_line(error)}){server.proxy_note(self.url)}"
            if status == 0:
                self.trouble = reason
            cure = LIST_CURE if (verb, trouble.words) == ("look", DENIED) else trouble.cure
            raise StorageError(reason, cure, self.source) from error

    def size(self, key: str) -> int | None:
        """Return the object's size in bytes; None where there is none."""
        return self.attempt("look", lambda: self._size(key))

    def matches(self, key: str, path: Path) -> bool:
        """Tell whether the object is what the file is, byte for byte. Hold neither in memory."""

        def compare() -> bool:
            with open(path, "rb") as file:
                return all(chunk == file.read(len(chunk)) for chunk in self._chunks(key)) and not file.read(1)

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
            if not self.attempt("look", self._look):
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
                call_with_timeout(PATIENCE, "delete", lambda: self._remove(key))
            raise


class S3(Store):
    def _size(self, key: str) -> int:
        return int(self.client.head_object(Bucket=self.bucket, Key=key)["ContentLength"])

    def _chunks(self, key: str) -> Iterator[bytes]:
        yield from self.client.get_object(Bucket=self.bucket, Key=key)["Body"].iter_chunks(CHUNK)

    def _keys(self, prefix: str) -> Iterator[str]:
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
            yield from (item["Key"] for item in page.get("Contents", []))

    def _look(self) -> bool:
        next(self._keys("probe"), None)  # in a listing, unlike in a HEAD, the store says what is wrong
        return True

    def _remove(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)


class GCS(Store):
    def _size(self, key: str) -> int:
        blob = self.client.blob(key)
        blob.reload(timeout=PATIENCE, retry=None)
        return int(blob.size)

    def _chunks(self, key: str) -> Iterator[bytes]:
        with self.client.blob(key).open("rb", timeout=2 * PATIENCE, chunk_size=CHUNK) as stream:
            yield from iter(lambda: stream.read(CHUNK), b"")

    def _keys(self, prefix: str) -> Iterator[str]:
        return (blob.name for blob in self.client.list_blobs(prefix=prefix, timeout=PATIENCE, retry=None))

    def _look(self) -> bool:
        return self.client.reload(timeout=PATIENCE, retry=None) is None

    def _remove(self, key: str) -> None:
        self.client.blob(key).delete(timeout=PATIENCE, retry=None)


class FileServer(Store):
    """Its keys are paths as they stand in the record: of artifacts and images quoted, of models (SDK 2.1.12) not."""

    def _send(self, method: str, path: str, **options: Any) -> Any:
        headers = server.session().add_auth_headers({"Accept-Encoding": "identity"})
        for spelling in dict.fromkeys((path, quote(path))):
            answer = server.http().request(
                method, f"{self.name}/{spelling}", headers=headers, timeout=2 * PATIENCE, **options
            )
            if answer.status_code != 404:
                break
        server.check_redirect(answer, self.name, origin(FILES))
        answer.raise_for_status()
        return answer

    def _size(self, key: str) -> int:
        return int(self._send("HEAD", key).headers.get("Content-Length", 0))

    def _chunks(self, key: str) -> Iterator[bytes]:
        yield from self._send("GET", key, stream=True).iter_content(CHUNK)

    def _remove(self, key: str) -> None:
        self._send("DELETE", key)

    def check_place(self) -> None:
        self.size("probe")


class Folder(Store):
    def key(self, address: str) -> str:
        return address.removeprefix("file://")

    def _size(self, key: str) -> int:
        return Path(key).lstat().st_size

    def _chunks(self, key: str) -> Iterator[bytes]:
        with open(key, "rb") as file:
            yield from iter(lambda: file.read(CHUNK), b"")

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

    def check_object(self, uri: str) -> None:
        super().check_object(f"file://{self.name}")  # the SDK takes a relative one for something else


# --- opening one ------------------------------------------------------------------------------------------------------
def s3_entry(uri: str) -> tuple[Any, str, RunError | None]:
    """Return the SDK's entry for this URI, where it stands, and else, with one made of the defaults, why there is none.

    Raise RunError for another place's: the SDK compares beginnings, and without regard to case, so that an entry for
    "minio" or "minio:90" is taken for s3://minio:9000, with its own port.
    """
    wanted, source = urlsplit(uri).netloc, in_file(ENTRIES)
    host, _, port = wanted.partition(":")
    try:
        items = [item for item in sdk.setting(ENTRIES, None) or [] if item.get("host", "")]
        hosts = [str(item["host"]) for item in items]
        entry, listed = sdk.s3_entry(uri)
    except Exception as error:  # of all kinds, for all that can stand there
        cure = f"correct {ENTRIES}; host is host:port without http://"
        raise RunError(f"the SDK cannot use {ENTRIES}: {one_line(error)}", cure, source) from error
    if listed and entry.host not in ("", wanted):
        words = f"host {entry.host!r} is taken for {wanted}: they differ in port or case"
        raise RunError(words, f'write host: "{wanted}"', source)
    if listed and entry.bucket not in ("", f"{uri}/".split("/")[3 if entry.host else 2]):
        raise RunError(f"bucket {entry.bucket!r} is taken for {uri}", "write the whole name", source)
    near = next((other for other in hosts if other.partition(":")[0].lower() == host.lower()), "")
    if listed or not (port or near):
        return entry, source if listed else "", None
    why = f"there is one for {near or hosts[0]!r}" if hosts else "there are none"
    cure = f'add one with host: "{wanted}"'
    if buckets := [repr(str(item["bucket"])) for item in items if item["host"] == wanted and item.get("bucket", "")]:
        why, cure = f"there is one for the bucket {' and '.join(buckets)} only", "leave bucket out, or add an entry"
    elif wanted in hosts:
        why, cure = "dropped in silence, without key and secret", "add key and secret, or use_credentials_chain: true"
    elif sdk.setting(f"sdk.{ENTRIES}", None):  # pasted inside of the section, with the whole name
        why, cure = f"they stand at sdk.{ENTRIES}", "append them at the end of the file, outside all braces"
    return entry, "", RunError(f"no entry for {wanted}: {why}", f"{cure} ({source})", source)


def open_s3(uri: str) -> S3:
    """Open a bucket with the arguments that the SDK's own has, but with little patience."""
    import boto3
    from botocore.config import Config

    entry, source, slip = s3_entry(uri)
    arguments = sdk.s3_arguments(entry)
    patience = Config(connect_timeout=PATIENCE, read_timeout=2 * PATIENCE, retries={"total_max_attempts": 1})
    arguments["config"] = arguments["config"].merge(patience)
    try:
        session = boto3.Session(profile_name=entry.profile or None)
        found = session.get_credentials() if entry.use_credentials_chain else None
        if found:
            found.get_frozen_credentials()  # asks for those of a role or SSO: the first request would blame the bucket
        client = session.resource("s3", **arguments).meta.client  # client() does not take the SDK's arguments
    except Exception as error:
        trouble = diagnose(error)
        raise StorageError(f"{trouble.words} ({one_line(error)})", trouble.cure, source) from error
    if not found and not (entry.key and entry.secret):
        reason = slip or RunError("boto3 finds none", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an entry")
        raise StorageError(f"no keys: {reason}", reason.cure, source)
    name = "/".join(uri.split("/")[: 4 if entry.host else 3])
    return S3(name, client, source, client.meta.endpoint_url, name.rpartition("/")[2])


def open_gcs(uri: str) -> GCS:
    """Open the SDK's own bucket."""
    if os.getenv(GOOGLE_KEY, "").lstrip().startswith("{"):
        cure = "write it to a file and name that file"
        raise StorageError(f"{GOOGLE_KEY} holds the key itself; {cure}", cure, variable(GOOGLE_KEY))
    try:
        with sdk.storage_errors():
            bucket = StorageManager.storage_helper.get(uri).get_object(f"{uri}/any").bucket
    except OSError as error:
        cure = f"gcloud auth application-default login, or {GOOGLE_KEY}=key.json"
        raise StorageError(one_line(error), cure) from error
    return GCS("/".join(uri.split("/")[:3]), bucket)


def open_store(uri: str) -> Store:
    """Open the store of a place or an object, as the SDK's configuration has it. Raise RunError otherwise."""
    uri = sdk.canonical(uri)
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return Folder(str(Path(rest if separator else uri).expanduser().absolute()))
    if scheme in ("http", "https"):
        for host in sdk.file_servers():
            if f"{uri}/".startswith(host + "/"):
                return FileServer(host, url=host)
        raise StorageError("not a file server of this configuration", f"set {FILES}")
    if scheme not in PACKAGES:
        raise StorageError(f"{scheme}:// is no storage that this script knows", f"write {GOOD_URI}")
    package, group = PACKAGES[scheme]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise StorageError(f"{package} is not installed", f"uv sync --group {group}") from None
    if scheme == "azure":
        return Store("/".join(uri.split("/")[:4]))
    return open_s3(uri) if scheme == "s3" else open_gcs(uri)


def check_access(uri: str) -> None:
    """See that a run can store objects below this place: each step is bounded, and not their sum. Else RunError."""
    if not uri.startswith("http"):
        check_uri(uri)
    store = open_store(uri)
    store.patience = STEP
    store.check_place()
    store.check_object(uri)
