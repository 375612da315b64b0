#!/usr/bin/env python
"""The recipes that compare.py compares the example with, reported to ClearML as their readers would do it.

    python benchmarks/recipes.py clearml            # clearml/clearml, examples/frameworks/pytorch/pytorch_mnist.py
    python benchmarks/recipes.py pytorch-examples   # pytorch/examples, mnist/main.py
    python benchmarks/recipes.py dataloader         # the example's own network and recipe, its data as they have it

Networks, optimisers and figures of the first two are theirs, the words are our own. Images go through PIL transforms in
a DataLoader, as they do there. One thing is to their advantage: the training set is shuffled (pytorch/examples does not
do it on a CPU).
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from clearml import Task
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Recipe:
    net: Callable[[], nn.Sequential]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    schedule: Callable[[torch.optim.Optimizer, int, int], LRScheduler]  # with steps an epoch and epochs; a step a batch
    epochs: int
    batch_size: int = 64
    augmentation: tuple[nn.Module, ...] = ()


def own_net() -> nn.Sequential:
    """Return the example's network. Its import also sets how CPU threads wait, so the others do without."""
    sys.path.insert(0, str(ROOT))
    from pytorch_mnist import Net

    return Net()


RECIPES = {
    "clearml": Recipe(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(4 * 4 * 50, 500), nn.ReLU(), nn.Linear(500, 10)),
        ),
        lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5),
        lambda optimizer, steps, epochs: StepLR(optimizer, steps, gamma=1),
        epochs=10,
    ),
    "pytorch-examples": Recipe(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
            *(nn.Flatten(), nn.Linear(12 * 12 * 64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
        ),
        lambda net: torch.optim.Adadelta(net.parameters(), lr=1.0),
        lambda optimizer, steps, epochs: StepLR(optimizer, steps, gamma=0.7),
        epochs=14,
    ),
    "dataloader": Recipe(
        own_net,
        lambda net: torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9, nesterov=True, weight_decay=5e-4),
        lambda optimizer, steps, epochs: OneCycleLR(optimizer, 0.3, steps * epochs, cycle_momentum=False),
        epochs=3,
        batch_size=128,
        augmentation=(transforms.RandomCrop(28, padding=1),),
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

    to_input = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    augmented, plain = transforms.Compose([*recipe.augmentation, *to_input]), transforms.Compose(to_input)
    train_set = datasets.MNIST(ROOT / "data", True, augmented, download=True)
    test_set = datasets.MNIST(ROOT / "data", False, plain, download=True)
    loader, test_loader = DataLoader(train_set, recipe.batch_size, shuffle=True), DataLoader(test_set, 1000)
    net = recipe.net()
    optimizer = recipe.optimizer(net)
    epochs = args.epochs or recipe.epochs
    schedule = recipe.schedule(optimizer, len(loader), epochs)
    for epoch in range(1, epochs + 1):
        begun = time.perf_counter()
        net.train()
        for batch, (images, labels) in enumerate(loader):
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            if batch % 10 == 0:
                logger.report_scalar("train", "loss", loss.item(), (epoch - 1) * len(loader) + batch)
        speed = len(train_set) / (time.perf_counter() - begun)
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
