"""Before a script leaves for a queue: is the queue there, and will a ClearML agent find all that the script needs?

An agent clones the repository from its remote, checks out the commit of the task and applies the uncommitted changes of
tracked files. What it then lacks it would tell after minutes, on another machine; here it is told at once.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from clearml_client import sdk, server, storage
from clearml_client.configuration import display_path
from clearml_client.errors import ROOT, RunError, one_line, plural


def requirements(output_uri: str = "") -> list[str]:
    """List what an agent installs: pyproject's group `client`, and the package for this storage, as they are here.

    Without such a group the list is empty, and ClearML finds the imported packages by itself.
    """
    file = ROOT / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    groups = project.get("dependency-groups", {})
    wanted: list[Any] = [*groups.get("client", [])]
    if wanted and (package := storage.PACKAGES.get(output_uri.partition(":")[0])):
        wanted.append(package[0])
    versions = {}
    for item in wanted:
        if isinstance(item, dict):
            wanted += groups[item["include-group"]]  # which are looked at in their turn
            continue
        name = re.split(r"[^\w.-]", item, maxsplit=1)[0]
        with suppress(importlib.metadata.PackageNotFoundError):  # it is for another platform, by its marker
            versions[name] = importlib.metadata.version(name)
    return [f"{name}=={version}" for name, version in versions.items()]


def exclude_lock_from_diff() -> None:
    """Keep uv.lock, which uv completes in the checkout, out of the uncommitted changes that ClearML stores.

    .gitattributes gives the lock the diff driver `pins`; here, for git as the SDK calls it, that driver shows nothing.
    """
    given = os.getenv("GIT_CONFIG_COUNT", "")
    count = int(given) if given.isdecimal() else 0  # git refuses anything else
    os.environ[f"GIT_CONFIG_KEY_{count}"] = "diff.pins.textconv"
    os.environ[f"GIT_CONFIG_VALUE_{count}"] = "true"
    os.environ["GIT_CONFIG_COUNT"] = str(count + 1)


def own_modules() -> list[ModuleType]:
    """List the modules that are neither Python's nor of an installed package."""
    # A relative name is no file: torch.ops calls itself `_ops.py`.
    modules = [module for module in [*sys.modules.values()] if str(getattr(module, "__file__", "")).startswith("/")]
    installed = (f"{sys.prefix}/", f"{sysconfig.get_path('stdlib')}/")  # not base_prefix: a checkout may be below /usr
    return [module for module in modules if not str(module.__file__).startswith(installed)]


def check_queue(name: str) -> None:
    names = sorted(queue["name"] for queue in server.call("queues.get_all", only_fields=["name"])["queues"])
    if name not in names:
        there = f"its queues: {', '.join(names)}" if names else "it has none: make one under Workers & Queues"
        raise RunError(f"no queue {name!r} on the ClearML server; {there}")


def ask_git(folder: Path, *arguments: str) -> str:
    """Return what git answers. Raise RunError with its own reason."""
    quiet = {**os.environ, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60, env=quiet)  # noqa: S603
    except FileNotFoundError as error:
        raise RunError("git is missing here: an agent gets the script by it", "install git") from error
    except subprocess.TimeoutExpired as error:
        raise RunError(f"git {arguments[0]}: no answer for {error.timeout:g} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace")
        reason = re.search("^fatal: (.*)", said, re.MULTILINE)
        what = f"git {arguments[0]} in {display_path(folder)}: {one_line(reason[1] if reason else said)}"
        cure = "git init, commit, push; or clone the repository" if arguments[0] == "rev-parse" else ""
        trusting = re.search("git config --global --add safe.directory .*", said)
        raise RunError(what, trusting[0] if trusting else cure) from error
    return done.stdout.decode(errors="replace").strip()


def check_repository(script: Path) -> None:
    """Raise RunError for what an agent could not run; print what it will not have."""
    folder = script.resolve().parent
    git = partial(ask_git, folder)
    root = Path(git("rev-parse", "--show-toplevel"))
    commit = git("rev-parse", "--verify", "HEAD")
    remotes = git("remote").split()
    if not remotes:
        cure = "git remote add origin URL; git push --set-upstream origin HEAD"
        raise RunError(f"the repository {display_path(root)} has no remote for an agent to clone", cure)
    # Other references are what a clone does not get: of a pull request's merge, say.
    branches = [f"refs/remotes/{remote}/" for remote in remotes]
    if not git("for-each-ref", "--contains", commit, *branches) and commit not in git("ls-remote", "--heads", "--tags"):
        raise RunError(f"the commit {commit[:10]} is not pushed: an agent cannot get it", "git push")
    tracked = {root / name for name in git("ls-files", "-z", "--full-name", str(root)).split("\0")}
    used = {script.resolve(), *(Path(str(module.__file__)).resolve() for module in own_modules())}
    missing = sorted(str(file.relative_to(root)) for file in used - tracked if file.is_relative_to(root))
    if missing:
        raise RunError(f"git does not track {', '.join(missing)}: an agent would not have it", f"git add {missing[0]}")
    changes = git("diff", "HEAD")
    if len(changes) > sdk.MAX_DIFF_BYTES:
        what = f"{plural(len(changes), 'byte')} of uncommitted changes; an agent gets at most {sdk.MAX_DIFF_BYTES:,}"
        raise RunError(what, "commit and push them")
    if "\nBinary files " in changes:
        raise RunError("an agent cannot apply uncommitted changes of binary files", "commit and push them")
    if others := git("ls-files", "--others", "--exclude-standard", "--directory", str(root)).splitlines():
        print(f"Not at the agent, since git does not track them: {', '.join(others[:5])}{' ...' * (len(others) > 5)}")
