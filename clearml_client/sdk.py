"""Every name of the ClearML SDK (2.1.12) that is not public, each with its reason and the way out.

Nothing else in this package, and nothing in the example, uses another one. tests/test_sdk.py asks the installed SDK
for each of them: an upgrade that moves one is one red line there.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import clearml

# Unused names of this list are used by the modules that import them from here.
from clearml.backend_api import Session  # the addresses, and calls of ours; way out: a public getter, and APIClient
from clearml.backend_api.session.session import LoginError  # Task.init's, for keys that are not accepted; an export
from clearml.backend_api.utils import get_http_session_with_retry  # the SDK's certificates and proxies; an export
from clearml.backend_config.bucket_config import GSBucketConfigurations, S3BucketConfigurations
from clearml.backend_config.defs import get_config_file  # the file that the SDK reads; an export
from clearml.backend_interface.session import SendError  # of a call that the server refuses, whenever; an export
from clearml.backend_interface.task.repo.scriptinfo import ScriptInfo
from clearml.config import config_obj, get_cache_dir  # the merged settings; way out: Task.get_config() or the like
from clearml.storage.helper import StorageHelper, _Boto3Driver, _GoogleCloudStorageDriver, _HttpDriver

__all__ = ["Session", "config_obj", "get_cache_dir", "get_config_file", "get_http_session_with_retry"]
ERRORS = (LoginError, SendError)
MOST_CHANGES: int = ScriptInfo.max_diff_size_bytes  # of uncommitted changes; more of them are not stored at all
FOLDER = str(Path(clearml.__file__).parent)


def setting(key: str, default: Any = None) -> Any:
    """Return a value of the merged configuration, such as "api.api_server"."""
    return config_obj.get(key, default)


def put(key: str, value: Any) -> None:
    """Change a leaf of the live configuration: `set_overrides` would read all files again."""
    section, name = key.split(".", 1)
    config_obj.get(section).put(name, value)


def forget_settings() -> None:
    """Let the next `setting` read all files again."""
    config_obj.set_config_impl(None)


def limit_session(connect: float, answer: float) -> None:
    """Set the seconds that a request of a new Session waits; way out: a setting in place of the SDK's own 300."""
    Session._session_timeout = (connect, answer)


def send_request(*arguments: Any, **options: Any) -> Any:
    """Send a call once more where a restarted server did not know its token any more.

    The SDK gets a new token, but sends the call again with the old one; way out: the same there.
    """
    answer = send_once(*arguments, **options)
    return send_once(*arguments, **options) if answer is not None and answer.status_code == 401 else answer


send_once, Session.send_request = Session.send_request, send_request


def s3_entry(uri: str) -> tuple[Any, bool]:
    """Return the S3BucketConfig by which the SDK opens this place, and whether it is an entry of clearml.conf's list.

    Raise TypeError or ValueError where the list itself is wrong. Way out: a public way to the SDK's own client.
    """
    configurations = S3BucketConfigurations.from_config(setting("sdk.aws.s3", {}))
    entry = configurations.get_config_by_uri(uri)
    return entry, configurations.get_config_by_bucket(*entry.get_bucket_host()) is not None


def s3_arguments(entry: Any) -> dict[str, Any]:
    """Return boto3's arguments, as the SDK makes them of such an entry; way out: the same."""
    arguments: dict[str, Any] = _Boto3Driver._get_boto_resource_kwargs_from_config(entry)
    return arguments


def gcs_bucket(uri: str) -> Any:
    """Return the google.cloud.storage.Bucket that the SDK uses for this place; way out: the same.

    Raise whatever its library raises.
    """
    entry = GSBucketConfigurations.from_config(setting("sdk.google.storage", {})).get_config_by_uri(uri)
    return _GoogleCloudStorageDriver().get_container(container_name=uri_base(uri), config=entry).bucket


def uri_base(uri: str) -> str:
    """Return gs://bucket of gs://bucket/path."""
    return "/".join(uri.split("/")[:3])


def file_servers() -> list[str]:
    """List the addresses that the SDK takes for file servers, and sends its token to; way out: a public getter."""
    return [host.rstrip("/") for host in _HttpDriver.get_file_server_hosts()]


def canonical(address: str) -> str:
    """Return the address after the path substitutions of clearml.conf; way out: a public function."""
    return str(StorageHelper._canonize_url(address))


def be_quiet(offline: bool) -> None:
    """Leave out what the SDK does unasked at each start; way out: settings for it.

    It looks for a GPU where there is no driver of one, which ends in two warnings; asks a service on the internet for
    newer versions, which an offline session must not do; and tells that it waits for its look at the repository.
    """
    from clearml.utilities import resource_monitor
    from clearml.utilities.check_updates import CheckPackageUpdates

    if not shutil.which("nvidia-smi"):
        resource_monitor.gpustat = None
    CheckPackageUpdates._package_version_checked = offline
    logging.getLogger("clearml.Task").setLevel(logging.WARNING)


# --- to be deleted with their users: the doctor's checks of Azure and of versions, and the computed folders -----------
def is_offline() -> bool:
    """Use clearml.Task.is_offline()."""
    return bool(clearml.Task.is_offline())


def azure_entry(uri: str) -> Any:
    """The account and key for this container, or None."""
    return StorageHelper._azure_configurations.get_config_by_uri(uri)


def api_versions() -> list[tuple[int, ...]]:
    """The versions of the server's API that this SDK has calls for, oldest first."""
    import clearml.backend_api.services

    folders = Path(clearml.backend_api.services.__path__[0]).glob("v*")
    return sorted(tuple(map(int, folder.name[1:].split("_"))) for folder in folders)


def run_folder(task: Any) -> str:
    """project/task name.id, below which the SDK puts all objects of a task; unnecessary: a public getter for it."""
    folder: str = task._get_output_destination_suffix()
    return folder
