"""Prints a task as JSON, as the SDK reads it back from the server; a process of its own, as any user of it is.

python tests/read_task.py TASK-ID FOLDER     # artifacts, models and debug samples are fetched into FOLDER
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from clearml import StorageManager, Task


def fetch(url: str, folder: Path) -> str:
    """A copy that stays when the SDK's cache goes."""
    copy = StorageManager.get_local_copy(url, force_download=True)
    return str(shutil.copy(copy, folder / f"{len(list(folder.iterdir()))}-{Path(copy).name}"))


def read(task_id: str, folder: Path) -> dict[str, Any]:
    task = Task.get_task(task_id)
    models = [
        {
            "name": model.name,
            "framework": model.framework,
            "labels": model.labels,
            "design": model.config_text,
            "url": model.url,
            "file": fetch(model.url, folder),
        }
        for model in task.models["output"]
    ]
    artifacts = {
        name: {"metadata": artifact.metadata, "file": fetch(artifact.url, folder)}
        for name, artifact in task.artifacts.items()
    }
    samples = [sample["url"] for sample in task.get_debug_samples("mistakes", "test")]
    return {
        "status": str(task.status),
        "name": task.name,
        "project": task.get_project_name(),
        "tags": task.get_tags(),
        "output_uri": task.data.output.destination,
        "parameters": task.get_parameters(),
        "id": task.id,
        "network": task.get_configuration_object("network"),
        "scalars": task.get_reported_scalars(),
        "single": task.get_reported_single_values(),
        "plots": {plot["metric"]: json.loads(plot["plot_str"]) for plot in task.get_reported_plots()},
        "console": "\n".join(task.get_reported_console_output(number_of_reports=1000)),
        "models": models,
        "artifacts": artifacts,
        "samples": [fetch(url, folder) for url in samples],
    }


if __name__ == "__main__":
    print("\n" + json.dumps(read(sys.argv[1], Path(sys.argv[2]))))
