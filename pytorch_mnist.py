#!/usr/bin/env python
"""Train a small network on MNIST, track the run with ClearML, keep the model in your own storage.

    uv run pytorch_mnist.py                                            # everything by default
    uv run pytorch_mnist.py --project-name demo-project --task-name first
    uv run pytorch_mnist.py --output-uri s3://host:port/bucket/path    # where the model goes
    uv run pytorch_mnist.py --offline --dry-run                        # no server, one batch: does it start?

Without a ClearML server it trains all the same, and records a ClearML offline session. On 2 CPU cores it prints:

    EXPECTED
"""

import argparse
import csv
import itertools
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from dotenv import load_dotenv

load_dotenv()  # .env beside this file; before `import clearml`, which reads variables while it is imported

import torch
from clearml import OutputModel, StorageManager, Task
from clearml.config import config_obj
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torchvision import datasets
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
DIGITS = [str(digit) for digit in range(10)]


# --- network --------------------------------------------------------------------------------------------------------
class Net(nn.Sequential):
    """[N, 1, 28, 28] float32 to [N, 10] logits. Pooling before normalising saves work and costs no accuracy."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 16, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
        )


# --- data -----------------------------------------------------------------------------------------------------------
def load_mnist(folder: Path, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The whole set as two tensors on the device: images [N, 28, 28] uint8 and labels [N] int64.

    `data/` holds the published files, which torchvision verifies and unpacks; into any other folder it downloads
    them. The set is small: one tensor, indexed, needs no DataLoader workers and is faster than they are.
    """
    mnist = datasets.MNIST(folder, train=train, download=True)
    return mnist.data.to(device), mnist.targets.to(device)


def normalise(images: Tensor) -> Tensor:
    """[N, 28, 28] uint8 to [N, 1, 28, 28] float32 of mean 0 and deviation 1 (the figures are pytorch/examples')."""
    pixels = images.unsqueeze(1).to(torch.float32, memory_format=torch.channels_last)
    return pixels.div_(255).sub_(0.1307).div_(0.3081)


# --- training and evaluation ----------------------------------------------------------------------------------------
def train_epoch(
    net: Net, optimizer: torch.optim.Optimizer, schedule: LRScheduler, images: Tensor, labels: Tensor, batch_size: int
) -> list[float]:
    """One pass over the set in random order. Returns the loss of each batch."""
    net.train()
    batches = torch.randperm(len(images), device=images.device).split(batch_size)
    losses = torch.empty(len(batches), device=images.device)
    # The bar is for a terminal only (disable=None), and goes there past the stderr that ClearML records.
    terminal = open(2, "w", closefd=False)  # noqa: SIM115
    with tqdm(total=len(images), unit=" images", file=terminal, disable=None, leave=False) as bar:
        for step, batch in enumerate(batches):
            shift = torch.randint(-1, 2, (2,)).tolist()  # by up to one pixel: the same digit, another image
            outputs = net(torch.roll(normalise(images[batch]), shift, dims=(2, 3)))
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


# --- tracking and storage -------------------------------------------------------------------------------------------
class RunError(Exception):
    """A failure that the user can mend: one line on stderr, exit code 1, and the reason of the task's failure."""


def start_task(args: argparse.Namespace) -> Task:
    """A new ClearML task, or an offline session where no server is configured; says which, and why."""
    # By default ClearML reports from a second process, which makes leaving take eleven seconds instead of one.
    config_obj.set_overrides({"sdk": {"development": {"report_use_subprocess": False}}})
    if reason := why_offline(args.offline):
        print(f"ClearML: offline session, because {reason}")
        Task.set_offline(True)
    Task.set_random_seed(args.seed)  # Task.init seeds all generators; without this line with 1337
    task: Task = Task.init(
        project_name=args.project_name,
        task_name=args.task_name,
        tags=args.tags,
        reuse_last_task_id=False,
        auto_connect_frameworks=False,  # what is reported stands here; the torch.save hook would add a second model
    )
    if Task.running_locally():
        task.set_comment(f"python {shlex.join([Path(__file__).name, *sys.argv[1:]])}")
    if not task.is_offline():
        task.output_uri = args.output_uri or task.output_uri or True  # True: the server's own file server
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
    if len(missing) == len(needed):
        return "no server is configured (no ~/clearml.conf, no CLEARML_API_... variables)"
    if missing:
        raise RunError(f"half a ClearML configuration, {' and '.join(missing)} missing: add it or use --offline")
    return ""


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
    table = [["digit", "precision", "recall", "F1", "support"]]
    table += [[*row, int(count)] for row, count in zip(rows, support, strict=True)]
    logger.report_table("per digit", "test", step, table_plot=table)

    cell, font = 64, ImageFont.load_default(20)
    picture = Image.new("RGB", (11 * cell, 11 * cell), "white")
    draw = ImageDraw.Draw(picture)
    draw.text(
        (cell / 2, cell / 2), "label \\\npredicted", "black", ImageFont.load_default(12), anchor="mm", align="center"
    )
    for row, column in itertools.product(range(11), repeat=2):
        middle, count = ((column + 0.5) * cell, (row + 0.5) * cell), int(hits[row - 1, column - 1])
        if row == 0 or column == 0:
            draw.text(middle, str(max(row, column) - 1) if row != column else "", "black", font, anchor="mm")
        elif count:
            ink, paper = ("white", "royalblue") if row == column else ("black", "mistyrose")
            draw.rectangle((column * cell, row * cell, (column + 1) * cell - 2, (row + 1) * cell - 2), paper)
            draw.text(middle, str(count), ink, font, anchor="mm")
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
    task.upload_artifact("predictions", folder / "predictions.csv", wait_on_upload=True)


def store_model(task: Task, model: Path, output_uri: str, net: Net, metadata: dict[str, object]) -> str:
    """Upload the model, and register it with the task, once. Returns its address; empty if it went nowhere.

    StorageManager serves every kind of storage, with a server and without, waits for the upload, and raises.
    """
    address = ""
    if output_uri:
        owner = f"{quote(task.get_project_name())}/{quote(task.name)}.{task.id}"  # ClearML's own layout
        try:
            address = StorageManager.upload_file(str(model), f"{output_uri.rstrip('/')}/{owner}/models/{model.name}")
        except Exception as error:
            raise RunError(f"the model did not reach {output_uri}: {error}; it is in {model}") from error
    if task.is_offline():  # where OutputModel does not work, and artifacts do
        task.upload_artifact("model", model, metadata={**metadata, "address": address}, wait_on_upload=True)
    else:
        labels = {digit: int(digit) for digit in DIGITS}
        entry = OutputModel(task, config_text=str(net), label_enumeration=labels, name=task.name, framework="PyTorch")
        entry.update_weights(register_uri=address)
        metadata = {**metadata, "size": model.stat().st_size}
        entry.set_all_metadata({key: {"type": "str", "value": str(value)} for key, value in metadata.items()})
    return address


# --- arguments ------------------------------------------------------------------------------------------------------
def number(kind: Callable[[str], float], low: float, high: float = 1e9) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`, which NaN is not."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse's message names it
    return parse


def device(text: str) -> str:
    """An argparse type: `auto` or the name of a device that this machine has."""
    try:
        torch.empty(1, device="cpu" if text == "auto" else text).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # depends on the device's kind
        raise argparse.ArgumentTypeError(f"no device {text!r} on this machine: {str(error).splitlines()[0]}") from None
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small network on MNIST and track the run with ClearML.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Without a ClearML server the run is recorded as an offline session. The set-up is in README.md.",
    )
    clearml = parser.add_argument_group("ClearML")
    clearml.add_argument("--project-name", default="mnist-training-poc", help="project of the task")
    clearml.add_argument("--task-name", default="pytorch_mnist", help="name of the task")
    uri = os.getenv("CLEARML_OUTPUT_URI", "")
    where = (
        "s3://host:port/bucket/path, s3://bucket/path, gs://bucket/path, azure://... or a folder; empty: file server"
    )
    clearml.add_argument("--output-uri", default=uri, help=f"where the model goes: {where}; from CLEARML_OUTPUT_URI")
    clearml.add_argument("--tags", nargs="+", default=[], help="tags of the task")
    clearml.add_argument("--offline", action="store_true", help="record an offline session, whatever is configured")
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=Path, default=HERE / "data", help="MNIST files; downloaded if missing")
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=number(int, 1), default=4, help="passes over the training set")
    train.add_argument("--batch-size", type=number(int, 2), default=128, help="images in a training batch")
    train.add_argument("--test-batch-size", type=number(int, 1), default=1000, help="images in a test batch")
    train.add_argument("--lr", type=number(float, 1e-9), default=0.15, help="highest learning rate of OneCycleLR")
    train.add_argument("--momentum", type=number(float, 0, 0.999), default=0.9, help="momentum of SGD (Nesterov)")
    train.add_argument("--weight-decay", type=number(float, 0), default=5e-4, help="weight decay of SGD")
    train.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1, help="seed of all random generators")
    train.add_argument("--device", type=device, default="auto", help="cpu, cuda or mps; auto: the best one here")
    train.add_argument("--log-interval", type=number(int, 1), default=100, help="batches between training losses")
    train.add_argument("--dry-run", action="store_true", help="one batch of training and one of testing")
    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", type=Path, default=Path("outputs"), help="a folder for each run below it")
    return parser.parse_args()


def one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook: one line for what the user can mend; anything else is a defect and keeps its traceback."""
    if issubclass(kind, RunError):
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# --- main -----------------------------------------------------------------------------------------------------------
def main() -> None:
    args = parse_args()
    sys.excepthook = one_line  # before Task.init, which wraps it and marks the task as failed with the reason
    started = time.perf_counter()
    task = start_task(args)
    logger = task.get_logger()
    folder = args.output_dir / f"{datetime.now():%Y%m%d-%H%M%S}-{task.id[-8:]}"
    folder.mkdir(parents=True)

    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    images, labels = load_mnist(args.data_dir, True, device)
    test_images, test_labels = load_mnist(args.data_dir, False, device)
    if args.dry_run:
        args.epochs, images = 1, images[: args.batch_size]
        test_images, test_labels = test_images[: args.test_batch_size], test_labels[: args.test_batch_size]
    test_labels = test_labels.cpu()

    net = Net().to(device).to(memory_format=torch.channels_last)
    momentum = {"momentum": args.momentum, "nesterov": args.momentum > 0}
    optimizer = torch.optim.SGD(net.parameters(), args.lr, weight_decay=args.weight_decay, **momentum)
    steps = math.ceil(len(images) / args.batch_size)
    schedule = OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps, pct_start=0.2, cycle_momentum=False)
    report_setup(task, net, optimizer, schedule)

    for epoch in range(1, args.epochs + 1):
        begin = time.perf_counter()
        losses = train_epoch(net, optimizer, schedule, images, labels, args.batch_size)
        speed = len(images) / (time.perf_counter() - begin)
        log_probs = predict(net, test_images, args.test_batch_size)
        train_loss, test_loss = sum(losses) / steps, functional.nll_loss(log_probs, test_labels).item()
        accuracy = (log_probs.argmax(dim=1) == test_labels).float().mean().item()
        lr, done = schedule.get_last_lr()[0], epoch * steps  # all curves: over the number of batches trained
        for batch in range(args.log_interval, steps + 1, args.log_interval):
            logger.report_scalar("loss", "train batch", losses[batch - 1], done - steps + batch)
        logger.report_scalar("loss", "train", train_loss, done)
        logger.report_scalar("loss", "test", test_loss, done)
        logger.report_scalar("accuracy", "test", accuracy, done)
        logger.report_scalar("learning rate", "OneCycleLR", lr, done)
        logger.report_scalar("images per second", "train", speed, done)
        print(
            f"epoch {epoch}/{args.epochs}  train loss {train_loss:.4f}  test loss {test_loss:.4f}  "
            f"test accuracy {accuracy:.2%}  lr {lr:.4f}  {speed:,.0f} images/s"
        )

    model = folder / "model.pt"
    torch.save(net.state_dict(), model)
    report_results(task, folder, done, test_images.cpu(), test_labels, log_probs)
    output_uri = args.output_uri if task.is_offline() else task.output_uri
    address = store_model(task, model, output_uri, net, {"accuracy": accuracy, "epoch": epoch, **vars(args)})
    seconds = time.perf_counter() - started
    for name, value in {"final accuracy": accuracy, "final loss": test_loss, "seconds": seconds}.items():
        logger.report_single_value(name, value)
    print(f"Test accuracy {accuracy:.2%} after {args.epochs} epochs, {seconds:.1f} s\nModel: {model}")
    print(f"Stored: {address or 'nowhere else, no --output-uri was given'}")
    session = f"{task.get_offline_mode_folder()}.zip" if task.is_offline() else ""
    task.close()
    if session:
        print(f"To take the session to a server: uv run clearml-task --import-offline-session {shlex.quote(session)}")


if __name__ == "__main__":
    main()
