#!/usr/bin/env python
"""Train a small network on MNIST, track the run with ClearML, keep the model in your own storage.

    uv run pytorch_mnist.py                                            # everything by default
    uv run pytorch_mnist.py --project-name demo-project --task-name first
    uv run pytorch_mnist.py --output-uri s3://host:port/bucket/path    # where the model goes
    uv run pytorch_mnist.py --offline --dry-run                        # no server, one batch: does it start?

Without a ClearML server it trains all the same, and records a ClearML offline session. On 2 CPU cores it prints:

    ClearML: offline session, because no server is configured (no ~/clearml.conf, no CLEARML_API_... variables)
    epoch 1/3  train loss 0.1353  test loss 0.0593  test accuracy 98.11%  lr 0.2797  6,260 images/s
    ...
    epoch 3/3  train loss 0.0229  test loss 0.0159  test accuracy 99.46%  lr 0.0000  7,442 images/s
    Test accuracy 99.46% after 3 epochs, 30.4 s
    Model: outputs/20261124-094507-7c54b4cd/model.pt
    To take the session to a server: uv run clearml-task --import-offline-session ~/.clearml/cache/offline/....zip
"""

import argparse
import atexit
import csv
import filecmp
import io
import itertools
import logging
import math
import multiprocessing.pool
import os
import pickle
import re
import shlex
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from dotenv import load_dotenv

load_dotenv()  # .env beside this file; before `import clearml`, which reads variables while it is imported

import requests
import torch
from clearml import OutputModel, StorageManager, Task
from clearml.backend_api.session.session import LoginError, Session
from clearml.backend_config import ConfigurationError
from clearml.backend_config.defs import get_active_config_file
from clearml.backend_interface.session import SendError
from clearml.config import config_obj
from clearml.utilities.process.exit_hooks import ExitHooks
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torchvision import datasets
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
NAME = Path(__file__).name
DIGITS = [str(digit) for digit in range(10)]
SDK_SETTINGS = {  # over clearml.conf, in seconds: by default leaving takes eleven, and a dead server or store hours
    **{f"api.http.retries.{kind}": 8 for kind in ("total", "connect", "read")},
    "api.http.retries.backoff_max": 10,
    "sdk.development.report_use_subprocess": False,
    "sdk.aws.boto3.connect_timeout": 5,
    "sdk.aws.boto3.read_timeout": 12,
    "sdk.http.timeout.connection": 5,
    "sdk.http.timeout.total": 12,
    "sdk.http.download.max_retries": 1,
}
Curve = tuple[str, str, float, int]  # title, series, value, number of batches trained


class RunError(Exception):
    """A failure that the user can mend: one line on stderr, exit code 1, and the reason of the task's failure."""


# --- network --------------------------------------------------------------------------------------------------------
class Net(nn.Sequential):
    """[N, 1, 28, 28] float32 to [N, 10] logits. Pooling before normalising saves work and costs no accuracy."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 16, 5, bias=False), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),  # 12 x 12
            *(nn.Conv2d(16, 48, 3, bias=False), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(48), nn.ReLU()),  # 5 x 5
            *(nn.Conv2d(48, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()),  # 3 x 3
            *(nn.Flatten(), nn.Linear(64 * 3 * 3, 10)),
        )


# --- data -----------------------------------------------------------------------------------------------------------
def load_mnist(folder: Path, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The whole set as two tensors on the device: images [N, 28, 28] uint8 and labels [N] int64.

    `data/` holds the published files, which torchvision verifies and unpacks; into any other folder it downloads
    them. The set is small: one tensor, indexed, needs no DataLoader workers and is faster than they are.
    Raises RunError where the files are neither there nor to be had.
    """
    raw = folder / "MNIST/raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # torchvision unpacks in place, and two first runs may meet
            for packed in raw.glob("*.gz"):  # it also takes a half unpacked file as good
                unpacked, crc = packed.with_suffix(""), int.from_bytes(packed.read_bytes()[-8:-4], "little")
                if unpacked.exists() and zlib.crc32(unpacked.read_bytes()) != crc:
                    unpacked.unlink()
            socket.setdefaulttimeout(10)  # a mirror that does not answer
            mnist = datasets.MNIST(folder, train=train, download=True)
        if len(mnist.data) != len(mnist.targets):
            raise ValueError("images and labels do not belong together")
    except (OSError, RuntimeError, ValueError, IndexError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        if "ubyte" not in reason:  # torchvision names what it cannot download, but not what it cannot read
            reason = f"{' or '.join(sorted(path.name for path in raw.glob('train*' if train else 't10k*')))}: {reason}"
        raise RunError(f"no MNIST in {raw}: {reason}; good files: {HERE / 'data/MNIST/raw'}/*.gz") from error
    return mnist.data.to(device), mnist.targets.to(device)


def normalise(images: Tensor) -> Tensor:
    """[N, 28, 28] uint8 to [N, 1, 28, 28] float32 of mean 0 and deviation 1 (the figures are pytorch/examples')."""
    pixels = images.unsqueeze(1).to(torch.float32, memory_format=torch.channels_last)
    return pixels.div_(255).sub_(0.1307).div_(0.3081)


# --- training and evaluation ----------------------------------------------------------------------------------------
def make_optimizer(
    net: Net, lr: float, momentum: float, weight_decay: float, steps: int
) -> tuple[torch.optim.SGD, OneCycleLR]:
    """SGD with Nesterov's momentum; its learning rate rises to `lr` and falls to nothing within `steps` batches."""
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    return optimizer, OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2, cycle_momentum=False)


def train_epoch(
    net: Net, optimizer: torch.optim.Optimizer, schedule: LRScheduler, images: Tensor, labels: Tensor, batch_size: int
) -> list[float]:
    """One pass over the set in random order. Returns the loss of each batch."""
    net.train()
    batches = torch.randperm(len(images)).to(images.device).split(batch_size)
    losses = torch.empty(len(batches), device=images.device)
    # The bar is for a terminal only (disable=None), and goes there past the stderr that ClearML records.
    terminal = open(2, "w", closefd=False)  # noqa: SIM115
    with tqdm(total=len(images), unit=" images", file=terminal, disable=None, leave=False) as bar:
        for step, batch in enumerate(batches):
            parts = normalise(images[batch]).chunk(8)  # each shifted by up to one pixel: the same digits, new images
            shifted = [torch.roll(part, torch.randint(-1, 2, (2,)).tolist(), dims=(2, 3)) for part in parts]
            outputs = net(torch.cat(shifted))
            loss = functional.cross_entropy(outputs, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[step] = loss.detach()  # stays on the device: reading it here would make a GPU wait
            bar.update(len(batch))
            if not bar.disable and step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return losses.tolist()


def predict(net: Net, images: Tensor, batch_size: int) -> Tensor:
    """The log-probability of each digit for each image, [N, 10] on the CPU."""
    net.eval()
    with torch.inference_mode():
        return torch.cat([net(normalise(batch)).log_softmax(dim=1) for batch in images.split(batch_size)]).cpu()


def score(log_probs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy of what `predict` returned."""
    return functional.nll_loss(log_probs, labels).item(), (log_probs.argmax(1) == labels).float().mean().item()


# --- tracking and storage -------------------------------------------------------------------------------------------
def start_task(args: argparse.Namespace, checkpoint: dict[str, Any]) -> Task:
    """A new ClearML task, the checkpoint's task, or an offline session; says which. Raises RunError within 30 s."""
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")  # StorageManager tries again by itself
    try:
        # The chain, so that profiles and roles count where no key is configured.
        chain = {"sdk.aws.s3.use_credentials_chain": not config_obj.get("sdk.aws.s3.key", "")}
        for key, value in {**SDK_SETTINGS, **chain}.items():
            section, name = key.split(".", 1)
            config_obj.get(section).put(name, value)
        if reason := why_offline(args.offline):
            print(f"ClearML: offline session, because {reason}")
            Task.set_offline(True)
        else:
            check_server()
        resumed = "" if reason else checkpoint.get("task", "").removeprefix("offline-")
        Task.set_random_seed(args.seed)  # Task.init seeds all generators; without this line with 1337
        task: Task = Task.init(
            project_name=args.project_name,
            task_name=args.task_name,
            tags=args.tags,
            reuse_last_task_id=resumed or False,
            continue_last_task=0 if resumed else False,  # 0: do not shift the iterations
            auto_connect_frameworks=False,  # what is reported stands here; the torch.save hook adds a second model
        )
    except ConfigurationError as error:
        raise RunError(f"clearml.conf: {error}") from error
    except (LoginError, SendError, ValueError) as error:
        where = "CLEARML_API_ACCESS_KEY" if os.getenv("CLEARML_API_ACCESS_KEY") else get_active_config_file()
        new = f"{Session.get_app_server_host()}/settings/workspace-configuration"
        raise RunError(f"the ClearML server refused: {error} (credentials: {where}; new ones: {new})") from error
    if Task.running_locally() and not resumed:
        task.set_comment(f"python {shlex.join([NAME, *sys.argv[1:]])}")
    return task


def why_offline(asked: bool) -> str:
    """The reason for an offline session; empty where a server is configured. Raises RunError for half a server."""
    if asked or Task.is_offline():
        return "--offline was given" if asked else "CLEARML_OFFLINE_MODE is set"
    needed = {
        "CLEARML_API_HOST": "api.api_server",
        "CLEARML_API_ACCESS_KEY": "api.credentials.access_key",
        "CLEARML_API_SECRET_KEY": "api.credentials.secret_key",
    }
    missing = [f"{key} (or {name})" for name, key in needed.items() if not (os.getenv(name) or config_obj.get(key))]
    if missing and (named := os.getenv("CLEARML_CONFIG_FILE")) and not Path(named).expanduser().is_file():
        raise RunError(f"CLEARML_CONFIG_FILE names {named}, and there is no such file")
    if missing and not get_active_config_file() and Path("~/.clearml.conf").expanduser().is_file():
        raise RunError("ClearML ignores ~/.clearml.conf: its name is ~/clearml.conf, without the first dot")
    if len(missing) == len(needed):
        return "no server is configured (no ~/clearml.conf, no CLEARML_API_... variables)"
    if missing:
        raise RunError(f"half a ClearML configuration, {' and '.join(missing)} missing: add it or use --offline")
    return ""


def check_server(patience: float = 0) -> None:
    """Ask the API server, for `patience` seconds if need be; ClearML's own requests would ask for longer.

    Raises RunError where no ClearML API server answers.
    """
    host, begin = Session.get_api_server_host(), time.monotonic()
    while True:
        reason = f"no ClearML API server at {host}: something else answers there"
        try:
            answer = requests.get(
                f"{host}/debug.ping", timeout=(5, 10), verify=config_obj.get("api.verify_certificate")
            )
            if answer.json()["meta"]["result_code"] == 200:
                return
        except (KeyError, TypeError, requests.JSONDecodeError):
            pass
        except requests.RequestException:
            reason = f"no answer from the ClearML API server {host}; without it: --offline"
        if time.monotonic() - begin >= patience:
            raise RunError(reason)
        print("waiting for the ClearML server to come back")
        time.sleep(5)


def report_setup(task: Task, net: Net, optimizer: torch.optim.Optimizer, schedule: OneCycleLR) -> None:
    """What the code decides, for the task's Configuration tab. Of it, a cloned task can change the threads."""
    options = ", ".join(f"{name}={value}" for name, value in optimizer.defaults.items() if value)
    decided = {
        "network": type(net).__name__,
        "parameters": sum(weight.numel() for weight in net.parameters()),
        "optimizer": f"{type(optimizer).__name__}({options})",
        "schedule": f"{type(schedule).__name__}(total_steps={schedule.total_steps})",
        "device": str(next(net.parameters()).device),
        "threads": torch.get_num_threads(),
        **{package: version(package) for package in ("clearml", "torch", "torchvision")},
    }
    connected = task.connect(dict(decided), name="Setup")
    torch.set_num_threads(int(connected["threads"]))
    for name in decided.keys() - {"threads"}:
        if str(connected[name]) != str(decided[name]):
            print(f"Setup/{name}: {connected[name]} has no effect, the code decides ({decided[name]})")
    task.set_configuration_object("network", config_text=str(net))


def report_results(task: Task, folder: Path, step: int, images: Tensor, labels: Tensor, log_probs: Tensor) -> None:
    """Tables and pictures from one pass over the test set; in `folder` too, for whoever has no server to look at."""
    logger = task.get_logger()
    confidence, predicted = log_probs.exp().max(dim=1)
    hits = torch.bincount(labels * 10 + predicted, minlength=100).view(10, 10)  # [label, prediction]
    axes = {"xaxis": "prediction", "yaxis": "label", "xlabels": DIGITS, "ylabels": DIGITS, "yaxis_reversed": True}
    logger.report_confusion_matrix("confusion matrix", "test", hits.numpy(), iteration=step, **axes)

    precision, recall, support = hits.diag() / hits.sum(dim=0), hits.diag() / hits.sum(dim=1), hits.sum(dim=1)
    figures = torch.stack([precision, recall, 2 * precision * recall / (precision + recall)], dim=1)
    rows = [[digit, *(f"{value:.4f}" for value in row)] for digit, row in zip(DIGITS, figures, strict=True)]
    table = [[*row, count] for row, count in zip(rows, support.tolist(), strict=True)]
    table.insert(0, ["digit", "precision", "recall", "F1", "support"])
    logger.report_table("per digit", "test", step, table_plot=table)

    cells, font = [["label,\npred.", *DIGITS]], ImageFont.load_default(20)
    cells += [[digit, *(str(count or "") for count in row)] for digit, row in zip(DIGITS, hits.tolist(), strict=True)]
    picture = Image.new("RGB", (11 * 64, 11 * 64), "white")
    draw = ImageDraw.Draw(picture)
    for row, column in itertools.product(range(11), repeat=2):
        x, y, text = column * 64, row * 64, cells[row][column]
        if row and column and text:
            draw.rectangle((x, y, x + 62, y + 62), "lightskyblue" if row == column else "mistyrose")
        draw.text((x + 32, y + 32), text, "black", font, anchor="mm")
    picture.save(folder / "confusion_matrix.png")

    mistakes = (predicted != labels).nonzero().flatten()
    worst = mistakes[confidence[mistakes].argsort(descending=True)][:25].tolist()
    picture = Image.new("L", (5 * 160, 5 * 200), "white")
    draw = ImageDraw.Draw(picture)
    for place, index in enumerate(worst):
        x, y = place % 5 * 160 + 10, place // 5 * 200 + 10
        title = f"{labels[index]} read as {predicted[index]}\n{confidence[index]:.1%} sure"
        draw.text((x, y), title, "black", font)
        picture.paste(Image.fromarray(255 - images[index].numpy()).resize((140, 140)), (x, y + 50))
    picture.save(folder / "mistakes.png")
    logger.report_image("mistakes", "worst of the test set", step, local_path=str(folder / "mistakes.png"))

    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "label", "prediction", "confidence"])
        writer.writerows(zip(range(len(labels)), labels.tolist(), predicted.tolist(), confidence.tolist(), strict=True))
    with storage_errors("no upload of predictions.csv"):
        task.upload_artifact("predictions", folder / "predictions.csv", wait_on_upload=True)


def choose_storage(task: Task, output_uri: str) -> str:
    """The folder for the task's models, proven to work; empty where an offline session has no storage.

    Proven: a small object was written there, read back, compared and deleted, within 15 s. Else RunError.
    """
    root = output_uri or ("" if task.is_offline() else task.output_uri or StorageManager.get_files_server())
    if not root:
        return ""
    project, name = (re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:80] for text in (task.get_project_name(), task.name))
    folder = f"{root.rstrip('/')}/{project}/{name}.{task.id}/models"
    address = f"{folder}/probe-{uuid4().hex}"

    def write_read_delete() -> None:
        with storage_errors(f"no storage at {root}"):
            upload(Path(__file__), address)
            if not StorageManager.storage_helper.get(address).delete(address):
                raise RunError("objects can be written, but not deleted")

    try:  # in a thread, because not every storage library knows a time-out
        multiprocessing.pool.ThreadPool(1).apply_async(write_read_delete).get(timeout=15)
    except multiprocessing.TimeoutError as error:
        raise RunError(f"no storage at {root}: no answer for 15 s") from error
    if not task.is_offline():
        task.storage_uri = root  # for artifacts; task.output_uri = root would check once more
    print(f"Storage: {folder} (written, read back, deleted)")
    return folder


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Raises RunError in the store's own words: the SDK raises "Upload failed", and logs the reason."""
    words: list[str] = []
    log = logging.getLogger("clearml.storage")

    def listen(record: logging.LogRecord) -> bool:
        words.append(record.getMessage())
        return False  # and nothing for the console

    log.addFilter(listen)
    try:
        yield
    except Exception as error:
        raise RunError(f"{what}: {words[0] if words else error}") from error
    finally:
        log.removeFilter(listen)


def upload(path: Path, address: str) -> None:
    """Upload a file and compare what the store then has, byte for byte."""
    StorageManager.upload_file(str(path), address)
    copy = StorageManager.get_local_copy(address, extract_archive=False, force_download=True)
    if not copy or not filecmp.cmp(path, copy, shallow=False):
        raise RunError("what the store gives back is not what was uploaded")


def store_model(task: Task, model: Path, folder: str, net: Net, metadata: dict[str, object]) -> str:
    """Upload the model, prove it, and register it with the task, once. Returns its address, or an empty string."""
    address = f"{folder}/{model.name}" if folder else ""
    if folder:
        with storage_errors(f"the model is in {model}, but not at {address}"):
            upload(model, address)
    if task.is_offline():  # where OutputModel does not work, and artifacts do
        task.upload_artifact("model", model, metadata={**metadata, "address": address}, wait_on_upload=True)
        return address
    try:
        check_server(patience=60)
    except RunError as error:
        raise RunError(f"{error}; the model is in {model}, and the last reports did not reach the server") from error
    labels = {digit: int(digit) for digit in DIGITS}
    entry = OutputModel(task, config_text=str(net), label_enumeration=labels, name=task.name, framework="PyTorch")
    entry.update_weights(register_uri=address)
    metadata = {**metadata, "size": model.stat().st_size}
    entry.set_all_metadata({key: {"type": "str", "value": str(value)} for key, value in metadata.items()})
    return address


def unreported(task: Task, curves: list[Curve]) -> list[Curve]:
    """The points that the server does not have: all of a new task's, some after a resume or an outage."""
    known = {} if task.is_offline() else task.get_reported_scalars()
    steps = {(title, name): curve["x"] for title, group in known.items() for name, curve in group.items()}
    # Of more than 5,000 points the server gives averages, and nothing can be said.
    return [curve for curve in curves if len(seen := steps.get(curve[:2], [])) < 5000 and curve[3] not in seen]


def report(task: Task, curves: list[Curve]) -> None:
    for title, series, value, step in curves:
        task.get_logger().report_scalar(title, series, value, step)


def close_task(task: Task, curves: list[Curve]) -> None:
    """Close the task, and see on the server that nothing is missing. Raises RunError, after a minute at most."""
    if task.is_offline():
        task.close()
        return
    check_server(patience=60)
    for pause in (0.2, 1, 2, 0, 1, 2, 5):
        task.flush(wait_for_uploads=True)
        if not (missing := unreported(task, curves)):
            break
        if not pause:  # not late, but lost
            report(task, missing)
        time.sleep(pause)
    else:
        raise RunError(f"{len(missing)} of {len(curves)} values did not reach the ClearML server")
    task.close()
    # An agent, and not this process, completes a task that it runs.
    if Task.running_locally() and (status := Task.get_task(task.id).status) != "completed":
        raise RunError(f"the ClearML server has the task as {status}")


# --- checkpoints ------------------------------------------------------------------------------------------------------
def save(state: dict[str, Any], path: Path) -> None:
    """torch.save, all or nothing: whatever dies meanwhile, the file at `path` is whole. Raises RunError."""
    buffer, part = io.BytesIO(), path.with_suffix(".part")
    torch.save(state, buffer)
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save` wrote, tensors and plain values only: nothing in the file is executed. Raises RunError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"net", "optimizer", "schedule", "generator", "epoch", "curves", "task", "args"} - set(state):
            raise TypeError(f"not a checkpoint of this script, without {', '.join(sorted(missing))}")
        Net().load_state_dict(state["net"])
    except (OSError, EOFError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"cannot resume from {path}: {type(error).__name__}: {reason[:300]}") from error
    return dict(state, folder=path.parent)


# --- arguments ------------------------------------------------------------------------------------------------------
def number(kind: Callable[[str], float], low: float, high: float = 1e9) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`, which NaN is not."""

    def parse(text: str) -> float:
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse's message names it
    return parse


def label(text: str) -> str:
    """An argparse type: a name that ClearML takes, and whose files it finds again."""
    if len(text.strip()) < 3 or '"' in text:
        raise argparse.ArgumentTypeError("three characters or more, and no double quote")
    return text


def device(text: str) -> str:
    """An argparse type: `auto` or the name of a device that this machine has."""
    try:
        torch.empty(1, device="cpu" if text == "auto" else text).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # depends on the device's kind
        raise argparse.ArgumentTypeError(f"no device {text!r} on this machine: {str(error).splitlines()[0]}") from None
    return text


def storage_uri(text: str) -> str:
    """An argparse type: where models can go. What it refuses it does not repeat, since it may hold a secret."""
    parts = urlsplit(text)
    if parts.username or parts.password or "@" in parts.netloc:
        raise argparse.ArgumentTypeError("credentials do not belong into the URI, but into clearml.conf or variables")
    if parts.scheme in ("s3", "gs", "azure"):
        if not parts.netloc or (":" in parts.netloc and not parts.path.strip("/")):
            raise argparse.ArgumentTypeError(f"no bucket: {parts.scheme}://bucket/path or s3://host:port/bucket/path")
    elif text and (parts.scheme not in ("", "file") or not Path(parts.path).expanduser().absolute().parent.is_dir()):
        raise argparse.ArgumentTypeError("neither s3://, gs://, azure:// nor a folder whose parent exists")
    return text


def parse_args() -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments and, with --resume, the checkpoint that they continue."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Train a small network on MNIST and track the run with ClearML.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Without a ClearML server the run is recorded as an offline session. The set-up is in README.md.",
    )
    clearml = parser.add_argument_group("ClearML")
    clearml.add_argument("--project-name", type=label, default="mnist-training-poc", help="project of the task")
    clearml.add_argument("--task-name", type=label, default="pytorch_mnist", help="name of the task")
    uri, kinds = (
        os.getenv("CLEARML_OUTPUT_URI", ""),
        "s3://host:port/bucket/path, s3://bucket/path, gs://..., azure://...",
    )
    where = f"where the model goes: {kinds} or a folder; empty: file server; from CLEARML_OUTPUT_URI"
    clearml.add_argument("--output-uri", type=storage_uri, default=uri, help=where)
    clearml.add_argument("--tags", nargs="+", default=[], help="tags of the task")
    clearml.add_argument("--offline", action="store_true", help="record an offline session, whatever is configured")
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=Path, default=HERE / "data", help="MNIST files; downloaded if missing")
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=number(int, 1), default=3, help="passes over the training set")
    train.add_argument("--batch-size", type=number(int, 2), default=128, help="images in a training batch")
    train.add_argument("--test-batch-size", type=number(int, 1), default=1000, help="images in a test batch")
    train.add_argument("--lr", type=number(float, 1e-9), default=0.3, help="highest learning rate of OneCycleLR")
    train.add_argument("--momentum", type=number(float, 0, 0.999), default=0.9, help="momentum of SGD (Nesterov)")
    train.add_argument("--weight-decay", type=number(float, 0), default=5e-4, help="weight decay of SGD")
    train.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1, help="seed of all random generators")
    train.add_argument("--device", type=device, default="auto", help="cpu, cuda or mps; auto: the best one here")
    train.add_argument("--log-interval", type=number(int, 1), default=100, help="batches between training losses")
    train.add_argument("--dry-run", action="store_true", help="one batch of training and one of testing")
    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", type=Path, default=Path("outputs"), help="a folder for each run below it")
    resume = "go on after this checkpoint, in the same task and with the same arguments; without PATH: the newest one"
    output.add_argument("--resume", nargs="?", const="", metavar="PATH", help=resume)
    args = parser.parse_args()
    if args.resume is None:
        return args, {}
    found = sorted(args.output_dir.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not args.resume and not found:
        parser.error(f"argument --resume: no checkpoint below {args.output_dir}")
    checkpoint = load_checkpoint(Path(args.resume) if args.resume else found[-1])
    began = checkpoint["args"]
    parser.set_defaults(**began)  # so that what is given now wins
    args = parser.parse_args()
    for name in ("project_name", "task_name", "epochs", "batch_size", "lr", "momentum", "weight_decay", "seed"):
        if getattr(args, name) != began[name]:
            parser.error(f"argument --resume: --{name.replace('_', '-')} was {began[name]}, and cannot change now")
    return args, checkpoint


# --- main -------------------------------------------------------------------------------------------------------------
class Ending:
    """However a run ends early: one line on stderr with what is saved and how to go on, the exit code, and no hang."""

    checkpoint: Path | None = None
    doctor = "uv run doctor.py"
    words = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}  # noqa: RUF012
    code: int | None = None
    postponing = False

    def __init__(self) -> None:
        sys.excepthook = self.except_hook  # Task.init wraps it, and has a task as failed, or as stopped
        atexit.register(self.leave)  # before Task.init registers its own, and so called after it
        for number in self.words:
            signal.signal(number, self.interrupt)
        # ClearML's own handler kills threads that hold locks, and hangs.
        ExitHooks.signal_handler = lambda _, number, frame: self.interrupt(number, frame)

    def interrupt(self, number: int, _: object) -> None:
        for other in self.words:
            signal.signal(other, signal.SIG_IGN)  # an impatient second one
        if not self.code:
            self.tell(self.words.get(signal.Signals(number), "ended"), 128 + number, 8)
            if not self.postponing:
                raise KeyboardInterrupt  # after which ClearML has a task as stopped, not as failed

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """No interruption in here: a task half made could not be marked as stopped."""
        self.postponing = True
        yield
        self.postponing = False
        if self.code:
            raise KeyboardInterrupt

    def except_hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if (task := Task.current_task()) and task._detect_repo_async_thread:
            task._detect_repo_async_thread.join(timeout=7)  # ClearML would kill it, and may hang over that
        if isinstance(error, RunError | OSError | torch.OutOfMemoryError):
            self.tell(f"error: {' '.join(str(error).split())}; find the cause: {self.doctor}", 1)
        elif not isinstance(error, KeyboardInterrupt):  # a defect, and no user's mistake
            sys.__excepthook__(kind, error, trace)

    def tell(self, what: str, code: int, seconds: float = 30) -> None:
        saved = f"; saved, and to go on: uv run {NAME} --resume {shlex.quote(str(self.checkpoint))}"
        print(f"{NAME}: {what}{saved if self.checkpoint else ''}", file=sys.stderr, flush=True)
        self.code = code
        last_resort = threading.Timer(seconds, os._exit, [code])  # ClearML may wait for a server that is gone
        last_resort.daemon = True
        last_resort.start()

    def leave(self) -> None:
        if self.code is not None:
            sys.stdout.flush()
            os._exit(self.code)  # after the last line, taking torch apart would be a second for nothing


def main() -> None:
    ending = Ending()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a log file shows each epoch at once
    args, checkpoint = parse_args()
    ending.doctor += f" --output-uri {shlex.quote(args.output_uri)}" if args.output_uri else ""
    started = time.perf_counter()
    with ending.postponed():
        task = start_task(args, checkpoint)
    if not task.is_offline():
        task.register_abort_callback(lambda: ending.tell("aborted in the web UI", 1))
    folder = checkpoint.get("folder") or args.output_dir / f"{datetime.now():%Y%m%d-%H%M%S}-{task.id[-8:]}"
    folder.mkdir(parents=True, exist_ok=True)
    storage = choose_storage(task, args.output_uri)

    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    images, labels = load_mnist(args.data_dir, True, device)
    test_images, test_labels = load_mnist(args.data_dir, False, device)
    if args.dry_run:
        args.epochs, images = 1, images[: args.batch_size]
        test_images, test_labels = test_images[: args.test_batch_size], test_labels[: args.test_batch_size]
    test_labels = test_labels.cpu()

    net = Net().to(device).to(memory_format=torch.channels_last)
    steps = math.ceil(len(images) / args.batch_size)
    optimizer, schedule = make_optimizer(net, args.lr, args.momentum, args.weight_decay, args.epochs * steps)
    report_setup(task, net, optimizer, schedule)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "schedule": schedule}
    curves: list[Curve] = []
    if checkpoint:
        ending.checkpoint = folder / "checkpoint.pt"
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["generator"])
        curves = [tuple(point) for point in checkpoint["curves"]]
        report(task, unreported(task, curves))
        if task.is_offline():
            print("offline, so in a new session, with all curves; the console before is in the old one")
        print(f"resumed after epoch {checkpoint['epoch']} from {ending.checkpoint}")

    log_probs = None
    for epoch in range(checkpoint.get("epoch", 0) + 1, args.epochs + 1):
        begin = time.perf_counter()
        losses = train_epoch(net, optimizer, schedule, images, labels, args.batch_size)
        speed = len(images) / (time.perf_counter() - begin)
        log_probs = predict(net, test_images, args.test_batch_size)
        train_loss = sum(losses) / steps
        test_loss, accuracy = score(log_probs, test_labels)
        if not math.isfinite(train_loss + test_loss):
            raise RunError(f"the loss is {train_loss} in epoch {epoch}: try a smaller --lr")
        lr, done = float(schedule.get_last_lr()[0]), epoch * steps  # all curves: over the number of batches trained
        new: list[Curve] = [
            ("loss", "train batch", losses[batch - 1], done - steps + batch)
            for batch in range(args.log_interval, steps + 1, args.log_interval)
        ]
        new += [("loss", "train", train_loss, done), ("loss", "test", test_loss, done)]
        new += [("accuracy", "test", accuracy, done), ("learning rate", "OneCycleLR", lr, done)]
        new += [("images per second", "train", speed, done)]
        curves += new
        state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
        state |= {"generator": torch.get_rng_state(), "epoch": epoch, "curves": curves, "task": task.id}
        state["args"] = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        save(state, folder / "checkpoint.pt")
        ending.checkpoint = folder / "checkpoint.pt"
        report(task, new)
        print(
            f"epoch {epoch}/{args.epochs}  train loss {train_loss:.4f}  test loss {test_loss:.4f}  "
            f"test accuracy {accuracy:.2%}  lr {lr:.4f}  {speed:,.0f} images/s"
        )

    if log_probs is None:  # resumed with nothing left to train
        log_probs = predict(net, test_images, args.test_batch_size)
    test_loss, accuracy = score(log_probs, test_labels)
    model = folder / "model.pt"
    save(net.state_dict(), model)
    address = store_model(task, model, storage, net, {"accuracy": accuracy, "epoch": args.epochs, **vars(args)})
    try:
        report_results(task, folder, args.epochs * steps, test_images.cpu(), test_labels, log_probs)
    except OSError as error:
        raise RunError(f"cannot write into {folder}: {error.strerror}") from error
    seconds = time.perf_counter() - started
    for name, value in {"final accuracy": accuracy, "final loss": test_loss, "seconds": seconds}.items():
        task.get_logger().report_single_value(name, value)
    print(f"Test accuracy {accuracy:.2%} after {args.epochs} epochs, {seconds:.1f} s\nModel: {model}")
    print(f"Model: {address}" if address else "No --output-uri was given: the model went nowhere else")
    session = f"{task.get_offline_mode_folder()}.zip" if task.is_offline() else ""
    close_task(task, curves)
    if session:
        print(f"To take the session to a server: uv run clearml-task --import-offline-session {shlex.quote(session)}")
    ending.code = 0


if __name__ == "__main__":
    main()
