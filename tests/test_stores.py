"""The stores that the other tests rely on: real, strict about keys, restartable, and gone with the tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from stores import FakeGCS, Rclone, S3Store, SeaweedFS, Store

HERE = Path(__file__).parent


def write(store: Store, key: str, data: bytes) -> None:
    if isinstance(store, S3Store):
        with closing(store.client()) as s3:
            s3.put_object(Bucket=store.bucket, Key=key, Body=data)
    elif isinstance(store, FakeGCS):
        with closing(store.client()) as gcs:
            gcs.bucket(store.bucket).blob(key).upload_from_string(data, timeout=5, retry=None)


@pytest.mark.parametrize(("kind", "tls"), [(Rclone, False), (Rclone, True), (SeaweedFS, False), (FakeGCS, False)])
def test_what_is_written_survives_an_outage(kind: type[Store], tls: bool, tmp_path: Path) -> None:
    with kind(tmp_path, tls=tls) as store:
        assert store.keys() == []
        write(store, "a folder/ü.pt", b"weights")
        store.stop()
        with pytest.raises(Exception, match=r"(?i)connect"):
            write(store, "while it is down", b"")
        store.start()
        assert store.keys() == ["a folder/ü.pt"]
        assert store.get("a folder/ü.pt") == b"weights"


@pytest.mark.parametrize("kind", [Rclone, SeaweedFS])
@pytest.mark.parametrize(
    ("changed", "code"),
    [({"secret_key": "wrong"}, "SignatureDoesNotMatch"), ({"access_key": "WRONG"}, "InvalidAccessKeyId")],
)
def test_keys_are_checked(kind: type[S3Store], changed: dict[str, str], code: str, tmp_path: Path) -> None:
    with kind(tmp_path) as store:
        stranger = replace(store, **changed)  # type: ignore[arg-type]
        stranger.endpoint = store.endpoint
        with pytest.raises(ClientError, match=code):
            stranger.keys()


def test_a_store_does_not_outlive_a_killed_test_run(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "programs/hold_store.py"), str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with run:
        assert run.stdout
        store = Rclone(tmp_path)
        store.port = int(run.stdout.readline())
        store.endpoint = f"http://127.0.0.1:{store.port}"
        assert store.keys() == []
        run.send_signal(signal.SIGKILL)
    with pytest.raises(Exception, match=r"(?i)connect"):  # noqa: PT012
        for _ in range(200):
            store.keys()
            time.sleep(0.05)
