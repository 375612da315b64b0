"""Checkpoints, and --resume: for scripts that use torch."""

import argparse
import os
import pickle
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clearml import Task

from clearml_client.ending import ending
from clearml_client.errors import RunError, one_line

CHANGEABLE = {"offline", "device", "data_dir", "output_dir", "output_uri"}  # in a resumed run, which keeps them if not
flushing: threading.Thread | None = None


@dataclass
class Progress:
    """How far a run has come. Without --resume: not at all."""

    task: str = ""  # the id
    epoch: int = 0
    path: Path | None = None
    args: dict[str, Any] = field(default_factory=dict)  # with which it began
    states: dict[str, Any] = field(default_factory=dict)


def save_atomically(content: object, path: Path) -> None:
    """Save with torch.save, all or nothing: whatever dies meanwhile, the file at `path` is whole. Raise RunError."""
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch wraps what the disk says
        cause = next((each for each in (error, error.__context__) if isinstance(each, OSError)), None)
        with suppress(OSError):  # a disk that cannot be written
            part.unlink()
        raise RunError(f"cannot write {path}: {cause.strerror if cause else one_line(error)}") from error


def save(path: Path, args: argparse.Namespace, task: str, epoch: int, parts: dict[str, Any]) -> None:
    """Save what --resume goes on from: arguments, task id, epoch, the states of all parts and of torch's CPU generator.

    What the checkpoint covers is sent to the ClearML server first. The last line of a run that ends early names the
    file, and the guard removes it once the run is complete. Raise RunError.
    """
    flush_reports()
    given = {name: value for name, value in vars(args).items() if name not in ("resume", "queue")}
    given |= {name: str(value.absolute()) for name, value in given.items() if isinstance(value, Path)}
    states = {name: part.state_dict() for name, part in parts.items()}
    content = {"args": given, "task": task, "epoch": epoch, "states": states, "generator": torch.get_rng_state()}
    save_atomically(content, path)
    earlier, ending.checkpoint = ending.checkpoint, path
    if earlier and earlier.absolute() != path.absolute() and earlier.parent.name.startswith("offline-"):
        with suppress(OSError):  # a folder that cannot be written
            earlier.unlink()  # of the offline session that goes on in this one
            earlier.parent.rmdir()  # if nothing else is in it


def flush_reports() -> None:
    """Let ClearML send what it has to report. Where the server is away, wait for it once, and not at each epoch."""
    global flushing
    if (task := Task.current_task()) and not (flushing and flushing.is_alive()):
        flushing = threading.Thread(target=task.flush, kwargs={"wait_for_uploads": True}, daemon=True)
        flushing.start()
        flushing.join(5)


def parse_args(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Progress]:
    """Parse the arguments and, with --resume, load the checkpoint, whose arguments are the defaults.

    `--resume` without a path takes the newest checkpoint below --output-dir. Exit as argparse does, with code 2, for
    whatever is wrong; with code 1 where the file cannot be used.
    """
    parser.usage = "%(prog)s [options]"  # short: an error stands below it
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--resume", nargs="?", const="")
    first.add_argument("--output-dir", type=Path, default=parser.get_default("output_dir"))
    given, _ = first.parse_known_args()
    progress = Progress() if given.resume is None else load(parser, given.resume, given.output_dir)
    parser.set_defaults(**progress.args)
    args = parser.parse_args()  # once: ClearML records what it parses
    for name, value in progress.args.items():
        if name not in CHANGEABLE and getattr(args, name, value) != value:
            parser.error(f"argument --resume: --{name.replace('_', '-')} was {value}, and cannot change now")
    try:
        torch.empty(1, device="cpu" if args.device == "auto" or args.queue else args.device)  # an agent has its own
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # depends on the device's kind
        reason = one_line(error).split(". ")[0]
        parser.error(f"argument --device: no device {args.device!r} on this machine: {reason}")
    return args, progress


def newest(folder: Path, name: str) -> Path | None:
    """Find the newest file of this name, in this folder or in one of those in it."""
    found = [*folder.glob(name), *folder.glob(f"*/{name}")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def load(parser: argparse.ArgumentParser, resume: str, output_dir: Path) -> Progress:
    """Load the checkpoint `resume`, or the newest one of that folder; where nothing is named, of `output_dir`."""
    given = Path(resume) if resume else output_dir
    path = given if given.is_file() else newest(given, "checkpoint.pt")
    if not path:
        model = newest(given, "model.pt") if given.is_dir() else given.with_name("model.pt")
        hint = "name the folder of a run that was stopped after its first epoch; an offline run is resumed in a new one"
        if model and model.exists():
            hint = f"a complete run keeps no checkpoint, but its model: {model}"
        parser.error(f"argument --resume: no checkpoint at {given}; {hint}")
    try:  # tensors and plain values only: nothing in the file is executed
        content = torch.load(path, map_location="cpu", weights_only=True)
        states = {**content["states"], "generator": content["generator"]}
        progress = Progress(content["task"], content["epoch"], path, dict(content["args"]), states)
    except (OSError, EOFError, LookupError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        damaged = "it is damaged, or no checkpoint.pt of an earlier run; a complete run keeps none"
        reason = error.strerror if isinstance(error, PermissionError) else damaged
        parser.exit(1, f"{parser.prog}: error: cannot resume from {path}: {reason}\n")
    ending.checkpoint = path
    return progress


def restore(progress: Progress, parts: dict[str, Any]) -> None:
    """Give each part, and torch's CPU generator, the state that `save` found. Do nothing without --resume.

    Raise RunError where a state is another network's.
    """
    if not progress.path:
        return
    try:
        for name, part in parts.items():
            part.load_state_dict(progress.states[name])
        torch.set_rng_state(progress.states["generator"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        ending.checkpoint = None  # no advice to do the same again
        raise RunError(f"cannot resume from {progress.path}: {type(error).__name__}: {one_line(error)}") from error
    new = ", in a new session, which begins there" if Task.is_offline() else ""
    print(f"resumed after epoch {progress.epoch} from {progress.path}{new}")
