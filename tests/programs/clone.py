"""Clone a task, change parameters, print the clone's id: task id, then names and values in turn."""

import sys

from clearml import Task

task, *changes = sys.argv[1:]
clone = Task.clone(task)
for name, value in zip(changes[::2], changes[1::2], strict=True):
    clone.set_parameter(name, value)
print(clone.id)
