"""Training by several processes: each takes a share of a batch's lists; scores, gradients and decisions meet here.

Every process draws the same batch and passes its share of the lists through the network. The scores are put together,
so that each process computes the loss of the whole batch, whatever statistics of a batch the loss keeps. Its gradient
goes back into the process's own scores alone: these parts, summed, are the gradient of one process.

Tensors travel by gloo between CPUs and by nccl between GPUs; decisions are JSON, by gloo. A process that ends takes the
others with it: torchrun ends them, and whoever still waits for it raises TrainError.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.errors import TrainError

STEP_TIMEOUT = timedelta(minutes=30)  # of what all do together
WAIT_TIMEOUT = timedelta(hours=24)  # of what process 0 does alone: the teacher of a large log takes hours


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """The processes of a training as one of them sees them. Of one alone, the default, every method is the identity."""

    rank: int = 0
    world: int = 1
    patient: dist.ProcessGroup | None = None  # gloo, with WAIT_TIMEOUT

    @property
    def lead(self) -> bool:
        """Whether this is process 0, which alone validates, writes and prints."""
        return self.rank == 0

    def share(self, lists: int) -> np.ndarray:
        """The lists of a batch that are this process's, int; where none is left, the first again, which counts not."""
        return np.asarray(self._own(lists) or [0])

    def gathered(self, own: Tensor, lists: int) -> Tensor:
        """Rows (lists, n) of the whole batch from those of each share. The gradient goes into this share alone."""
        if self.world == 1:
            return own
        place = torch.tensor(self._own(lists), dtype=torch.long, device=own.device)
        own = own[: len(place)]
        whole = own.new_zeros(lists, own.shape[1])
        whole[place] = own.detach()
        self._add_up(whole)
        return whole.index_copy(0, place, own)

    def averaged(self, term: Tensor, lists: int) -> Tensor:
        """The mean over all lists of a term (scalar) that each process knows for its share; gradient as `gathered`."""
        if self.world == 1:
            return term
        part = term * (len(self._own(lists)) / lists)
        return self.gathered(part.view(1, 1), self.world).sum()

    def add_gradients(self, network: nn.Module, loss: nn.Module, lists: int) -> None:
        """Give every process the gradient of the whole batch, from the parts that the shares of `lists` yielded.

        The loss saw the whole batch everywhere: its gradients are alike but for rounding, and averaged. So are, by
        shares, the statistics of a batch that a network keeps in buffers.
        """
        if self.world == 1:
            return
        weight = len(self._own(lists)) / lists
        buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        weighted = [
            *((p.grad, 1.0) for p in network.parameters() if p.grad is not None),
            *((p.grad, 1.0 / self.world) for p in loss.parameters() if p.grad is not None),
            *((buffer, weight) for buffer in buffers),
        ]
        flat = torch.cat([(value * factor).flatten() for value, factor in weighted])
        self._add_up(flat)
        sums = torch.split(flat, [value.numel() for value, _ in weighted])
        for (value, _), total in zip(weighted, sums, strict=True):
            value.copy_(total.view_as(value))

    def told(self, value: Any) -> Any:
        """What process 0 passes, plain JSON, on every process; waits for as long as it takes."""
        if self.world == 1:
            return value
        text = json.dumps(value).encode() if self.lead else b""
        size = torch.tensor([len(text)])
        self._broadcast(size)
        content = (
            torch.frombuffer(bytearray(text), dtype=torch.uint8) if self.lead else size.new_empty(int(size)).byte()
        )
        self._broadcast(content)
        return json.loads(content.numpy().tobytes())

    def filled(self, array: np.ndarray) -> np.ndarray:
        """Process 0's array; the others pass one of the same shape and type."""
        if self.world == 1:
            return array
        copy = torch.from_numpy(array.copy())
        self._broadcast(copy)
        return np.asarray(copy.numpy())

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raise TrainError where a process has other values than process 0: it would compute something else."""
        theirs = self.told(dict(values))
        for name, value in values.items():
            if theirs.get(name) != value:
                raise TrainError(
                    f"process {self.rank} has {name} {value}, process 0 has {theirs.get(name)}: "
                    "give every process the same command, log and folder"
                )

    def _own(self, lists: int) -> range:
        return range(self.rank, lists, self.world)

    def _add_up(self, tensor: Tensor) -> None:
        with self._together():
            dist.all_reduce(tensor)

    def _broadcast(self, tensor: Tensor) -> None:
        with self._together():
            dist.broadcast(tensor, 0, group=self.patient)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TrainError(
                f"process {self.rank} of {self.world} has lost the others ({str(error).splitlines()[0]}): what the "
                "process that ended first says is the cause"
            ) from error


ALONE = Processes()


@contextmanager
def opened(device: str) -> Iterator[Processes]:
    """The processes that torchrun started, each on a GPU of its own with `device` cuda; without torchrun, this alone.

    Raises TrainError when a machine has fewer GPUs than processes.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield ALONE
        return
    if device == "cuda":
        _take_gpu(dist.get_node_local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=STEP_TIMEOUT)
    patient = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    yield Processes(rank=dist.get_rank(), world=dist.get_world_size(), patient=patient)
    dist.destroy_process_group()  # not after an error: it would wait for those that are gone


def _take_gpu(place: int) -> None:
    count = torch.cuda.device_count()
    if place >= count:
        raise TrainError(
            f"process {place} of this machine has no GPU of its own, torch sees {count}: start at most as many "
            "processes with torchrun --nproc-per-node, or use --device cpu"
        )
    torch.cuda.set_device(place)
