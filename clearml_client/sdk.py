"""Every name of the ClearML SDK (2.1.12) that is not public, each with its reason and the way out.

Nothing else here uses another one. tests/test_sdk.py asks the installed SDK for each of them.
"""

import atexit
import errno
import io
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

# Unused names of this list are used by the modules that import them from here.
from clearml import config  # by whose folder `load_config` finds the SDK's defaults
from clearml.backend_api import Session, load_config  # addresses, calls, all sections; way out: getters, and APIClient
from clearml.backend_api.session.session import LoginError  # Task.init's, for keys that are not accepted; an export
from clearml.backend_api.utils import get_http_session_with_retry  # the SDK's certificates and proxies; an export
from clearml.backend_config.bucket_config import S3BucketConfigurations
from clearml.backend_config.defs import get_config_file  # the file that the SDK reads; an export
from clearml.backend_interface.metrics import Reporter
from clearml.backend_interface.session import SendError  # of a call that the server refuses, whenever; an export
from clearml.backend_interface.task.log import TaskHandler
from clearml.backend_interface.task.repo.scriptinfo import ScriptInfo
from clearml.binding.frameworks import WeightsFileHandler  # its callbacks are public; an export
from clearml.config import config_obj, get_cache_dir  # the merged settings; way out: Task.get_config() or the like
from clearml.storage.helper import StorageHelper, _Boto3Driver, _HttpDriver

__all__ = ["Session", "WeightsFileHandler", "config_obj", "get_cache_dir", "get_config_file"]
__all__ += ["get_http_session_with_retry"]
ERRORS = (LoginError, SendError)
# Of uncommitted changes; more of them go to the storage, as an artifact.
MAX_DIFF_BYTES: int = ScriptInfo.max_diff_size_bytes
# boto3's arguments, as the SDK makes them of an entry of clearml.conf; way out: a public way to the SDK's own client.
s3_arguments: Callable[[Any], dict[str, Any]] = _Boto3Driver._get_boto_resource_kwargs_from_config
# An address after the path substitutions of clearml.conf; way out: a public function.
canonical: Callable[[str], str] = StorageHelper._canonize_url


def setting(key: str, default: Any = None) -> Any:
    """Return a value of the merged configuration, such as "api.api_server"."""
    return config_obj.get(key, default)


def names(section: str) -> list[str]:
    """List what stands in a section of the merged configuration; of "" the sections."""
    return list(setting(section, {}) if section else load_config(Path(config.__file__).parent).to_dict())


def put(key: str, value: Any) -> None:
    """Change a leaf of the live configuration: `set_overrides` would read all files again."""
    section, name = key.split(".", 1)
    config_obj.get(section).put(name, value)


def forget_settings() -> None:
    """Let the next `setting` read all files again."""
    config_obj.set_config_impl(None)


asked_at = 0.0  # when the main thread has sent what it waits for, by time.monotonic()


def send_request(*arguments: Any, **options: Any) -> Any:
    """Send a call as the SDK does, but for two answers of a server that was restarted, or that has revoked the keys.

    Of a token that is void the SDK gets a new one, but sends the call again with the old one: send it once more. Where
    there is no new token it prints a traceback and tries again, for ever: give the server's answer. Way out: the same.
    """
    global asked_at
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        asked_at = time.monotonic()
    try:
        answer = send_once(*arguments, **options)
        return send_once(*arguments, **options) if answer is not None and answer.status_code == 401 else answer
    except LoginError as error:
        refused = requests.Response()
        refused.status_code = 401
        meta = {"result_code": 401, "result_subcode": 0, "result_msg": str(error), "id": "", "trx": ""}
        meta["endpoint"] = {"name": "auth.login", "requested_version": 1.0, "actual_version": "1.0"}
        refused.raw = io.BytesIO(json.dumps({"meta": meta, "data": {}}).encode())
        return refused
    finally:
        if in_main:
            asked_at = 0


send_once, Session.send_request = Session.send_request, send_request
Session._session_timeout = (5, 60)  # seconds for a connection and for an answer, in place of 300; way out: a setting


def s3_entry(uri: str) -> tuple[Any, bool]:
    """Return the S3BucketConfig by which the SDK opens this place, and whether it is an entry of clearml.conf's list.

    Way out: as above.
    """
    configurations = S3BucketConfigurations.from_config(setting("sdk.aws.s3", {}))
    entry = configurations.get_config_by_uri(uri)
    return entry, configurations.get_config_by_bucket(*entry.get_bucket_host()) is not None


def file_servers() -> list[str]:
    """List the addresses that the SDK takes for file servers, and sends its token to; way out: a public getter."""
    return [host.rstrip("/") for host in _HttpDriver.get_file_server_hosts()]


@contextmanager
def collect_log(name: str, level: int) -> Iterator[list[str]]:
    """Collect what a logger of the SDK says in the block, and let it print nothing; way out: an exception."""
    said: list[str] = []

    def catch(record: logging.LogRecord) -> bool:
        if record.levelno >= level:
            said.append(record.getMessage())
        return False

    logger = logging.getLogger(name)
    logger.addFilter(catch)
    try:
        yield said
    finally:
        logger.removeFilter(catch)


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise OSError with a store's words, which the SDK only logs."""
    with collect_log("clearml.storage", logging.ERROR) as said:
        try:
            yield
        except Exception as error:
            raise OSError(errno.EIO, said[0] if said else str(error)) from error


def disarm(task: Any) -> None:
    """Keep the SDK from setting a status of its own at the end, and from killing a process whose task is not running.

    Way out: a public way to say no.
    """
    atexit.unregister(task._at_exit)
    if task._dev_worker:
        task._dev_worker.unregister()


def drop_reports() -> None:
    """Keep the SDK from waiting for ever, at the end, for a server that is gone; way out: a time-out for it."""
    TaskHandler.close = Reporter.flush = Reporter.wait_for_events = Reporter.stop = lambda *_, **__: None


def close_unchanged(task: Any) -> None:
    """Close a task that has its status already; way out: a close() that leaves it alone."""
    task.mark_completed = task.mark_failed = task.stopped = lambda *_, **__: None
    task.close()


def be_quiet(offline: bool) -> None:
    """Leave out what the SDK does unasked at each start; way out: settings for it.

    It looks for a GPU where there is no driver of one, which ends in two warnings; asks a service on the internet for
    newer versions, which an offline session must not do; tells what it finds of a repository; and writes each try to
    send console lines to stderr, which a log can filter.
    """
    from clearml.utilities import resource_monitor
    from clearml.utilities.check_updates import CheckPackageUpdates

    log = logging.getLogger("clearml.log")
    if not shutil.which("nvidia-smi"):
        resource_monitor.gpustat = None
    CheckPackageUpdates._package_version_checked = offline
    logging.getLogger("clearml.Task").setLevel(logging.WARNING)
    TaskHandler._log_stderr = staticmethod(lambda text, level=logging.INFO: log.log(level, text))
