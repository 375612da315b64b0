"""What tests read of a run: its printed epochs, its model, its curves, its offline session."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from clearml_server import ClearMLServer
from conftest import ROOT

import pytorch_mnist

SPEED = ("images per second", "train")  # the one curve that no two runs share

EPOCH = re.compile(r"(?m)^epoch (\d+)/(\d+)  train loss ([\d.]+)  test loss ([\d.]+)  test accuracy ([\d.]+)%")


def evaluate(model: Path, count: int = 10_000) -> float:
    """Accuracy of a stored state_dict on the first images of the test set, in per cent."""
    net = pytorch_mnist.Net().eval()
    net.load_state_dict(torch.load(model, weights_only=True))
    images, labels = pytorch_mnist.load_mnist(ROOT / "data", "t10k")
    with torch.inference_mode():
        batches = [net(pytorch_mnist.normalise(batch)) for batch in images[:count].split(1000)]
    return (torch.cat(batches).argmax(dim=1) == labels[:count]).double().mean().item() * 100


def read_session(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """The task, its events and its console, as the SDK recorded them."""
    with ZipFile(path) as session:
        events = [event for line in session.read("metrics.jsonl").splitlines() for event in json.loads(line)]
        lines = [event for line in session.read("log.jsonl").splitlines() for event in json.loads(line)]
        return json.loads(session.read("task.json")), events, "\n".join(line["msg"] for line in lines)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def stored_curves(server: ClearMLServer, task: str) -> dict[tuple[str, str], dict[int, float]]:
    """What the server has, point by point."""
    return curves_in(server.events[task].values())


def curves_in(events: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    """What the script reported, and not the SDK's monitor; a doubled point is an error."""
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for event in events:
        if event.get("type") == "training_stats_scalar" and event["iter"] >= 0 and ":monitor:" not in event["metric"]:
            points = curves.setdefault((event["metric"], event["variant"]), {})
            assert event["iter"] not in points
            points[event["iter"]] = event["value"]
    return curves


def alike(some: dict[tuple[str, str], dict[int, float]], other: dict[tuple[str, str], dict[int, float]]) -> bool:
    """The same points; of the speeds, at the same steps."""
    return (
        some.keys() == other.keys()
        and all(some[name] == other[name] for name in some if name != SPEED)
        and some[SPEED].keys() == other[SPEED].keys()
    )


class Report:
    """What the doctor said with --json, and what must hold of every run of it."""

    def __init__(self, code: int, text: str) -> None:
        document = json.loads(text)
        self.code, self.cure = code, str(document["cure"])
        self.findings = {
            finding["name"]: "{state}: {value} [{source}] {cure}".format(**finding) for finding in document["findings"]
        }
        assert self.code == (not document["ok"])
        assert document["ok"] == (not [text for text in self.findings.values() if text.startswith("failed")])

    def __getitem__(self, name: str) -> str:
        """The state, the value, who set it, and the cure."""
        return self.findings[name]

    @property
    def well(self) -> bool:
        """Nothing failed, and nothing was skipped."""
        return not [text for text in self.findings.values() if text.startswith(("failed", "skipped"))]
