"""What makes the training fast, held as mechanisms: times are for benchmarks/compare.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.data
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import pytorch_mnist


class Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value, at each of which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def train(monkeypatch: pytest.MonkeyPatch, batch_size: int, log_interval: int) -> tuple[int, list[float]]:
    """Train an epoch on the first 512 test images. Return how many values were read, and the reported rates."""
    values: dict[str, list[float]] = {"train batch": [], "OneCycleLR": []}
    logger = SimpleNamespace(report_scalar=lambda title, series, value, step: values[series].append(value))
    monkeypatch.setattr("pytorch_mnist.Logger.current_logger", lambda: logger)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", None)  # the set is one tensor, and needs no workers
    images, labels = (tensor[:512] for tensor in pytorch_mnist.load_mnist(ROOT / "data", "t10k"))
    options = {"--momentum": 0, "--weight-decay": 0.1, "--batch-size": batch_size, "--log-interval": log_interval}
    args = pytorch_mnist.make_parser().parse_args([str(word) for option in options.items() for word in option])
    parts = pytorch_mnist.build(args, torch.device("cpu"), steps=-(-512 // batch_size))
    assert parts["optimizer"].param_groups[0]["weight_decay"] == 0.1
    with Reads() as reads:
        pytorch_mnist.train(args, parts, images, labels, 1, shift=1)
    assert len(values["train batch"]) == len(values["OneCycleLR"])
    return reads.count, values["OneCycleLR"]


def test_no_step_waits_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read are the loss of each step that is reported, here the first and the last, and that of the epoch."""
    for batch_size in (256, 32, 8):
        assert train(monkeypatch, batch_size, log_interval=1000)[0] <= 3
    assert train(monkeypatch, 8, log_interval=16)[0] >= 5, "it does not count"


def test_the_rate_rises_and_falls_in_five_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _, rates = train(monkeypatch, 103, log_interval=1)
    assert len(rates) == 5
    assert rates[0] < rates[1] > rates[2] > rates[3] > 1000 * rates[4]


def test_each_eighth_of_a_batch_is_shifted_by_itself() -> None:
    torch.manual_seed(1)
    dots = torch.zeros(64, 1, 9, 9)
    dots[..., 4, 4] = 1
    places = pytorch_mnist.augment(dots, 2).flatten(1).argmax(dim=1).view(8, 8)
    assert (places == places[:, :1]).all()
    assert len(places.unique()) > 4
    assert (torch.stack([places // 9, places % 9]) - 4).abs().max() == 2
