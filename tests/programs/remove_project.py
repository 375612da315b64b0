"""Remove a project of a live server, with all its tasks: name."""

import sys

from clearml import Task
from clearml.backend_api.session.client import APIClient

for task in Task.query_tasks(project_name=sys.argv[1]):
    Task.get_task(task).delete(raise_on_error=True)
for project in APIClient().projects.get_all(name=f"^{sys.argv[1]}$", only_fields=["id"]):
    APIClient().projects.delete(project=project.id)
