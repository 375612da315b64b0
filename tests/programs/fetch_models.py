"""Fetch the model of each task, and print where it is: task ids."""

import sys

from clearml import Task

for task in sys.argv[1:]:
    (model,) = Task.get_task(task).models["output"]
    print(model.get_local_copy(raise_on_error=True))
