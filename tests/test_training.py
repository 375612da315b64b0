"""What makes the training fast, held as mechanisms: times are for benchmarks/compare.py."""

from typing import Any

import pytest
import torch
import torch.utils.data
from torch.utils._python_dispatch import TorchDispatchMode

import pytorch_mnist

Data = tuple[torch.Tensor, torch.Tensor]


class Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value, at each of which a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def data() -> Data:
    images, labels = pytorch_mnist.load_mnist(pytorch_mnist.HERE / "data", False, torch.device("cpu"))
    return images[:512], labels[:512]


def train(images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> list[float]:
    net, steps = pytorch_mnist.Net(), len(images) // batch_size
    parts = pytorch_mnist.make_optimizer(net, 0.1, 0.9, 0, steps)
    return pytorch_mnist.train_epoch(net, *parts, images, labels, batch_size)


def test_no_step_waits_for_a_value(data: Data) -> None:
    reads = []
    for batch_size in (256, 32):
        with Reads() as mode:
            assert len(train(*data, batch_size)) == 512 // batch_size
        reads.append(mode.count)
    assert reads[0] == reads[1] <= 1
    with Reads() as mode:
        torch.ones(1).item()
    assert mode.count == 1, "it does not count"


def test_the_data_is_one_tensor_and_needs_no_workers(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = data
    assert (images.dtype, images.shape[1:], labels.dtype) == (torch.uint8, (28, 28), torch.int64)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", None)  # whoever makes one fails
    train(images, labels, 128)
    assert pytorch_mnist.predict(pytorch_mnist.Net(), images, 100).shape == (512, 10)
