"""Every name of the ClearML SDK (2.1.12) that is not public, each with the reason for it.

Nothing else in this package, and nothing in the example, uses another one. tests/test_sdk.py asks the installed SDK
for each of them: an upgrade that moves one is one red line there.
"""

import atexit
import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import clearml

# Unused names of this list are used by the modules that import them from here.
from clearml.backend_api import Session  # the addresses, as file and variables have them; unnecessary: a public getter
from clearml.backend_api.session.session import LoginError  # Task.init's, for keys that are not accepted
from clearml.backend_api.utils import get_http_session_with_retry  # asks as the SDK asks: same certificates and proxies
from clearml.backend_config.defs import get_config_file  # the file that the SDK reads
from clearml.backend_interface.session import SendError  # of a call that the server refuses, whenever it comes
from clearml.backend_interface.task.repo.scriptinfo import ScriptInfo
from clearml.config import config_obj, get_cache_dir  # the merged settings; unnecessary: Task.get_config() or the like
from clearml.storage.helper import StorageHelper, _Boto3Driver, _HttpDriver

__all__ = ["Session", "config_obj", "get_cache_dir", "get_config_file", "get_http_session_with_retry"]
ERRORS = (LoginError, SendError)
MOST_CHANGES: int = ScriptInfo.max_diff_size_bytes  # of uncommitted changes; more of them are not stored at all
FOLDER = str(Path(clearml.__file__).parent)


def setting(key: str, default: Any = None) -> Any:
    """A value of the merged configuration, such as "api.api_server"."""
    return config_obj.get(key, default)


def put(key: str, value: Any) -> None:
    """Change a leaf of the live configuration: `set_overrides` would read all files again."""
    section, name = key.split(".", 1)
    config_obj.get(section).put(name, value)


def forget_settings() -> None:
    """The next `setting` reads all files again."""
    config_obj._config = None


def is_offline() -> bool:
    """CLEARML_OFFLINE_MODE, which Task.is_offline() would tell only with the whole SDK loaded."""
    return bool(Session._offline_mode)


def limit_session(connect: float, answer: float) -> None:
    """Seconds that a request of a new Session waits: the SDK's own 300 cannot be configured."""
    Session._session_timeout = (connect, answer)


def s3_entry(uri: str) -> tuple[Any, bool]:
    """The S3BucketConfig by which the SDK opens this place, and whether it is an entry of clearml.conf's list.

    Raises TypeError or ValueError where the list itself is wrong.
    """
    configurations = StorageHelper._s3_configurations
    entry = configurations.get_config_by_uri(uri)
    return entry, any(entry is known for known in configurations._buckets)


def s3_arguments(entry: Any) -> dict[str, Any]:
    """boto3's arguments, as the SDK makes them of such an entry; unnecessary: a public way to the SDK's own client."""
    arguments: dict[str, Any] = _Boto3Driver._get_boto_resource_kwargs_from_config(entry)
    return arguments


def file_servers() -> list[str]:
    """Addresses that the SDK takes for file servers, and sends its token to."""
    return [host.rstrip("/") for host in _HttpDriver.get_file_server_hosts()]


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise OSError with a store's words, which the SDK only logs; print nothing."""
    said: list[str] = []

    def catch(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            said.append(record.getMessage())
        return False

    logger = logging.getLogger("clearml.storage")
    logger.addFilter(catch)
    try:
        yield
    except Exception as error:
        raise OSError(errno.EIO, said[0] if said else str(error)) from error
    finally:
        logger.removeFilter(catch)


def canonical(address: str) -> str:
    """The address after the path substitutions of clearml.conf."""
    return str(StorageHelper._canonize_url(address))


def run_folder(task: Any) -> str:
    """project/task name.id, below which the SDK puts all objects of a task; unnecessary: a public getter for it."""
    folder: str = task._get_output_destination_suffix()
    return folder


def forget_exit_handler(task: Any) -> None:
    """At the end of the process the SDK would set a status of its own; unnecessary: a public way to say no."""
    atexit.unregister(task._at_exit)


def be_quiet(offline: bool) -> None:
    """Of what the SDK does unasked at each start: look for a GPU where there is no driver of one, which ends in two
    warnings, and ask a service on the internet for newer versions, which an offline session must not do."""
    from clearml.utilities import resource_monitor
    from clearml.utilities.check_updates import CheckPackageUpdates

    if not shutil.which("nvidia-smi"):
        resource_monitor.gpustat = None
    CheckPackageUpdates._package_version_checked = offline
