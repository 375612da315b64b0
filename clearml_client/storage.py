"""Places for objects, opened as the SDK's configuration has them: write, look, read, remove.

Each tells "not there" from "forbidden" and "no answer", which the SDK does not, and says it with the cure. What is
written by the SDK is looked for by these clients: a proof must not share the fault that it is to find.
"""

import importlib.metadata
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import quote, urlsplit
from uuid import uuid4

from clearml import StorageManager

from clearml_client import sdk, server
from clearml_client.configuration import FILES, VARIABLES, config_file, display_path, in_file, origin, variable
from clearml_client.errors import RunError, diagnose, one_line

GOOD_URI = "s3://host:port/bucket/path, s3://bucket/path, gs://bucket/path, azure://..., a folder, or nothing"
ENTRIES = "sdk.aws.s3.credentials"
PACKAGES = {"s3": ("boto3", "client"), "gs": ("google-cloud-storage", "gcs"), "azure": ("azure-storage-blob", "azure")}
PATIENCE = 5  # seconds for a connection; twice that for each answer
CHUNK = 2**20  # bytes
MEANING = {0: "no answer", 401: "wrong keys", 403: "forbidden", 404: "not there"}


class StorageError(RunError):
    """What a store said no to: `kind` is "not there", "forbidden", "wrong keys", "no answer" or "refused"."""

    def __init__(self, what: str, cure: str = "", source: str = "", kind: str = "refused") -> None:
        super().__init__(what, cure, source)
        self.kind = kind


def http_status(error: BaseException) -> int:
    """What boto3, Google's library, requests and the file system mean, as an HTTP status; 0: there was no answer."""
    if isinstance(error, OSError) and error.errno and not hasattr(error, "response"):
        return {FileNotFoundError: 404, PermissionError: 403}.get(type(error), 500)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    return int(getattr(response, "status_code", 0) or getattr(error, "code", 0) or 0)


# --- where an address points ------------------------------------------------------------------------------------------
def check_uri(text: str) -> None:
    """Raises RunError for what is no place for objects."""
    parts = urlsplit(text)
    if parts.username or parts.password or "@" in parts.netloc:
        cure = f"take them out; they belong in {ENTRIES} or .env"
        raise RunError("credentials do not belong into the URI, but into clearml.conf or variables", cure)
    if not text:
        return
    if text.partition(":")[0] != parts.scheme and parts.scheme in PACKAGES:
        raise RunError(f"write {parts.scheme}:// in small letters", f"write {GOOD_URI}")
    if parts.scheme in PACKAGES:
        if not parts.netloc or ((":" in parts.netloc or parts.scheme == "azure") and not parts.path.strip("/")):
            raise RunError(
                f"no bucket: {parts.scheme}://bucket/path or s3://host:port/bucket/path", f"write {GOOD_URI}"
            )
        return
    folder = Path(text.removeprefix("file://")).expanduser().absolute()  # %20 is no blank: so the SDK has it
    if parts.scheme not in ("", "file") or (parts.scheme == "file" and parts.netloc):
        raise RunError("neither s3://, gs://, azure:// nor a folder whose parent exists", f"write {GOOD_URI}")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{display_path(folder)} is not a folder", "name a folder")
    if not folder.exists() and not re.search(r"[/\\]", text):  # more likely a slip: undefined, null, a bucket's name
        raise RunError(f"no folder {text} here", f"write ./{text} if it is to be made, or {GOOD_URI}")
    if not folder.parent.is_dir():
        cure = f"mkdir -p {display_path(folder.parent)}, or mount it"
        raise RunError(
            f"neither s3://, gs://, azure:// nor a folder whose parent exists: {display_path(folder.parent)}", cure
        )


def file_server() -> str:
    """The address of the ClearML file server. Raises RunError where the configuration has none."""
    url = str(StorageManager.get_files_server() or "").rstrip("/")
    if "://" not in url:
        cure = f"set {FILES} ({VARIABLES[FILES]}), or --output-uri"
        raise RunError(f"{FILES} is {url!r}: no address; {cure}", cure, origin(FILES))
    return url


def default_target() -> tuple[str, str]:
    """Where objects go if nothing else is said, "" for the file server, and who says so."""
    name, key = "CLEARML_DEFAULT_OUTPUT_URI", "sdk.development.default_output_uri"
    value = str(os.getenv(name) or sdk.setting(key, "") or "")
    source = variable(name) if os.getenv(name) else in_file(key) if value else "default"
    return ("" if value.lower() == "true" else value), source


def chunks_of(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK):
        yield chunk


# --- stores -----------------------------------------------------------------------------------------------------------
@dataclass
class Store:
    """A place for objects. A subclass knows how to talk to it, and raises whatever its library raises."""

    name: str  # the address of the place: with "/" and a key it is that of an object
    client: Any = None
    source: str = ""  # what in the configuration opened it
    trouble: str = ""  # why nothing more is asked of it

    def _size(self, key: str) -> int:
        raise NotImplementedError

    def _chunks(self, key: str) -> Iterator[bytes]:
        raise NotImplementedError

    def _write(self, key: str, data: bytes) -> None:
        raise NotImplementedError

    def _remove(self, key: str) -> None:
        raise NotImplementedError

    @property
    def url(self) -> str:
        """Where its requests go."""
        return self.name

    def key(self, address: str) -> str:
        return address[len(self.name) :].lstrip("/")

    def parent(self, key: str) -> str:
        """Where a probe beside this object goes."""
        return key.rpartition("/")[0]

    def list(self, prefix: str) -> list[str]:
        """The keys that begin with the prefix. The ClearML file server cannot be listed, and has none."""
        return []

    def tidy(self, key: str, task: str) -> None:
        """Remove what an object leaves behind when it goes: folders, where there are such things."""

    def attempt(self, verb: str, action: Callable[[], Any]) -> Any:
        """What the action returns; None where there is no such object; else StorageError."""
        if self.trouble:
            raise StorageError(self.trouble, kind="no answer")
        try:
            try:
                return action()
            except Exception as error:
                if diagnose(error).words != "connection closed":
                    raise
                return action()  # a connection that was kept, and that the store gave up meanwhile
        except StorageError:
            raise
        except Exception as error:
            status, trouble = http_status(error), diagnose(error)
            if status == 404 and trouble.words != "no such bucket":
                return None
            kind = "wrong keys" if trouble.words == "no keys" else MEANING.get(status, "refused")
            reason = (
                f"{self.name}: cannot {verb}: {kind}: {trouble.words} ({one_line(error)}){server.proxy_note(self.url)}"
            )
            if status == 0:
                self.trouble = reason
            raise StorageError(reason, trouble.cure, self.source, kind) from error

    def size(self, key: str) -> int | None:
        """The object's size in bytes; None where there is none."""
        size: int | None = self.attempt("look", lambda: self._size(key))
        return size

    def matches(self, key: str, path: Path) -> bool:
        """Whether the object is what the file is, byte for byte. Holds neither in memory."""

        def compare() -> bool:
            with open(path, "rb") as file:
                for chunk in self._chunks(key):
                    if chunk != file.read(len(chunk)):
                        return False
                return not file.read(1)

        return bool(self.attempt("read", compare))

    def put(self, key: str, data: bytes) -> None:
        """Put the object there; a missing bucket is an error, and is not made. Else StorageError."""

        def send() -> bool:
            self._write(key, data)
            return True

        if not self.attempt("write", send):
            self._nowhere()

    def delete(self, key: str) -> None:
        """Remove the object and see it gone."""
        self.attempt("delete", lambda: self._remove(key))
        if self.size(key) is not None:
            raise StorageError(f"{self.name}: {key} was deleted, but is still there")

    def _nowhere(self) -> NoReturn:
        words = f"{self.name}: a probe object was written, but is not there: no such bucket?"
        raise StorageError(words, "make the bucket, or correct its name", self.source, "not there")

    def prove(self, key: str) -> None:
        """That an object with this key can be written, seen, read, compared, deleted and missed. Else StorageError."""
        data = uuid4().hex.encode()
        try:
            self.put(key, data)
            if self.size(key) is None:
                self._nowhere()
            with tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                if not self.matches(key, Path(file.name)):
                    raise StorageError(f"{self.name}: what comes back is not what was written")
            self.delete(key)
        except BaseException:
            with suppress(Exception):  # it may be there, whatever the answer was
                self._remove(key)
            raise


class S3(Store):
    bucket = ""

    @property
    def _s3(self) -> Any:
        return self.client.meta.client

    @property
    def url(self) -> str:
        return str(self._s3.meta.endpoint_url)

    def _size(self, key: str) -> int:
        return int(self._s3.head_object(Bucket=self.bucket, Key=key)["ContentLength"])

    def _chunks(self, key: str) -> Iterator[bytes]:
        body = self._s3.get_object(Bucket=self.bucket, Key=key)["Body"]
        yield from body.iter_chunks(CHUNK)

    def _write(self, key: str, data: bytes) -> None:
        try:
            self._s3.head_bucket(Bucket=self.bucket)  # some stores make a missing one
        except Exception as error:
            if http_status(error) == 404:
                raise StorageError(
                    f"{self.name}: no such bucket (NoSuchBucket: {self.bucket})",
                    "make the bucket, or correct its name in the URI",
                    self.source,
                    "not there",
                ) from error
            if http_status(error) == 0:
                raise
        self._s3.put_object(Bucket=self.bucket, Key=key, Body=data)

    def _remove(self, key: str) -> None:
        self._s3.delete_object(Bucket=self.bucket, Key=key)

    def list(self, prefix: str) -> list[str]:
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        keys = self.attempt("list", lambda: [item["Key"] for page in pages for item in page.get("Contents", [])])
        return keys or []


class GCS(Store):
    def _size(self, key: str) -> int:
        blob = self.client.blob(key)
        blob.reload(timeout=PATIENCE, retry=None)
        return int(blob.size)

    def _chunks(self, key: str) -> Iterator[bytes]:
        with self.client.blob(key).open("rb", timeout=2 * PATIENCE, chunk_size=CHUNK) as stream:
            yield from chunks_of(stream)

    def _write(self, key: str, data: bytes) -> None:
        self.client.blob(key).upload_from_string(data, timeout=PATIENCE, retry=None)

    def _remove(self, key: str) -> None:
        self.client.blob(key).delete(timeout=PATIENCE, retry=None)

    def list(self, prefix: str) -> list[str]:
        blobs = self.client.list_blobs(prefix=prefix, timeout=PATIENCE)
        return self.attempt("list", lambda: [blob.name for blob in blobs]) or []


class FileServer(Store):
    """Its keys are paths as they stand in the record: of artifacts and images quoted, of models (SDK 2.1.12) not."""

    def _send(self, method: str, path: str, **options: Any) -> Any:
        headers = server.session().add_auth_headers({"Accept-Encoding": "identity"})
        for spelling in dict.fromkeys((path, quote(path))):
            url = f"{self.name}/{spelling}"
            answer = server.http().request(method, url, headers=headers, timeout=2 * PATIENCE, **options)
            if answer.status_code != 404:
                break
        answer.raise_for_status()
        return answer

    def _size(self, key: str) -> int:
        return int(self._send("HEAD", key).headers.get("Content-Length", 0))

    def _chunks(self, key: str) -> Iterator[bytes]:
        yield from self._send("GET", key, stream=True).iter_content(CHUNK)

    def _write(self, key: str, data: bytes) -> None:
        self._send("POST", "", files={key: (key, data)})

    def _remove(self, key: str) -> None:
        self._send("DELETE", key)

    def parent(self, key: str) -> str:
        return ""  # a folder made for the probe would stay


class Folder(Store):
    def key(self, address: str) -> str:
        return address.removeprefix("file://")

    def _size(self, key: str) -> int:
        return Path(key).lstat().st_size

    def _chunks(self, key: str) -> Iterator[bytes]:
        with open(key, "rb") as file:
            yield from chunks_of(file)

    def _write(self, key: str, data: bytes) -> None:
        Path(key).write_bytes(data)

    def _remove(self, key: str) -> None:
        Path(key).unlink()

    def list(self, prefix: str) -> list[str]:
        return [str(path) for path in Path(prefix).rglob("*") if path.is_file()]

    def parent(self, key: str) -> str:
        return str(next(folder for folder in Path(key).parents if folder.is_dir()))

    def tidy(self, key: str, task: str) -> None:
        """Remove the folders that were the task's own and are empty now."""
        with suppress(OSError):  # not empty
            for folder in Path(key).parents:
                if task in str(folder) and folder.exists():
                    folder.rmdir()


class ByTheSDK(Store):
    """Any other kind that the SDK knows. It tells less: what is not there may be forbidden."""

    def _size(self, key: str) -> int:
        size = StorageManager.get_file_size_bytes(f"{self.name}/{key}")
        if size is None:
            raise FileNotFoundError(2, "not there", key)
        return int(size)

    def _chunks(self, key: str) -> Iterator[bytes]:
        copy = StorageManager.get_local_copy(f"{self.name}/{key}", extract_archive=False, force_download=True)
        with open(copy, "rb") as file:
            yield from chunks_of(file)

    def _write(self, key: str, data: bytes) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            StorageManager.upload_file(file.name, f"{self.name}/{key}")

    def _remove(self, key: str) -> None:
        if not StorageManager.storage_helper.get(self.name).delete(f"{self.name}/{key}"):
            raise PermissionError(13, "cannot be deleted", key)


# --- opening one ------------------------------------------------------------------------------------------------------
def s3_entry(uri: str) -> tuple[Any, str]:
    """The entry of sdk.aws.s3.credentials that the SDK uses for this URI, and its place; ("", no place): the defaults.

    The SDK compares beginnings, and without regard to case: an entry for "minio" or "minio:90" is taken for
    s3://minio:9000, with its own port. Raises RunError where the entry is not this place's, or the nearest has a slip.
    """
    path, parts = display_path(config_file()[0]), urlsplit(uri)
    wanted, (host, _, port) = parts.netloc, parts.netloc.partition(":")
    try:
        entries = [{"host": "", "bucket": "", **item} for item in sdk.setting(ENTRIES, None) or []]
        used, listed = sdk.s3_entry(uri)
    except Exception as error:  # of all kinds, for all that can stand there
        cure = f"correct {ENTRIES} in {path}; host is host:port without http://"
        raise RunError(f"the SDK cannot use {ENTRIES}: {one_line(error)}", cure, path) from error
    if listed:
        same = [(str(item["host"]), str(item["bucket"]).strip("/")) == (used.host, used.bucket) for item in entries]
        place = f"{ENTRIES}[{same.index(True) if True in same else '?'}], {path}"
        if used.host and used.host != wanted:
            why = "its port differs" if ":" in used.host else "the port is missing"
            if used.host.lower() == wanted.lower():
                why = "they differ in case, and the SDK then writes elsewhere"
            raise RunError(f"host {used.host!r} is taken for {wanted}: {why}", f'write host: "{wanted}"', place)
        if used.bucket and used.bucket != bucket_name(uri, used):
            raise RunError(f"bucket {used.bucket!r} is taken for {uri}", "write the whole name", place)
        return used, place
    hosts = [str(item["host"]) for item in entries if item["host"]]
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
        return used, ""
    used.missing = why, f"{cure} ({ENTRIES}, {path})"  # the defaults may do, over https
    return used, ""


def bucket_name(uri: str, entry: Any) -> str:
    parts = urlsplit(uri)
    return parts.path.strip("/").partition("/")[0] if entry.host else parts.netloc


def open_s3(uri: str) -> S3:
    """boto3's client with the arguments that the SDK's own has, but with little patience."""
    import boto3
    from botocore.config import Config

    entry, source = s3_entry(uri)
    bucket = bucket_name(uri, entry)
    store = S3(f"s3://{entry.host}/{bucket}" if entry.host else f"s3://{bucket}", source=source)
    why, cure = getattr(entry, "missing", ("", ENTRIES))
    arguments = sdk.s3_arguments(entry)
    patience = Config(connect_timeout=PATIENCE, read_timeout=2 * PATIENCE, retries={"total_max_attempts": 1})
    arguments["config"] = arguments["config"].merge(patience)
    store.bucket = bucket
    try:
        session = boto3.Session(profile_name=entry.profile or None)
        found = entry.use_credentials_chain and (not why or session.get_credentials())
        if not found and not (entry.key and entry.secret):
            words = f"{store.name}: no keys for it{f': {why}' if why else ''}"
            raise StorageError(words, cure, source, "wrong keys")
        store.client = session.resource("s3", **arguments)
    except StorageError:
        raise
    except Exception as error:
        trouble = diagnose(error)
        raise StorageError(f"{store.name}: {trouble.words} ({one_line(error)})", trouble.cure, source) from error
    return store


def check_package(scheme: str) -> str:
    """The package for this kind of storage. Raises StorageError if it is not installed."""
    package, group = PACKAGES[scheme]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise StorageError(f"{package} is not installed", f"uv sync --group {group}") from None
    return package


def open_store(uri: str) -> Store:
    """The store of a place or an object, as the SDK's configuration has it. Raises RunError."""
    uri = sdk.canonical(uri)
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return Folder(str(Path(rest if separator else uri).expanduser().absolute()))
    if scheme in ("http", "https"):
        for host in sdk.file_servers():
            if f"{uri}/".startswith(host + "/"):
                return FileServer(host)
        host = f"{scheme}://{rest.partition('/')[0]}"
        raise StorageError(f"{host} is not a file server of this configuration", f"set {FILES}")
    if scheme in PACKAGES:
        check_package(scheme)
    if scheme == "s3":
        return open_s3(uri)
    if scheme == "gs":
        try:
            return GCS(sdk.uri_base(uri), sdk.gcs_bucket(uri))
        except Exception as error:
            cure = "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS=key.json"
            raise StorageError(f"{sdk.uri_base(uri)}: {one_line(error)}", cure, kind="wrong keys") from error
    if scheme == "azure":
        return ByTheSDK("/".join(uri.split("/")[:4]))
    raise StorageError(f"{scheme}:// is no storage that this script knows", f"write {GOOD_URI}")


def check_access(uri: str) -> None:
    """That objects below this place can be written, read back, compared and deleted: by a client of our own, which
    knows why not, and by the SDK, which will upload. A folder is made if its parent exists. Else RunError."""
    if not uri.startswith("http"):
        check_uri(uri)
    store = open_store(uri)
    if isinstance(store, Folder):
        uri = f"file://{store.name}"  # the SDK takes a relative one for something else
        try:
            Path(store.name).mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{display_path(store.name)} cannot be made: {error.strerror}", "name another folder"
            ) from error
    probe = f"{uri.rstrip('/')}/probe-{uuid4().hex}"
    key = store.key(probe)
    store.prove(key)
    with tempfile.TemporaryDirectory() as folder:
        sent = Path(folder, "probe")
        sent.write_bytes(uuid4().hex.encode())
        try:
            StorageManager.upload_file(str(sent), probe, retries=1)
            arrived = store.matches(key, sent)
            store.delete(key)
        except BaseException as error:
            with suppress(Exception):  # it may be there, whatever the answer was
                store._remove(key)
            if isinstance(error, ValueError):
                raise StorageError(
                    f"{store.name}: the SDK cannot write: {one_line(error)}", source=store.source
                ) from error
            raise
        if not arrived:
            words = (
                f"{store.name}: what the SDK wrote is not at {probe}: host and bucket must be spelt as in clearml.conf"
            )
            raise StorageError(words, f"correct {ENTRIES}", store.source)
