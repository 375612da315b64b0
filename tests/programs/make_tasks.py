"""Tasks as the SDK leaves them, with names that need quoting: project, targets."""

import sys
from pathlib import Path

import numpy as np
from clearml import OutputModel, Task
from clearml.storage.helper import _GoogleCloudStorageDriver

_GoogleCloudStorageDriver.test_upload = lambda *_, **__: True  # asks for permissions, which the emulator has not
Task._report_subprocess_enabled = False
project, *targets = sys.argv[1:]
for uri in targets:
    task = Task.init(
        project,
        "näme #1 ?&%41+ü",
        reuse_last_task_id=False,
        auto_connect_frameworks=False,
        auto_resource_monitoring=False,
    )
    task.storage_uri = uri
    logger = task.get_logger()
    logger.set_default_upload_destination(uri)
    Path("m #1 ?%41.pt").write_bytes(b"m" * 1000)
    OutputModel(task, name="model").update_weights("m #1 ?%41.pt", async_enable=False, auto_delete_file=False)
    task.upload_artifact("a b&c?#%41+ä", {"x": 1}, wait_on_upload=True)
    for iteration in range(3):
        logger.report_image("t/1 ?#", "s &%41", iteration, image=np.zeros((8, 8, 3), np.uint8))
    task.flush(wait_for_uploads=True)
    task.close()
    task.set_archived(True)
