#!/usr/bin/env python
"""The two recipes that compare.py holds the example against, reported to ClearML as their readers would do it.

    python benchmarks/recipes.py clearml            # clearml/clearml, examples/frameworks/pytorch/pytorch_mnist.py
    python benchmarks/recipes.py pytorch-examples   # pytorch/examples, mnist/main.py

Networks, optimisers and figures are theirs, the words are our own. Images go through PIL transforms in a DataLoader, as
they do there. One thing is to their advantage: the training set is shuffled (pytorch/examples does not do it on a CPU).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from clearml import Task
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Recipe:
    net: Callable[[], nn.Sequential]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    gamma: float  # factor on the learning rate after each epoch
    epochs: int


RECIPES = {
    "clearml": Recipe(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(4 * 4 * 50, 500), nn.ReLU(), nn.Linear(500, 10)),
        ),
        lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5),
        gamma=1,
        epochs=10,
    ),
    "pytorch-examples": Recipe(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
            *(nn.Flatten(), nn.Linear(12 * 12 * 64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
        ),
        lambda net: torch.optim.Adadelta(net.parameters(), lr=1.0),
        gamma=0.7,
        epochs=14,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train MNIST by a well-known recipe.")
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--epochs", type=int, default=0, help="passes over the training set; 0: the recipe's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output-uri", default="", help="where the model goes")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    Task.set_random_seed(args.seed)
    task = Task.init("benchmark", args.recipe, reuse_last_task_id=False, output_uri=args.output_uri or None)
    logger = task.get_logger()

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    train_set, test_set = (datasets.MNIST(ROOT / "data", train, transform, download=True) for train in (True, False))
    loader, test_loader = DataLoader(train_set, 64, shuffle=True), DataLoader(test_set, 1000)
    net = recipe.net()
    optimizer = recipe.optimizer(net)
    schedule: LRScheduler = StepLR(optimizer, 1, gamma=recipe.gamma)
    epochs = args.epochs or recipe.epochs
    for epoch in range(1, epochs + 1):
        begun = time.perf_counter()
        net.train()
        for batch, (images, labels) in enumerate(loader):
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            if batch % 10 == 0:
                logger.report_scalar("train", "loss", loss.item(), (epoch - 1) * len(loader) + batch)
        speed = len(train_set) / (time.perf_counter() - begun)
        schedule.step()
        net.eval()
        with torch.no_grad():
            hits = sum(int((net(images).argmax(1) == labels).sum()) for images, labels in test_loader)
        accuracy = hits / len(test_set)
        logger.report_scalar("test", "accuracy", accuracy, epoch * len(loader))
        print(f"epoch {epoch}/{epochs}  test accuracy {accuracy:.2%}  {speed:,.0f} images/s", flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), args.output_dir / "model.pt")  # ClearML's hook uploads it


if __name__ == "__main__":
    main()
