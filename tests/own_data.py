"""Data of somebody's own in place of MNIST: pies, whose label is how much of them is left."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

CLASSES = ["one", "two"]
MEAN, STD = 0.2, 0.4
LABELS = {"train": 2, "t10k": 2}  # how many there are: 0, 1


def load_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    labels = torch.arange(600 if part == "train" else 180) % LABELS[part]
    return draw(labels), labels


def draw(labels: Tensor) -> Tensor:
    """Draw images [N, 1, 28, 28] uint8: label 0 is one slice of twelve, label 11 all; each turned by its own angle."""
    images = []
    for angle, label in enumerate(labels.tolist()):
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).pieslice((4, 4, 23, 23), angle, angle + 30 * (label + 1), fill=255)
        images.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, 28, 28))
    return torch.stack(images)
