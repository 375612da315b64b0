"""What makes the training fast, held as mechanisms: times are for benchmarks/compare.py."""

from argparse import Namespace
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


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The set is the first 512 test images, and nobody makes a DataLoader: it is one tensor, and needs no workers."""
    images, labels = pytorch_mnist.load_mnist(ROOT / "data", "t10k")
    monkeypatch.setattr(pytorch_mnist, "load_mnist", lambda *_: (images[:512], labels[:512]))
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", None)


def training(batch_size: int) -> pytorch_mnist.Training:
    args = Namespace(device="cpu", data_dir=ROOT, epochs=1, dry_run=False, lr=0.1, momentum=0.9, weight_decay=0, seed=1)
    args.batch_size, args.test_batch_size = batch_size, 100
    return pytorch_mnist.Training(args, pytorch_mnist.RECIPE, {})


def test_no_step_waits_for_a_value() -> None:
    reads = []
    for batch_size in (256, 32):
        case = training(batch_size)
        assert (case.images.dtype, case.images.shape) == (torch.uint8, (512, 28, 28))
        with Reads() as mode:
            losses, rates, _ = case.epoch()
        assert len(losses) == len(rates) == 512 // batch_size
        reads.append(mode.count)
    assert reads[0] == reads[1] <= 1
    with Reads() as mode:
        torch.ones(1).item()
    assert mode.count == 1, "it does not count"


def test_the_rate_rises_and_falls_in_five_steps_too() -> None:
    _, rates, _ = training(103).epoch()
    assert len(rates) == 5
    assert rates[0] < rates[1] > rates[2] > rates[3] > 1000 * rates[4]
