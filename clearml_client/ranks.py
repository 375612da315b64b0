"""Several processes of one run, as torchrun starts them: rank 0 owns the run, the others train along.

A script calls `share` and `distributed` in all of them, trains on its `SHARE` of each batch, and sums the loss by
`add_up`. With one process they do nothing.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clearml_client.errors import UsageError

RANK, RANKS = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
SHARE = slice(RANK, None, RANKS)  # of each batch: with one process, all of it
LOCAL_RANK, LOCAL_RANKS = int(os.getenv("LOCAL_RANK", "0")), int(os.getenv("LOCAL_WORLD_SIZE", "1"))
NODES = int(os.getenv("GROUP_WORLD_SIZE", "1"))
PATIENCE = timedelta(minutes=10)  # for what the others do between two steps
GRACE = 8  # seconds that rank 0 has to end the run, once torchrun stops all

processes: dict[int, tuple[str, int]] = {}  # host and process id of each rank
stopping = threading.Event()  # torchrun stops this process, which is not rank 0


def join() -> None:
    """Meet the other processes, of which there are some. Raises RunError where they have other arguments."""
    dist.init_process_group(timeout=PATIENCE)
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, (socket.gethostname(), os.getpid(), sys.argv[1:]))
    for rank, (host, number, arguments) in enumerate(everyone):
        processes[rank] = (host, number)
        if arguments != everyone[0][2]:
            raise UsageError(f"rank {rank} has other arguments than rank 0: {' '.join(arguments) or 'none'}")


def share(values: Any) -> Any:
    """What rank 0 passes here, on all ranks. Ends the others with exit code 0 where rank 0 passes None."""
    if RANKS == 1:
        return values
    box = [values]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[0] is None and RANK:
        raise SystemExit(0)
    return box[0]


def train_along(training_class: Callable[..., Any]) -> None:
    """What a rank other than 0 does: the epochs of a training that is made of the values that rank 0 shares.

    The last of these is what --resume goes on from, with the number of its `epoch`, or nothing.
    """
    values = share(None)
    training = training_class(*values)
    for _ in range(values[-1].get("epoch", 0), training.epochs):
        training.epoch()
    leave()


def leave() -> None:
    """All steps are done: from here on no rank needs the others."""
    if dist.is_initialized():
        dist.barrier()
        processes.clear()
        dist.destroy_process_group()


def lost() -> str:
    """Which processes of this machine are gone, before the last step. Nothing if all are there."""
    gone = []
    for rank, (host, number) in processes.items():
        if host == socket.gethostname():
            try:
                os.kill(number, 0)
            except ProcessLookupError:
                gone.append(f"rank {rank} (process {number})")
    return f"{' and '.join(gone)} ended early" if gone else ""


def lost_by(error: BaseException) -> str:
    """What an error of a collective call is due to: a rank that is gone. Nothing for any other error."""
    if not dist.is_initialized() or not isinstance(error, dist.DistError | RuntimeError):
        return ""
    deadline = time.monotonic() + 1  # its process may be on its way out yet
    while not (found := lost()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def obey(signals: set[int]) -> None:
    """On a rank other than 0: rank 0 ends the run and the connection to it, and so this process. If not, it ends soon.

    A thread waits for the signals: the handlers of Python would not run while a collective call waits.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        number = signal.sigwait(signals)
        stopping.set()
        time.sleep(GRACE)
        os._exit(128 + number)

    threading.Thread(target=wait, daemon=True, name="signals").start()


def remind(stop: Callable[[int], None]) -> None:
    """On rank 0: `stop` is called some seconds after a signal, should its handler wait for a collective call."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)

    def wait() -> None:
        number = os.read(read, 1)[0]
        time.sleep(GRACE / 2)
        stop(number)

    threading.Thread(target=wait, daemon=True, name="signals").start()


def device(name: str) -> torch.device:
    """The device of this name, for `auto` the best one here; with several processes and GPUs, this process's own."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    chosen = best if name == "auto" else torch.device(name)
    if chosen.type == "cuda" and RANKS > 1:
        chosen = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(chosen)
    return chosen


def distributed(net: nn.Module) -> nn.Module:
    """The network as all ranks train it: the same gradients as one process has of the whole batch.

    The gradient is the mean over the ranks (DistributedDataParallel); batch normalisation has the statistics of the
    whole batch (Peng et al., MegDet, 2018, section 3.2), by torch.nn.SyncBatchNorm on GPUs, and on CPUs, for which it
    does not work, by `BatchNorm2d` below. So the step size is --lr, whatever the number of ranks: what counts for it is
    the size of the whole batch (Goyal et al., Accurate, Large Minibatch SGD, 2017, section 2.1), which stays the same.
    """
    if RANKS == 1:
        return net
    if next(net.parameters()).is_cuda:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNorm2d
    return nn.parallel.DistributedDataParallel(net, forward_sync_buffers=False)  # the buffers are equal


def add_up(values: Tensor) -> Tensor:
    """The sum over all ranks, on all of them.

    Each rank's `values` get the sum of the gradients that the ranks have. Of a loss that is its gradient times the
    number of ranks, and so the mean, which `distributed` takes, is right.
    """
    return values if RANKS == 1 else SumOverRanks.apply(values)


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradients: Tensor) -> Tensor:
        return SumOverRanks.forward(_, gradients)


class BatchNorm2d(nn.BatchNorm2d):
    """[N, C, H, W] of each rank, normalised by mean and variance over the N of all ranks, H and W. N may be 0."""

    running_mean: Tensor  # they, and the momentum, may be None in general, and are not by default
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, pixels: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(pixels)
        # About the running mean, which all ranks have: the squares of small numbers lose no digits.
        shifted = pixels - self.running_mean.view(-1, 1, 1)
        count = pixels.new_tensor([pixels.numel() / pixels.size(1)])
        sums = torch.cat([shifted.sum((0, 2, 3)), shifted.square().sum((0, 2, 3)), count])
        *both, count = add_up(sums).split(pixels.size(1))
        offset, square = (each / count for each in both)
        variance = square - offset.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean += self.momentum * offset
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        normal: Tensor = (shifted - offset.view(-1, 1, 1)) * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return normal
