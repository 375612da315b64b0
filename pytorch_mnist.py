#!/usr/bin/env python
"""Train a small network on MNIST, track the run with ClearML, keep the model in your own storage.

    uv run pytorch_mnist.py --project-name demo-project --task-name first
    uv run pytorch_mnist.py --output-uri s3://host:port/bucket/path  # where the model goes
    uv run pytorch_mnist.py --resume                                 # go on after the last epoch
    uv run pytorch_mnist.py --queue default                          # a ClearML agent runs it

Without a ClearML server it trains all the same, and records a ClearML offline session.

To make it yours, replace the PyTorch part. From clearml_client/, `run.guard` checks server and
storage before the training and the upload after it; `checkpoint` resumes. The rest is ClearML.
"""

import gzip
import math
import os
import socket
import sys
import time
import zlib
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import clearml_client

clearml_client.prepare_environment()  # loads .env, which `import clearml` needs: keep this order

import numpy as np
import torch
from clearml import Logger, OutputModel, StorageManager, Task
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from clearml_client import agent, checkpoint, run
from clearml_client.arguments import name, names, number, storage_uri

DATA = Path(__file__).resolve().parent / "data"
LOCAL = ("data_dir", "output_dir", "offline", "queue", "resume")  # not hyperparameters

# --- PyTorch: replace this part --------------------------------------------------------------
CLASSES = [str(digit) for digit in range(10)]
MEAN, STD = 0.1307, 0.3081  # of the training pixels, as in pytorch/examples


class Net(nn.Sequential):
    """[N, 1, 28, 28] float32 to [N, classes] logits. Pooling early saves work at equal accuracy."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 5, bias=False),
            nn.MaxPool2d(3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),  # 12 x 12
            nn.Conv2d(16, 48, 3, bias=False),
            nn.MaxPool2d(3, 2, 1),
            nn.BatchNorm2d(48),
            nn.ReLU(),  # 5 x 5
            nn.Conv2d(48, 64, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),  # 3 x 3
            nn.Flatten(),
            nn.Linear(64 * 3 * 3, len(CLASSES)),
        )


def load_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Load images [N, 1, 28, 28] uint8 and labels [N] int64 of one part, `train` or `t10k`."""
    raw = folder / "MNIST/raw"
    files = [raw / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    try:
        if not all(file.is_file() for file in files):
            from torchvision.datasets import MNIST  # here: the import takes a second

            socket.setdefaulttimeout(10)  # for a mirror that does not answer
            MNIST(folder, download=True)
        pixels, digits = (bytearray(gzip.decompress(file.read_bytes())) for file in files)
        labels = torch.frombuffer(digits, dtype=torch.uint8, offset=8).long()
        images = torch.frombuffer(pixels, dtype=torch.uint8, offset=16)
        return images.view(len(labels), 1, 28, 28), labels
    except (OSError, EOFError, RuntimeError, zlib.error) as error:
        sys.exit(f"no MNIST in {raw}: {files[0].name}, {files[1].name}: {error}; see {DATA}")


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 images into float32 ones with mean 0 and standard deviation 1."""
    pixels = images.to(torch.float32, memory_format=torch.channels_last)
    return pixels.div_(255).sub_(MEAN).div_(STD)


def augment(pixels: Tensor, shift: int) -> Tensor:
    """Roll each eighth of the batch by its own random offset of up to `shift` pixels."""
    parts = pixels.chunk(8)
    shifts = torch.randint(-shift, shift + 1, (len(parts), 2)).tolist()
    return torch.cat([part.roll(by, (2, 3)) for part, by in zip(parts, shifts, strict=True)])


def build(args: Namespace, device: torch.device, steps: int) -> dict[str, Any]:
    """Build network, optimizer and schedule: a checkpoint holds the state of each."""
    net = Net().to(device).to(memory_format=torch.channels_last)
    sgd = {"momentum": args.momentum, "weight_decay": args.weight_decay}
    optimizer = optim.SGD(net.parameters(), lr=args.lr, nesterov=args.momentum > 0, **sgd)
    schedule = OneCycleLR(optimizer, args.lr, steps, cycle_momentum=False)
    return {"net": net, "optimizer": optimizer, "schedule": schedule}


def train(
    args: Namespace, parts: dict[str, Any], images: Tensor, labels: Tensor, epoch: int, shift: int
) -> float:
    """Train for one epoch, on images that are on the device as a whole. Return the mean loss."""
    net, optimizer, schedule = parts.values()
    logger = Logger.current_logger()
    net.train()
    batches = torch.randperm(len(images)).to(images.device).split(args.batch_size)
    total = torch.zeros((), device=images.device)
    terminal = os.fdopen(2, "w", closefd=False)  # sys.stderr would be ClearML's console, too
    bar = tqdm(batches, leave=False, disable=None, file=terminal)
    for step, batch in enumerate(bar, (epoch - 1) * len(batches) + 1):
        pixels = augment(normalise(images[batch]), shift)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(pixels), labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.detach()  # no .item() here: it would wait for the GPU at every step
        if step % args.log_interval == 0 or step in (1, schedule.total_steps):
            logger.report_scalar("loss", "train batch", loss.item(), step)
            logger.report_scalar("learning rate", "OneCycleLR", schedule.get_last_lr()[0], step)
        schedule.step()
    return total.item() / len(batches)


@torch.inference_mode()
def test(args: Namespace, net: Net, images: Tensor, labels: Tensor) -> tuple[Tensor, float, float]:
    """Return the log-probability of each class, [N, classes]; the mean loss; the accuracy."""
    net.eval()
    logits = torch.cat([net(normalise(batch)) for batch in images.split(args.test_batch_size)])
    log_probs = logits.log_softmax(dim=1).cpu()
    accuracy = (log_probs.argmax(dim=1) == labels).float().mean().item()
    return log_probs, nn.functional.nll_loss(log_probs, labels).item(), accuracy


# --- ClearML: keep this part -----------------------------------------------------------------
def fit(args: Namespace, task: Task, guard: run.guard, progress: checkpoint.Progress) -> None:
    """Train, then store the model and report the results. With --resume, go on where it was."""
    started = time.perf_counter()
    augmentation = task.connect({"shift": 1}, name="Augmentation")  # editable in a cloned task
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    images, labels = load_mnist(args.data_dir, "train")
    test_images, test_labels = load_mnist(args.data_dir, "t10k")
    low, high = torch.cat([labels, test_labels]).aminmax()
    if low < 0 or high >= len(CLASSES):
        sys.exit(f"labels {low} to {high}, but there are {len(CLASSES)} CLASSES")
    count, epochs = (args.batch_size, 1) if args.dry_run else (len(images), args.epochs)
    images, labels = images[:count].to(device), labels[:count].to(device)
    steps = math.ceil(len(images) / args.batch_size)  # per epoch
    parts = build(args, device, epochs * steps)
    net = parts["net"]
    task.set_configuration_object("network", config_text=str(net))
    checkpoint.restore(progress, parts)
    folder = args.output_dir / task.id
    logger = task.get_logger()
    for epoch in range(progress.epoch + 1, epochs + 1):
        begin = time.perf_counter()
        train_loss = train(args, parts, images, labels, epoch, augmentation["shift"])
        speed = round(len(images) / (time.perf_counter() - begin))
        log_probs, test_loss, accuracy = test(args, net, test_images.to(device), test_labels)
        if not math.isfinite(test_loss):
            sys.exit(f"the loss is {test_loss} in epoch {epoch}: try a smaller --lr")
        logger.report_scalar("loss", "train", train_loss, epoch * steps)
        logger.report_scalar("loss", "test", test_loss, epoch * steps)
        logger.report_scalar("accuracy", "test", accuracy, epoch * steps)
        logger.report_scalar("images per second", "train", speed, epoch * steps)
        checkpoint.save(folder / "checkpoint.pt", args, task.id, epoch, parts)
        losses = f"train loss {train_loss:.4f}  test loss {test_loss:.4f}"
        print(f"epoch {epoch}/{epochs}  {losses}  test accuracy {accuracy:.2%}  {speed:,} images/s")
    if progress.epoch == epochs:  # resumed with all epochs done
        log_probs, test_loss, accuracy = test(args, net, test_images.to(device), test_labels)
    model = folder / "model.pt"
    checkpoint.save_atomically(net.state_dict(), model)
    with guard.verify_upload(model):  # then reads it back and compares it byte by byte
        store_model(task, net, model, guard.output_uri)
    report_results(task, test_images, test_labels, log_probs, folder, epochs * steps)
    logger.report_single_value("accuracy", accuracy)
    logger.report_single_value("loss", test_loss)
    logger.report_single_value("seconds", round(time.perf_counter() - started, 1))
    print(f"Test accuracy {accuracy:.2%}")


def store_model(task: Task, net: Net, path: Path, output_uri: str) -> None:
    """Upload the model and register it with the task. Raise ValueError if an upload fails."""
    if task.is_offline():  # OutputModel needs a server (clearml 2.1.12), an artifact does not
        address = f"{output_uri}/{task.id}/{path.name}"
        stored = {"stored": StorageManager.upload_file(str(path), address)} if output_uri else {}
        task.upload_artifact("model", path, metadata=stored, wait_on_upload=True)
        return
    earlier = [model.id for model in task.models["output"]]  # stored before this run was resumed
    model = OutputModel(
        task,
        name=task.name,
        framework="PyTorch",
        config_text=str(net),
        label_enumeration={label: index for index, label in enumerate(CLASSES)},
        base_model_id=earlier[0] if earlier else None,
    )
    # By default the upload goes on in the background, and a failure is only logged.
    model.update_weights(str(path), auto_delete_file=False, async_enable=False)


def report_results(
    task: Task, images: Tensor, labels: Tensor, log_probs: Tensor, folder: Path, step: int
) -> None:
    """Report a confusion matrix, a table and a picture; upload the predictions as an artifact."""
    from torchvision.utils import save_image

    logger, count = task.get_logger(), len(CLASSES)
    confidence, predicted = log_probs.exp().max(dim=1)
    hits = torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)
    correct, mistakes = hits.diag(), hits - hits.diag().diag()
    top = max(2, int(mistakes.max()) + 1)  # the value of the diagonal, which is grey
    hue = (mistakes + top * torch.eye(count)).numpy()
    axes = {"xaxis": "prediction", "yaxis": "label", "xlabels": CLASSES, "ylabels": CLASSES}
    colours = [(0, "white"), (1 / top, "gold"), (1 - 1 / top, "red"), (1, "lightgrey")]
    plot: dict[str, Any] = {"text": hits.tolist(), "texttemplate": "%{text}"}
    plot |= {"zmin": 0, "zmax": top, "colorscale": colours}
    plot |= {"xaxis": {"dtick": 1}, "yaxis": {"dtick": 1, "autorange": "reversed"}}
    logger.report_confusion_matrix("confusion matrix", "test", hue, step, extra_layout=plot, **axes)
    precision = (correct / hits.sum(dim=0)).nan_to_num()  # 0 / 0 counts as 0
    recall = (correct / hits.sum(dim=1)).nan_to_num()
    table: list[list[object]] = [["class", "precision", "recall", "images"]]
    for label, p, r, row in zip(CLASSES, precision, recall, hits, strict=True):
        table.append([label, f"{p:.2%}", f"{r:.2%}", int(row.sum())])
    logger.report_table("per class", "test", step, table_plot=table)
    # A confusion matrix of images: each cell keeps its last, the one with the highest confidence.
    cells = torch.ones(count**2, *images.shape[1:])
    for index in confidence.argsort().tolist():
        cells[labels[index] * count + predicted[index]] = images[index] / 255
    path = folder / "mistakes.png"
    save_image(nn.functional.interpolate(cells, scale_factor=3), path, nrow=count, padding=0)
    task.upload_artifact("mistakes", path, wait_on_upload=True)
    # By the artifact's URL: with a file, report_image would upload to the ClearML file server.
    at = {"local_path": str(path)} if task.is_offline() else {"url": task.artifacts["mistakes"].url}
    logger.report_image("mistakes", "test", step, **at)
    path, header = folder / "predictions.csv", "index,label,prediction,confidence"
    columns = np.column_stack([np.arange(len(labels)), labels, predicted, confidence])
    np.savetxt(path, columns, "%d,%d,%d,%.6f", header=header, comments="")
    task.upload_artifact("predictions", path, wait_on_upload=True)


def make_parser() -> ArgumentParser:
    style, uri = ArgumentDefaultsHelpFormatter, os.getenv("CLEARML_OUTPUT_URI", "")
    parser = ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=style)
    parser.add_argument("--project-name", type=names, default="mnist-training-poc", help="project")
    parser.add_argument("--task-name", type=name, default="pytorch_mnist", help="name of the task")
    parser.add_argument("--tags", nargs="+", default=[], help="tags, to filter tasks by")
    where = "to s3://..., gs://..., azure://... or folder (default: CLEARML_OUTPUT_URI=%(default)s)"
    parser.add_argument("--output-uri", type=storage_uri, default=uri, metavar="URI", help=where)
    parser.add_argument("--offline", action="store_true", help="use no server: record a session")
    parser.add_argument("--queue", metavar="NAME", help="ClearML queue to send the run to")
    count, size = number(int, 1), number(int, 1, 9999)
    parser.add_argument("--epochs", type=count, default=3, help="number of epochs")
    parser.add_argument("--batch-size", type=size, default=128, help="training batch size")
    parser.add_argument("--test-batch-size", type=size, default=1000, help="test batch size")
    parser.add_argument("--lr", type=number(float, 1e-9), default=0.3, help="peak learning rate")
    parser.add_argument("--momentum", type=number(float, 0, 0.999), default=0.9, help="momentum")
    parser.add_argument("--weight-decay", type=number(float, 0), default=5e-4, help="L2 penalty")
    parser.add_argument("--seed", type=number(int, 0), default=1, help="random seed")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: the best one here")
    parser.add_argument("--log-interval", type=count, default=100, help="batches between reports")
    parser.add_argument("--data-dir", type=Path, default=DATA, help="MNIST, downloaded if missing")
    parser.add_argument("--dry-run", action="store_true", help="train a single batch")
    parser.add_argument("--output-dir", type=Path, default="outputs", help="folder for local files")
    parser.add_argument("--resume", nargs="?", const="", help="resume a checkpoint, or the newest")
    return parser


def main() -> None:
    args, progress = checkpoint.parse_args(make_parser())
    with run.guard(args.output_uri, args.offline, args.queue, resume=progress.task) as guard:
        Task.set_random_seed(args.seed)  # Task.init would seed everything with 1337
        task = Task.init(
            project_name=args.project_name,
            task_name=args.task_name,
            tags=args.tags,
            output_uri=guard.output_uri,  # where models and artifacts go
            reuse_last_task_id=guard.task_id,  # the task to resume; False: make a new one
            continue_last_task=0,  # no offset: train() itself counts on after --resume
            auto_connect_arg_parser=dict.fromkeys(LOCAL, False),  # all others: hyperparameters
            auto_connect_frameworks=False,  # the torch.save hook would register a second model
        )
        task.set_packages(agent.requirements(args.output_uri))  # for an agent to install
        if args.queue:
            task.execute_remotely(args.queue)  # ends this process; at the agent it does nothing
        fit(args, task, guard, progress)


if __name__ == "__main__":
    main()
