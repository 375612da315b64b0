"""Before a script leaves for a queue: is the queue there, and will a ClearML agent find all that the script needs?

An agent clones the repository from its remote, checks out the commit of the task and applies the uncommitted changes of
tracked files. What it then lacks it would tell after minutes, on another machine; here it is told at once.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from clearml_client import sdk, server
from clearml_client.configuration import display_path
from clearml_client.errors import RunError, plural


def check_queue(name: str) -> None:
    """Raises RunError where the server has no such queue."""
    answer = server.session().send_request("queues", "get_all", json={"only_fields": ["name"]})
    if not answer.ok:
        raise RunError(f"the ClearML server does not tell its queues: HTTP {answer.status_code}")
    names = sorted(queue["name"] for queue in answer.json()["data"]["queues"])
    if name not in names:
        there = f"its queues: {', '.join(names)}" if names else "it has none: make one under Workers & Queues"
        raise RunError(f"no queue {name!r} on the ClearML server; {there}")


def ask_git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode(errors="replace").strip()  # noqa: S603


def record_launch(script: Path, processes: int) -> None:
    """Let ClearML store that torchrun starts the script, so that an agent does: by itself it tells that of one way to
    start torchrun, and calls every other one a failure."""
    script = script.resolve()
    try:
        name = str(script.relative_to(ask_git(script.parent, "rev-parse", "--show-toplevel")))
    except (OSError, subprocess.CalledProcessError, ValueError):  # no repository: ClearML stores the script itself
        name = script.name
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes} {name}"
    os.environ.update(CLEARML_VCS_ENTRY_POINT=launch, CLEARML_VCS_WORK_DIR=".")
    os.environ.pop("TORCHELASTIC_RUN_ID", None)  # by which ClearML would look for it


def check_repository(script: Path) -> None:
    """Raises RunError for what an agent could not run; prints what it will not have."""
    folder = script.resolve().parent
    git = partial(ask_git, folder)
    try:
        root = Path(git("rev-parse", "--show-toplevel"))
        commit = git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError) as error:
        cure = "git init, commit, push; or clone the repository"
        raise RunError(f"{display_path(folder)} is in no git repository, from which an agent gets it", cure) from error
    if not git("remote"):
        cure = "git remote add origin URL; git push --set-upstream origin HEAD"
        raise RunError(f"the repository {display_path(root)} has no remote, from which an agent gets it", cure)
    if not git("branch", "--remotes", "--contains", commit):
        raise RunError(f"the commit {commit[:10]} is not pushed: an agent cannot get it", "git push")
    tracked = {root / name for name in git("ls-files", "-z", "--full-name", str(root)).split("\0")}
    files = [Path(file) for module in [*sys.modules.values()] if (file := getattr(module, "__file__", None))]
    # A relative name is no file: torch.ops calls itself `_ops.py`.
    used = {file.resolve() for file in files if file.is_absolute() and not file.is_relative_to(sys.prefix)}
    used.add(script.resolve())
    missing = sorted(str(file.relative_to(root)) for file in used - tracked if file.is_relative_to(root))
    if missing:
        raise RunError(f"git does not track {', '.join(missing)}: an agent would not have it", f"git add {missing[0]}")
    changes = git("diff", "HEAD")
    if len(changes) > sdk.MOST_CHANGES:
        what = f"{plural(len(changes), 'byte')} of uncommitted changes, of which ClearML stores {sdk.MOST_CHANGES:,}"
        raise RunError(what, "commit and push them")
    if "\nBinary files " in changes:
        raise RunError("an agent cannot apply uncommitted changes of binary files", "commit and push them")
    if others := git("ls-files", "--others", "--exclude-standard", "--directory", str(root)).splitlines():
        print(f"Not at the agent, since git does not track them: {', '.join(others[:5])}{' ...' * (len(others) > 5)}")


def requirements(output_uri: str = "") -> list[str]:
    return []


def exclude_lock_from_diff() -> None:
    """Keep uv.lock, which uv completes in the checkout, out of the uncommitted changes that ClearML stores.

    .gitattributes gives the lock the diff driver `pins`; here, for git as the SDK calls it, that driver shows nothing.
    """
    count = int(os.getenv("GIT_CONFIG_COUNT") or 0)
    os.environ[f"GIT_CONFIG_KEY_{count}"] = "diff.pins.textconv"
    os.environ[f"GIT_CONFIG_VALUE_{count}"] = "true"
    os.environ["GIT_CONFIG_COUNT"] = str(count + 1)
