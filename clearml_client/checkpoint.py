"""Files that are whole or not there, and what --resume needs of them: for scripts that use torch."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from clearml import Task

from clearml_client import ranks
from clearml_client.arguments import check_together
from clearml_client.errors import RunError, one_line
from clearml_client.run import ending

State = dict[str, Any]
UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError)


def write(state: State, path: Path) -> None:
    """torch.save, all or nothing: whatever dies meanwhile, the file at `path` is whole. Raises RunError."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch wraps what the disk says
        cause = next((each for each in (error, error.__context__) if isinstance(each, OSError)), None)
        part.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {cause.strerror if cause else one_line(error)}") from error


def save(path: Path, parts: dict[str, Any], args: argparse.Namespace, **more: Any) -> None:
    """The state of each part, of torch's generator, the arguments and more plain values: what --resume goes on from.

    The last line of a run that ends early names it. Raises RunError.
    """
    plain = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in vars(args).items()}
    state = {name: part.state_dict() for name, part in parts.items()}
    write({**state, "generator": torch.get_rng_state(), "args": plain, "model": "", **more}, path)
    ending.checkpoint, ending.folder = path, path.parent


def load(path: Path, net: torch.nn.Module) -> State:
    """What `save` wrote, and its `path`. Tensors and plain values only: nothing in the file is executed.

    Raises RunError where it is damaged, no such file, or of another network than this.
    """
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"generator", "args", "model"} - set(state):
            raise TypeError(f"not a checkpoint of this script, without {', '.join(sorted(missing))}")
        net.load_state_dict(state["net"])
    except UNREADABLE as error:
        raise RunError(f"cannot resume from {path}: {type(error).__name__}: {one_line(error)}") from error
    return {**state, "path": path}


def restore(saved: State, parts: dict[str, Any]) -> None:
    """Give each part, and torch's generator, the state that `save` had of it, and say so. Of nothing, nothing."""
    if not saved:
        return
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["generator"])
    session = ", in a new session" if Task.is_offline() else ""
    if ranks.RANK == 0:
        print(f"resumed after epoch {saved['epoch']} from {saved['path']}{session}")


def parse_args(
    parser: argparse.ArgumentParser, net: torch.nn.Module, fixed: list[str]
) -> tuple[argparse.Namespace, State]:
    """The arguments and, with --resume, the checkpoint that it names, or the newest below --output-dir; else nothing.

    The checkpoint's arguments are the parser's defaults, so that what is given on the command line wins; the parser
    parses once, since ClearML records what it parses. Exits, as argparse does, where there is no checkpoint, where a
    `fixed` argument would change, where the run is finished, and where arguments do not go together. Raises RunError
    where the file is no checkpoint.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--resume", nargs="?", const="")
    first.add_argument("--output-dir", type=Path, default=parser.get_default("output_dir"))
    given, _ = first.parse_known_args()
    if given.resume is None:
        args = parser.parse_args()
        check_together(parser, args)
        return args, {}
    newest = max(given.output_dir.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime, default=None)
    path = Path(given.resume) if given.resume else newest
    if path is None:
        parser.error(f"argument --resume: no checkpoint below {given.output_dir}")
    saved = load(path, net)
    parser.set_defaults(**{name: value for name, value in saved["args"].items() if name not in vars(given)})
    args = parser.parse_args()
    check_together(parser, args)
    for name in fixed:
        if getattr(args, name) != (began := saved["args"][name]):
            parser.error(f"argument --resume: --{name.replace('_', '-')} was {began}, and cannot change now")
    if saved["model"]:
        parser.error(f"argument --resume: this run is finished, its model: {saved['model']}")
    ending.checkpoint, ending.folder = path, path.parent
    return args, saved


def mark_finished(path: Path, model: str) -> None:
    """Write into a checkpoint where the model of its run is: from here on it is not resumed."""
    write({**torch.load(path, map_location="cpu", weights_only=True), "model": model}, path)
