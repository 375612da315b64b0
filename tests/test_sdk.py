"""Every private name of the SDK that clearml_client/sdk.py uses, asked of the SDK that is installed."""

import inspect

import clearml.utilities.resource_monitor
from clearml import Task
from clearml.backend_interface.metrics import Reporter
from clearml.backend_interface.task.development.worker import DevWorker
from clearml.backend_interface.task.log import TaskHandler
from clearml.storage.helper import StorageHelper, _Boto3Driver, _HttpDriver
from clearml.utilities.check_updates import CheckPackageUpdates

from clearml_client import sdk

NAMES = [
    (sdk.config_obj, "set_config_impl"),
    (sdk.Session, "get_api_server_host"),
    (sdk.Session, "get_app_server_host"),
    (StorageHelper, "_canonize_url"),
    (_Boto3Driver, "_get_boto_resource_kwargs_from_config"),
    (_HttpDriver, "get_file_server_hosts"),
    (Task, "_at_exit"),
    (Reporter, "flush"),
    (Reporter, "stop"),
    (Reporter, "wait_for_events"),
    (TaskHandler, "close"),
    (DevWorker, "unregister"),
    (TaskHandler, "_log_stderr"),
    (clearml.utilities.resource_monitor, "gpustat"),
    (CheckPackageUpdates, "_package_version_checked"),
]


def test_every_private_name_is_still_there() -> None:
    assert [name for owner, name in NAMES if not hasattr(owner, name)] == []
    assert "http_retries_config" in inspect.signature(sdk.Session.__init__).parameters
    assert "self._session_timeout" in inspect.getsource(sdk.Session)  # there it is in any case: sdk.py has set it
