#!/usr/bin/env python
"""Compare the example with well-known recipes, on this machine, and print the ratios.

    uv run benchmarks/compare.py --quick    # a first look, under 3 minutes
    uv run benchmarks/compare.py            # for the record, 15 minutes on 2 CPU cores; nothing else should run

Each run is a process of its own, as a user starts it, and reports to a ClearML server on loopback (the tests'
stand-in), its model going to an S3 store there (rclone). The full form writes results.json and accuracy.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not find_spec("pygal"):  # then uv brings the group that has it, the servers and the plot
    os.execvp("uv", ["uv", "run", "--group", "benchmark", *sys.argv])  # noqa: S606, S607
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import pygal
import torch
from clearml_server import ClearMLServer
from keeper import keep
from pygal.style import CleanStyle
from stores import Rclone
from torch.nn import functional

import pytorch_mnist

EPOCH = re.compile(r"epoch (\d+)/\d+ .*test accuracy ([\d.]+)%.* ([\d,]+) images/s")
SCRIPT = [sys.executable, str(ROOT / "pytorch_mnist.py")]
RECIPES = [sys.executable, str(ROOT / "benchmarks/recipes.py")]
# What the script needs: the first optimizer imports torch._dynamo. The end of the process is not part of it.
NEEDED = "import os, torch, clearml; torch.optim.SGD([torch.zeros(1)]); os._exit(0)"
IMPORTS = [sys.executable, "-c", NEEDED]
NAMES = {
    "reference": "ClearML's example",
    "examples": "pytorch/examples",
    "loader": "this script's recipe with a DataLoader",
    "script": "this script",
    "one": "this script, --epochs 1",
}


@dataclass
class Run:
    """What a whole process cost, seen from outside."""

    seconds: float  # from its start to its end
    epochs: list[tuple[float, float]]  # seconds since the start, test accuracy in percent
    speed: float  # images per second while training, mean of its epochs
    memory: int  # at its peak, MiB
    growth: list[int]  # memory at the end of each epoch, MiB
    requests: list[int]  # to the ClearML server, by the end of each epoch

    def seconds_to(self, accuracy: float) -> float | None:
        return next((seconds for seconds, reached in self.epochs if reached >= accuracy), None)


class Bench:
    """A machine with a server and a store, and a HOME that is empty but for their configuration."""

    def __init__(self, stack: ExitStack) -> None:
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.server = ClearMLServer(self.folder / "server")
        self.server.start()
        stack.callback(self.server.stop)
        self.store = stack.enter_context(Rclone(self.folder / "store"))
        (self.folder / "clearml.conf").write_text(self.server.configuration() + self.store.clearml_conf())

    def run(self, command: list[str], *arguments: object, **variables: str) -> Run:
        """Start it, read its lines as they come, wait for its end. Raises RuntimeError if it failed."""
        command = [*command, *map(str, arguments)]
        if command[1] != "-c":
            command += ["--output-uri", self.store.uri("models"), "--output-dir", str(self.folder / "outputs")]
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("CLEARML_", "AWS_"))}
        environment = {**mine, "HOME": str(self.folder), "PYTHON_DOTENV_DISABLED": "1", **variables}
        errors, begun, asked = self.folder / "errors.txt", time.perf_counter(), len(self.server.requests)
        epochs, speeds, growth, requests = [], [], [], []
        with open(errors, "w") as file:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True)
            assert process.stdout
            for line in process.stdout:
                if found := EPOCH.search(line):
                    epochs.append((round(time.perf_counter() - begun, 2), float(found[2])))
                    speeds.append(float(found[3].replace(",", "")))
                    growth.append(resident(process.pid))
                    requests.append(len(self.server.requests) - asked)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = round(time.perf_counter() - begun, 2)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {shlex.join(command)}\n{errors.read_text()[-2000:]}")
        if self.server.unknown:
            raise RuntimeError(f"the stand-in server does not know: {self.server.unknown}")
        peak = usage.ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
        print(f"  {seconds:6.1f} s  {epochs[-1][1] if epochs else '':5}  {shlex.join(command[1:5])}", flush=True)
        return Run(seconds, epochs, round(statistics.mean(speeds)) if speeds else 0, peak, growth, requests)


def resident(pid: int) -> int:
    """The memory of a running process in MiB."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)  # noqa: S607
    return int(done.stdout) // 2**10


def loop_seconds(pairs: int) -> tuple[float, float]:
    """Return seconds of a bare step on one fixed batch, and what share of the loop bare steps are; each a median."""
    torch.manual_seed(1)
    args = pytorch_mnist.make_parser().parse_args(["--log-interval", str(10**9)])
    parts = pytorch_mnist.build(args, torch.device("cpu"), steps=10**6)
    steps = 100
    images, labels = (data[: steps * 128] for data in pytorch_mnist.load_mnist(ROOT / "data", "train"))
    net, optimizer, _ = parts.values()
    batch, targets = pytorch_mnist.normalise(images[:128]), labels[:128]

    def bare() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(net(batch), targets).backward()
            optimizer.step()

    def loop() -> None:  # not the first epoch, whose first step is reported
        pytorch_mnist.train(args, parts, images, labels, epoch=2, shift=1)

    seconds: dict[str, list[float]] = {"bare": [], "loop": []}
    for _ in range(pairs + 1):  # the first pair warms up
        for name, work in (("bare", bare), ("loop", loop)):
            begun = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begun)
    shares = [bare / loop for bare, loop in zip(seconds["bare"][1:], seconds["loop"][1:], strict=True)]
    return statistics.median(seconds["bare"][1:]) / steps, statistics.median(shares)


def measure(quick: bool) -> tuple[dict[str, list[Run]], dict[str, float]]:
    """All runs, and the figures that are no run's. They alternate, so that a machine's slow minutes hit all of them."""
    runs: dict[str, list[Run]] = {name: [] for name in (*NAMES, "imports", "long")}
    with ExitStack() as stack:
        stack.callback(keep())
        bench = Bench(stack)
        for seed in range(1, 2 if quick else 6):
            runs["script"].append(bench.run(SCRIPT, "--seed", seed))
            runs["one"].append(bench.run(SCRIPT, "--seed", seed, "--epochs", 1))
            runs["imports"].append(bench.run(IMPORTS))
            if seed == (1 if quick else 2):
                runs["reference"].append(bench.run(RECIPES, "clearml", "--epochs", 1 if quick else 10))
            if seed in (1, 3):
                runs["loader"].append(bench.run(RECIPES, "dataloader", "--epochs", 1 if quick else 3))
            if seed == 4:  # of its 14 epochs the first 4, with the same schedule: they come near 99 %
                runs["examples"].append(bench.run(RECIPES, "pytorch-examples", "--epochs", 4))
        if not quick:
            runs["long"].append(bench.run(SCRIPT, "--epochs", 30))
    step, share = loop_seconds(2 if quick else 25)
    whole, imports = (statistics.median(run.seconds for run in runs[name]) for name in ("one", "imports"))
    steps = 469 * step  # of an epoch
    figures = {"loop share": share, "imports": imports, "bare steps": steps, "rest": whole - imports - steps}
    return runs, figures


def ratios(runs: dict[str, list[Run]], figures: dict[str, float]) -> list[tuple[str, str, str]]:
    """What, how much, and the goal. A recipe that never came to 99 % counts with all its seconds."""

    def to_99(name: str) -> str:
        least = "" if all(run.seconds_to(99) for run in runs[name]) else "more than "
        seconds, script = (
            statistics.mean(run.seconds_to(99) or run.seconds for run in runs[who]) for who in (name, "one")
        )
        return f"{least}{seconds / script:.0f}"

    def wall(name: str) -> float:
        return statistics.mean(run.seconds for run in runs[name])

    def speed(name: str) -> float:
        return statistics.mean(run.speed for run in runs[name])

    rows = []
    for name in ("reference", "examples", "loader"):
        if runs[name]:
            rows += [
                (f"seconds to 99 %, {NAMES[name]} ÷ script --epochs 1", to_99(name), ""),
                (f"images per second, script ÷ {NAMES[name]}", f"{speed('script') / speed(name):.1f}", ""),
            ]
    rows += [
        ("seconds of the default run, ClearML's example ÷ script", f"{wall('reference') / wall('script'):.1f}", "12"),
        ("bare steps on one batch ÷ training loop", f"{figures['loop share']:.1%}", "98 %"),
        ("--epochs 1: imports of what it needs", f"{figures['imports']:.1f} s", ""),
        ("--epochs 1: bare training steps", f"{figures['bare steps']:.1f} s", ""),
        ("--epochs 1: the rest", f"{figures['rest']:.1f} s", "1 s"),
        ("--epochs 1: peak memory", f"{max(run.memory for run in runs['one']):,} MiB", "830 MiB"),
    ]
    for run in runs["long"]:
        each = [later[0] - earlier[0] for earlier, later in pairwise(run.epochs)]
        asked = [later - earlier for earlier, later in pairwise(run.requests)]
        half = len(each) // 2
        growth = statistics.mean(each[half:]) / statistics.mean(each[:half])
        rows += [
            ("seconds an epoch, second half of 30 ÷ first half", f"{growth:.3f}", "1 ± 0.05"),
            ("memory after 30 epochs ÷ after 5", f"{run.growth[-1] / run.growth[4]:.3f}", "1"),
            ("requests an epoch, over 30 epochs", f"{min(asked)} to {max(asked)}", "constant"),
        ]
    return rows


def table(runs: dict[str, list[Run]]) -> str:
    """The figures of each recipe, as Markdown."""
    names = [name for name in NAMES if runs[name]]
    rows: list[list[str]] = [["", *(NAMES[name] for name in names)], ["---"] * (1 + len(names))]
    done = [runs[name] for name in names]
    accuracies = [[run.epochs[-1][1] for run in recipe] for recipe in done]
    reached = [[run.seconds_to(99) for run in recipe] for recipe in done]
    rows.append(["runs, epochs each", *(f"{len(recipe)}, {len(recipe[0].epochs)}" for recipe in done)])
    to_99 = (spread([at for at in each if at]) if all(each) else "not reached by all" for each in reached)
    rows.append(["seconds to 99 %", *to_99])
    rows.append(["seconds, whole process", *(spread([run.seconds for run in recipe]) for recipe in done)])
    rows.append(["accuracy, mean, %", *(spread(values, 2) for values in accuracies)])
    rows.append(["accuracy, minimum, %", *(f"{min(values):.2f}" for values in accuracies)])
    rows.append(["images per second", *(f"{statistics.mean(run.speed for run in recipe):,.0f}" for recipe in done)])
    rows.append(["peak memory, MiB", *(f"{max(run.memory for run in recipe):,}" for recipe in done)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, of several values, their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Accuracy against seconds, one line a recipe (its first run)."""
    chart = pygal.XY(
        js=[],  # nothing is loaded from elsewhere
        style=CleanStyle,
        legend_at_bottom=True,
        title=f"MNIST on {os.cpu_count()} CPU cores: accuracy against time",
        x_title="seconds since the start of the process (logarithmic)",
        y_title="test accuracy, %",
        xrange=(0, 3),
        range=(97, 99.6),
    )
    chart.x_labels = [{"label": str(at), "value": math.log10(at)} for at in (1, 3, 10, 30, 100, 300, 1000)]
    for name, label in NAMES.items():
        chart.add(label, [(math.log10(at), accuracy) for at, accuracy in runs[name][0].epochs if accuracy >= 97])
    chart.render_to_file(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the example with well-known recipes, on this machine.")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one run each, one epoch of ClearML's example and of the DataLoader, no pytorch/examples",
    )
    args = parser.parse_args()
    runs, figures = measure(args.quick)
    compared = ratios(runs, figures)
    processor = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    )
    about = {
        "date": date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores ({processor[1] if processor else platform.processor()})",
        **{name: version(name) for name in ("clearml", "torch", "torchvision")},
        "python": platform.python_version(),
    }
    print(f"\n{', '.join(f'{name} {value}' for name, value in about.items())}\n\n{table(runs)}\n")
    print("| ratio | measured | goal |\n| --- | --- | --- |")
    print("\n".join(f"| {' | '.join(row)} |" for row in compared))
    if not args.quick:
        kept = {name: [asdict(run) for run in done] for name, done in runs.items()}
        record = {**about, "figures": figures, "ratios": [row[:2] for row in compared], "runs": kept}
        (ROOT / "benchmarks/results.json").write_text(json.dumps(record, indent=1) + "\n")
        plot(runs, ROOT / "benchmarks/accuracy.svg")


if __name__ == "__main__":
    main()
