#!/usr/bin/env python
"""Train a small network on MNIST, track the run with ClearML, keep the model in your own storage.

    uv run pytorch_mnist.py --project-name demo-project --task-name first
    uv run pytorch_mnist.py --output-uri s3://host:port/bucket/path  # where the model goes
    uv run pytorch_mnist.py --resume                                 # after the newest checkpoint
    uv run pytorch_mnist.py --queue default                          # a ClearML agent runs it
    uv run torchrun --nproc-per-node 2 pytorch_mnist.py              # two processes, or GPUs
    uv run pytorch_mnist.py --offline --dry-run                      # does it start?

Without a ClearML server it trains all the same, and records a ClearML offline session. On 2 CPU
cores it prints:

    ClearML: offline session, because no server is configured (no ~/clearml.conf, ...)
    epoch 1/3  train loss 0.1352  test loss 0.0674  test accuracy 97.90%  lr 0.2823  13,464 images/s
    ...
    epoch 3/3  train loss 0.0226  test loss 0.0158  test accuracy 99.51%  lr 0.0000  13,791 images/s
    Test accuracy 99.51% after 3 epochs, 15.2 s
    Model: outputs/20261125-154234-15900b41/model.pt
    To take the session to a server: uv run clearml-task --import-offline-session ....zip

To make it yours, replace the part on PyTorch. The part on ClearML has every call of ClearML in the
open. What begins with run. or checkpoint. is in clearml_client/, and keeps a run honest.
"""

import argparse
import gzip
import math
import os
import socket
import sys
import time
import zlib
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import clearml_client

clearml_client.prepare_environment()  # before `import clearml`, which reads variables while it is imported

import numpy as np
import torch
from clearml import OutputModel, StorageManager, Task
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.datasets import MNIST

from clearml_client import checkpoint, ranks, run
from clearml_client.arguments import label, number, storage_uri
from clearml_client.errors import RunError, plural

HERE = Path(sys.argv[0]).resolve().parent
DIGITS = [str(digit) for digit in range(10)]
PACKAGES = ("clearml", "numpy", "pillow", "python-dotenv", "torch", "torchvision", "tqdm")
RECIPE = {"shift": True, "nesterov": True}  # without an option; a clone in the web UI can change it


# --- PyTorch: network, data, training --------------------------------------------------------
class Net(nn.Sequential):
    """[N, 1, 28, 28] float32 to [N, 10] logits. Pooling first saves work and costs no accuracy."""

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
            nn.Linear(64 * 3 * 3, 10),
        )


def load_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """The part `train` or `t10k`, whole: images [N, 28, 28] uint8 and labels [N] int64.

    The published .gz files are read as they are; where they are missing, torchvision downloads
    them. Raises RunError where the files are neither there nor to be had.
    """
    raw, good = folder / "MNIST/raw", HERE / "data/MNIST/raw"
    files = [raw / f"{part}-images-idx3-ubyte.gz", raw / f"{part}-labels-idx1-ubyte.gz"]
    try:
        if files[0].is_file() and files[1].is_file():
            pixels, classes = (bytearray(gzip.decompress(file.read_bytes())) for file in files)
            images = torch.frombuffer(pixels, dtype=torch.uint8, offset=16).view(-1, 28, 28)
            labels = torch.frombuffer(classes, dtype=torch.uint8, offset=8).long()
        else:
            socket.setdefaulttimeout(10)  # a mirror that does not answer
            mnist = MNIST(folder, train=part == "train", download=True)
            images, labels = mnist.data, mnist.targets
        if len(images) != len(labels):
            raise ValueError("images and labels do not belong together")
    except (OSError, EOFError, RuntimeError, ValueError, AssertionError, zlib.error) as error:
        reason = f"{files[0].stem} or {files[1].stem}: {str(error).splitlines()[0]}"
        raise RunError(f"no MNIST in {raw}: {reason}; good files: {good}/*.gz") from error
    return images, labels


def normalise(images: Tensor) -> Tensor:
    """[N, 28, 28] uint8 to [N, 1, 28, 28] float32; the figures are pytorch/examples'."""
    pixels = images.unsqueeze(1).to(torch.float32, memory_format=torch.channels_last)
    return pixels.div_(255).sub_(0.1307).div_(0.3081)


def shift(pixels: Tensor) -> Tensor:
    """Each eighth of the images by up to one pixel: the same digits, new images."""
    shifts = torch.randint(-1, 2, (8, 2)).tolist()
    return torch.cat([p.roll(by, (2, 3)) for p, by in zip(pixels.chunk(8), shifts, strict=False)])


class Training:
    """Data, network, and an optimizer whose learning rate rises to --lr and falls to nothing.

    The set is small: one tensor on the device, indexed, is faster than a DataLoader.
    """

    def __init__(
        self, args: argparse.Namespace, recipe: dict[str, bool], saved: checkpoint.State
    ) -> None:
        torch.manual_seed(args.seed)  # after Task.init, which seeds everything with 1337
        self.device = ranks.device(args.device)
        self.batch_size, self.test_batch_size = args.batch_size, args.test_batch_size
        self.epochs = 1 if args.dry_run else args.epochs
        self.shift = recipe["shift"]
        data = args.data_dir or HERE / "data"
        images, labels = load_mnist(data, "train")
        count = args.batch_size if args.dry_run else len(images)
        self.images, self.labels = images[:count].to(self.device), labels[:count].to(self.device)
        images, labels = load_mnist(data, "t10k")
        count = args.test_batch_size if args.dry_run else len(images)
        self.test_images, self.test_labels = images[:count].to(self.device), labels[:count]
        self.steps = math.ceil(len(self.images) / args.batch_size)  # of an epoch
        self.net = Net().to(self.device).to(memory_format=torch.channels_last)
        self.model = ranks.distributed(self.net)  # under torchrun: all processes train one network
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=args.lr,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            nesterov=recipe["nesterov"] and args.momentum > 0,
        )
        steps = self.epochs * self.steps
        self.schedule = OneCycleLR(
            self.optimizer, args.lr, total_steps=steps, pct_start=0.21, cycle_momentum=False
        )  # 0.2 is a division by zero where a training has five steps
        checkpoint.restore(saved, self.parts())  # with --resume

    def parts(self) -> dict[str, object]:
        """What a checkpoint holds the state of."""
        return {"net": self.net, "optimizer": self.optimizer, "schedule": self.schedule}

    def epoch(self) -> tuple[list[float], list[float], int]:
        """One pass over the set in random order.

        Returns the loss and the learning rate of each batch, and images per second.
        """
        begin = time.perf_counter()
        self.model.train()
        batches = torch.randperm(len(self.images)).to(self.device).split(self.batch_size)
        losses, rates = [], []
        for batch in run.progress(batches):
            pixels = normalise(self.images[batch])
            if self.shift:
                pixels = shift(pixels)
            logits = self.model(pixels[ranks.SHARE])  # of one process: all
            labels = self.labels[batch[ranks.SHARE]]
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            loss = ranks.add_up(loss) / len(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            rates.append(float(self.schedule.get_last_lr()[0]))
            self.schedule.step()
            losses.append(loss.detach())  # stays on the device: reading it would make a GPU wait
        curve = torch.stack(losses).tolist()
        speed = len(self.images) / (time.perf_counter() - begin)
        return curve, rates, round(speed)

    def test(self) -> tuple[Tensor, float, float]:
        """The log-probability of each digit for each test image, [N, 10]; mean loss, accuracy."""
        self.net.eval()
        with torch.inference_mode():
            batches = self.test_images.split(self.test_batch_size)
            logits = torch.cat([self.net(normalise(batch)) for batch in batches])
            log_probs = logits.log_softmax(dim=1).cpu()
        hits = (log_probs.argmax(dim=1) == self.test_labels).sum().item()
        loss = functional.nll_loss(log_probs, self.test_labels).item()
        return log_probs, loss, hits / len(self.test_labels)


# --- ClearML: the task, what it reports, its model -------------------------------------------
def start_task(args: argparse.Namespace, earlier: str) -> tuple[Task, run.Storage]:
    """A new task, the earlier one that is resumed, or an offline session; with --queue no more."""
    local = ("data_dir", "output_dir", "offline", "queue", "resume")  # these say nothing elsewhere
    with run.starting(args.offline, earlier, args.queue) as resumed:
        task: Task = Task.init(
            project_name=args.project_name,
            task_name=args.task_name,
            tags=args.tags,
            output_uri=False,  # set below, once it is proven
            reuse_last_task_id=resumed or False,
            continue_last_task=0 if resumed else False,  # 0: do not shift the iterations
            auto_connect_arg_parser=dict.fromkeys(local, False),  # the others: hyperparameters
            auto_connect_frameworks=False,  # the torch.save hook would add a second model
        )
    storage = run.prove_storage(task, args.output_uri)
    if not task.is_offline():
        task.output_uri = storage.root
    packages = (*PACKAGES, *storage.packages)  # that an agent has to install
    task.set_packages([f"{name}=={version(name)}" for name in packages])
    if args.queue:
        with run.leaving(task, args.queue):
            task.execute_remotely(args.queue)  # ends this process; at the agent --queue is not set
    return task, storage


def describe_setup(task: Task, training: Training) -> None:
    """What the code and the machine decide."""
    setup = {"device": str(training.device), "threads": str(torch.get_num_threads())}
    setup["processes"] = str(ranks.RANKS)
    setup["optimizer"] = " ".join(str(training.optimizer).split())
    setup |= {name: version(name) for name in PACKAGES}
    task.set_configuration_object("setup", config_dict=setup)
    task.set_configuration_object("network", config_text=str(training.net))


def batch_points(losses: list[float], rates: list[float], done: int, every: int) -> list[run.Point]:
    """A point of loss and of learning rate every so many batches. `done` are trained by now.

    All curves are over the number of batches trained.
    """
    points: list[run.Point] = []
    for batch in range(every, len(losses) + 1, every):
        step = done - len(losses) + batch
        points.append(("loss", "train batch", losses[batch - 1], step))
        points.append(("learning rate", "OneCycleLR", rates[batch - 1], step))
    return points


def report_results(
    task: Task, training: Training, log_probs: Tensor, folder: Path, storage: run.Storage
) -> None:
    """Plots, a table, a picture, an artifact; the last two are in `folder`, too, to look at."""
    logger, step = task.get_logger(), training.epochs * training.steps
    labels = training.test_labels
    confidence, predicted = log_probs.exp().max(dim=1)
    hits = torch.bincount(labels * 10 + predicted, minlength=100).view(10, 10)  # [label, digit]
    mistakes = hits - hits.diag().diag()
    colours = {"colorscale": "YlOrRd", "zmin": 0, "zmax": max(1, int(mistakes.max()))}
    ticks = {"dtick": 1}  # each digit has its label
    layout = {"xaxis": ticks, "yaxis": ticks, **colours}
    axes = {"xaxis": "prediction", "yaxis": "label", "yaxis_reversed": True}
    axes |= {"xlabels": DIGITS, "ylabels": DIGITS, "extra_layout": layout}
    logger.report_confusion_matrix("confusion matrix", "test", hits.numpy(), step, **axes)

    precision, recall = hits.diag() / hits.sum(dim=0), hits.diag() / hits.sum(dim=1)
    f1 = 2 * precision * recall / (precision + recall)
    table: list[list[object]] = [["digit", "precision", "recall", "F1", "support"]]
    for digit, figures in enumerate(zip(precision, recall, f1, strict=True)):
        table.append(
            [DIGITS[digit], *(f"{figure:.4f}" for figure in figures), int(hits[digit].sum())]
        )
    logger.report_table("per digit", "test", step, table_plot=table)

    picture, series = folder / "mistakes.png", "worst of the test set"
    draw_mistakes(training.test_images, labels, predicted, confidence, picture)
    if task.is_offline():
        logger.report_image("mistakes", series, step, local_path=str(picture))
    else:
        address = f"{storage.folder}/metrics/{picture.name}"
        with run.delivering(picture, address, "picture of the mistakes"):
            logger.report_image("mistakes", series, step, url=address)
            StorageManager.upload_file(str(picture), address)

    path, header = folder / "predictions.csv", "index,label,prediction,confidence"
    columns = np.column_stack([np.arange(len(labels)), labels, predicted, confidence])
    np.savetxt(path, columns, ["%d", "%d", "%d", "%.6f"], ",", header=header, comments="")
    preview = f"label (down), prediction (across)\n{hits.numpy()}"
    task.upload_artifact("predictions", path, preview=preview, wait_on_upload=True)


def draw_mistakes(
    images: Tensor, labels: Tensor, predicted: Tensor, confidence: Tensor, path: Path
) -> None:
    """The 25 mistakes of which the network was surest, with what it took them for."""
    mistakes = (predicted != labels).nonzero().flatten()
    worst = mistakes[confidence[mistakes].argsort(descending=True)][:25].tolist()
    picture, font = Image.new("L", (5 * 160, 5 * 200), "white"), ImageFont.load_default(20)
    for place, index in enumerate(worst):
        x, y = place % 5 * 160 + 10, place // 5 * 200 + 10
        caption = f"{labels[index]} read as {predicted[index]}\n{confidence[index]:.1%} sure"
        ImageDraw.Draw(picture).text((x, y), caption, "black", font)
        digit = Image.fromarray(255 - images[index].numpy())
        picture.paste(digit.resize((140, 140)), (x, y + 50))
    picture.save(path)


def publish_model(
    task: Task, net: Net, path: Path, address: str, metadata: dict[str, float]
) -> None:
    """The model's record first, then its upload: no object is there that no record knows."""
    if task.is_offline():  # where OutputModel does not work (clearml 2.1.12), and artifacts do
        stored: dict[str, object] = {"stored": address} if address else {}  # for the clean-up
        link = address if address and not address.startswith("file:") else path
        task.upload_artifact("model", link, metadata=stored | metadata, wait_on_upload=True)
    else:
        earlier = [model.id for model in task.models["output"]]  # of a run that is resumed
        model = OutputModel(
            task,
            name=task.name,
            framework="PyTorch",
            config_text=str(net),
            label_enumeration={digit: int(digit) for digit in DIGITS},
            base_model_id=earlier[0] if earlier else None,
        )
        model.update_weights(register_uri=address)
        values = {n: {"type": type(v).__name__, "value": str(v)} for n, v in metadata.items()}
        model.set_all_metadata(values)
    if address:
        StorageManager.upload_file(str(path), address)


# --- arguments, main -------------------------------------------------------------------------
def parse_args() -> tuple[argparse.Namespace, checkpoint.State]:
    """The arguments and, with --resume, the checkpoint that they continue."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Train a small network on MNIST and track the run with ClearML.",
        epilog="Without a ClearML server the run is an offline session. README.md has the set-up.",
    )
    add = parser.add_argument_group("ClearML").add_argument
    project = "mnist-training-poc"
    add("--project-name", type=label, default=project, help=f"(default: {project})")
    add("--task-name", type=label, default="pytorch_mnist", help="(default: pytorch_mnist)")
    add("--tags", nargs="+", default=[], help="tags of the task")
    where = "where the model goes: s3://host:port/bucket/path, s3://bucket/path, gs://..., "
    where += "azure://... or a folder; empty: the file server; by default CLEARML_OUTPUT_URI"
    uri = os.getenv("CLEARML_OUTPUT_URI", "")
    add("--output-uri", type=storage_uri, default=uri, metavar="URI", help=where)
    add("--offline", action="store_true", help="an offline session, whatever is configured")
    add("--queue", metavar="NAME", help="of a ClearML queue, whose agent runs it; by default here")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), default=3, help="passes over the set (default: 3)")
    add("--batch-size", type=number(int, 2), default=128, help="in images (default: 128)")
    add("--test-batch-size", type=number(int, 1), default=1000, help="in images (default: 1000)")
    add("--lr", type=number(float, 1e-9), default=0.3, help="the highest rate (default: 0.3)")
    add("--momentum", type=number(float, 0, 0.999), default=0.9, help="of SGD (default: 0.9)")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="of SGD (default: 0.0005)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=1, help="of everything (default: 1)")
    add("--device", default="auto", help="cpu, cuda or mps; auto: the best here")
    add("--log-interval", type=number(int, 1), default=100, help="in batches (default: 100)")
    add("--data-dir", type=Path, help="MNIST files, downloaded if missing; by default data/")
    add("--dry-run", action="store_true", help="one batch of training and one of testing")
    add = parser.add_argument_group("output").add_argument
    add("--output-dir", type=Path, default=Path("outputs"), help="below it, a folder for each run")
    resume = "go on after this checkpoint, in the same task; without PATH: after the newest one"
    add("--resume", nargs="?", const="", metavar="PATH", help=resume)
    fixed = ["project_name", "task_name", "epochs", "batch_size", "lr", "momentum", "seed"]
    return checkpoint.parse_args(parser, Net(), fixed)


@run.guarded  # however it ends: one line, the true exit code, the true status of the task
def main() -> None:
    if ranks.RANK:  # of torchrun's processes one has the run, the others train along
        ranks.train_along(Training)
        return
    args, saved = parse_args()
    started = time.perf_counter() - saved.get("seconds", 0)
    task, storage = start_task(args, saved.get("task", ""))
    recipe = task.connect(saved.get("recipe", dict(RECIPE)), name="Recipe")
    ranks.share((args, dict(recipe), saved))
    training = Training(args, recipe, saved)
    describe_setup(task, training)
    folder = args.output_dir / f"{datetime.now():%Y%m%d-%H%M%S}-{task.id[-8:]}"
    path = saved.get("path", folder / "checkpoint.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = task.get_logger()
    points: list[run.Point] = saved.get("points", [])
    for point in points:  # of a resumed run: again, and none is there twice
        logger.report_scalar(*point)

    for epoch in range(saved.get("epoch", 0) + 1, training.epochs + 1):
        losses, rates, speed = training.epoch()
        log_probs, test_loss, accuracy = training.test()
        train_loss = sum(losses) / len(losses)
        if not math.isfinite(train_loss + test_loss):
            raise RunError(f"the loss is {train_loss} in epoch {epoch}: try a smaller --lr")
        done = epoch * training.steps
        new = batch_points(losses, rates, done, args.log_interval)
        new += [("loss", "train", train_loss, done), ("loss", "test", test_loss, done)]
        new += [("accuracy", "test", accuracy, done), ("images per second", "train", speed, done)]
        points += new
        progress = {"epoch": epoch, "points": points, "seconds": time.perf_counter() - started}
        origin = {"args": args, "recipe": dict(recipe), "task": task.id}
        checkpoint.save(path, training.parts(), **progress, **origin)
        for point in new:
            logger.report_scalar(*point)
        print(
            f"epoch {epoch}/{training.epochs}  train loss {train_loss:.4f}  "
            f"test loss {test_loss:.4f}  test accuracy {accuracy:.2%}  "
            f"lr {rates[-1]:.4f}  {speed:,} images/s"
        )

    ranks.leave()
    if saved.get("epoch") == training.epochs:  # trained already, but the end was missing
        log_probs, test_loss, accuracy = training.test()
    model = path.with_name("model.pt")
    checkpoint.write(training.net.state_dict(), model)
    address = f"{storage.folder}/models/{model.name}" if storage.folder else ""
    metadata = {"accuracy": accuracy, "epochs": training.epochs, "lr": args.lr, "seed": args.seed}
    with run.delivering(model, address):  # afterwards the very bytes are there
        publish_model(task, training.net, model, address, metadata)
    report_results(task, training, log_probs, path.parent, storage)
    seconds = round(time.perf_counter() - started, 1)
    logger.report_single_value("final accuracy", accuracy)
    logger.report_single_value("final loss", round(test_loss, 6))
    logger.report_single_value("seconds", seconds)
    print(f"Test accuracy {accuracy:.2%} after {plural(training.epochs, 'epoch')}, {seconds} s")
    print(f"Model: {model}")
    print(f"Stored: {address}" if address else "No --output-uri was given: it is nowhere else")
    run.finish(task, points)
    checkpoint.mark_finished(path, address or str(model))


if __name__ == "__main__":
    main()
