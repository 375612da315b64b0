"""Types for argparse: what they refuse ends with exit code 2, before anything exists."""

import argparse
import re
from collections.abc import Callable

import torch

from clearml_client.faults import RunError, line
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


def device_name(text: str) -> str:
    """`auto` or the name of a device that this machine has."""
    try:
        torch.empty(1, device="cpu" if text == "auto" else text).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # depends on the device's kind
        raise argparse.ArgumentTypeError(f"no device {text!r} on this machine: {line(error).split('. ')[0]}") from None
    return text


def storage_uri(text: str) -> str:
    """Where objects can go, or "" for the default. What it refuses it does not repeat: it may hold a secret."""
    try:
        check_uri(text)
    except RunError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
