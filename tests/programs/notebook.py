"""What a notebook's %run does, as far as it can be told without Jupyter: programs in one process, which goes on.

python tests/programs/notebook.py "a command" "-m another one"     # prints the exit code of each
"""

import builtins
import io
import runpy
import shlex
import sys
import types
from pathlib import Path
from typing import Any


class Stream(io.TextIOBase):
    """Without reconfigure() and fileno(), as a notebook's."""

    def __init__(self, stream: Any) -> None:
        self.write, self.flush = stream.write, stream.flush  # type: ignore[method-assign]


sys.path.insert(0, str(Path(__file__).parents[2]))
ipython: Any = types.ModuleType("IPython")
ipython.get_ipython = lambda: None
sys.modules["IPython"] = ipython
builtins.__dict__["__IPYTHON__"] = True
sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
for command in sys.argv[1:]:
    sys.argv = shlex.split(command)
    code: object = 0
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    print(f"%run {command}: {code}")
