"""Types for argparse: what they refuse ends with exit code 2, before anything exists."""

import argparse
import re
from collections.abc import Callable

import torch

from clearml_client import ranks
from clearml_client.errors import RunError, one_line, plural
from clearml_client.storage import check_uri


def number(kind: Callable[[str], float], low: float, high: float = 1e9) -> Callable[[str], float]:
    """A number from `low` to `high`, which NaN is not."""

    def parse(text: str) -> float:
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse's message names it
    return parse


def label(text: str) -> str:
    """A name that ClearML takes, and whose files it finds again."""
    if re.search("[\ud800-\udfff]", text):
        raise argparse.ArgumentTypeError("its letters did not arrive: set LC_ALL=C.UTF-8")
    if len(text.strip()) < 3 or '"' in text or ".." in text.split("/"):
        raise argparse.ArgumentTypeError("a name has three characters or more, no double quote and no part `..`")
    return text


def check_together(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What no argument can tell alone. Exits as argparse does."""
    if args.batch_size < ranks.RANKS:
        parser.error(f"argument --batch-size: {args.batch_size} images are too few for {ranks.RANKS} processes")
    if args.queue is None:
        if reason := no_device(args.device):
            parser.error(f"argument --device: {reason}")
        return
    if not args.queue.strip():
        parser.error("argument --queue: an empty name")
    if args.offline:
        parser.error("argument --queue: not allowed with --offline: no agent gets an offline session")
    if args.resume is not None:
        parser.error("argument --queue: not allowed with --resume: the checkpoint is here, and not at the agent")


def no_device(name: str) -> str:
    """Why this machine cannot compute there; nothing for `auto` and each device that it has."""
    try:
        torch.empty(1, device="cpu" if name == "auto" else name).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # depends on the device's kind
        return f"no device {name!r} on this machine: {one_line(error).split('. ')[0]}"
    gpus = torch.cuda.device_count() if name.startswith(("auto", "cuda")) else 0
    if 0 < gpus < ranks.LOCAL_RANKS:
        return f"{ranks.LOCAL_RANKS} processes and {plural(gpus, 'GPU')}: --nproc-per-node {gpus}, or --device cpu"
    return ""


def storage_uri(text: str) -> str:
    """Where objects can go, or "" for the default. What it refuses it does not repeat: it may hold a secret."""
    try:
        check_uri(text)
    except RunError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
