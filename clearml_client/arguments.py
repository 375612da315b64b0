"""Types for argparse. What they refuse ends with exit code 2, before anything exists."""

import argparse
import os
from collections.abc import Callable
from urllib.parse import quote

from clearml_client.configuration import variable
from clearml_client.errors import RunError
from clearml_client.server import PARTS
from clearml_client.storage import check_uri

LONGEST = 220  # bytes of a quoted name: ClearML adds an id of 33, and file systems allow 255


def number(kind: Callable[[str], float], low: float, high: float = 2**32 - 1) -> Callable[[str], float]:
    """Return a type for numbers from `low` to `high`, which NaN is not."""

    def parse(text: str) -> float:
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return value

    parse.__name__ = kind.__name__  # argparse's message names it
    return parse


def name(text: str) -> str:
    """Accept a name that ClearML takes, and that can be part of a path in any storage."""
    try:
        quoted = quote(text, safe="")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not valid UTF-8: set LC_ALL=C.UTF-8") from None
    if len(text.strip()) < 3 or '"' in text or ".." in text.split("/"):
        raise argparse.ArgumentTypeError("a name has three characters or more, no double quote and no part `..`")
    if len(quoted) > LONGEST:
        raise argparse.ArgumentTypeError(f"a name has at most {LONGEST} bytes when quoted for a URL, where ä takes 6")
    return text


def names(text: str) -> str:
    """Accept the name of a project. Each part between slashes is a project's name, too."""
    if any(len(part.strip()) < 3 for part in text.split("/") if part):
        raise argparse.ArgumentTypeError(PARTS)
    return name(text)


def storage_uri(text: str) -> str:
    """Accept a place for objects, or "" for the default. What is refused is not repeated: it may hold a secret."""
    try:
        check_uri(text)
    except RunError as error:
        name = "CLEARML_OUTPUT_URI"
        source = f"{variable(name)}: " * (text == os.getenv(name))
        raise argparse.ArgumentTypeError(f"{source}{error.message()}") from None
    return text
