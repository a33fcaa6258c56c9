"""Frames between the ranks of a static group, by torch.distributed point-to-point operations.

Everyone to everyone: any attention worker may call any expert worker, so a step of several of them is an
all-to-all whose parts need not be of one size or begin at one moment. There is one process group for calls
and one for answers: on each, a pair of ranks sends in one direction only, so that a receive that waits (NCCL
keeps a stream a pair) never stands before a send. A frame is its length, one int64, then its bytes; length
0 ends a direction.

The group is formed once, over a TCP store. A rank that is lost stays lost: whoever needs workers that come
and go uses gRPC.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

# torch.distributed exports them, but its types do not say so.
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from wire.errors import ConfigError, FrameInvalid, WorkerLost

Backend = Literal["gloo", "nccl"]

_FOREVER = timedelta(days=365)
"""A receive waits for as long as nobody calls; deadlines are the dispatcher's."""
_MAX_FRAME_BYTES = 1 << 32


@dataclass(frozen=True, kw_only=True)
class GroupPlace:
    """One process of a static group, and where the group meets."""

    rank: int
    num_ranks: int
    store_host: str
    store_port: int
    """Where a TCP store listens; see `serve_store`."""
    backend: Backend = "gloo"
    """gloo = processors; nccl = one GPU a rank, tensors pass through its memory."""


class OneWay:
    """One direction of a group: bytes to any rank, bytes from any rank."""

    def __init__(self, group: dist.ProcessGroup, *, device: torch.device) -> None:
        self._group = group
        self._device = device

    def send(self, rank: int, data: bytes) -> None:
        """Sends one frame, none = the end; used by one thread a rank.

        Raises:
            WorkerLost: the rank is gone.
        """
        length = torch.tensor([len(data)], dtype=torch.int64)
        self._do(self._group.send, length.to(self._device), rank)
        if data:
            body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            self._do(self._group.send, body.to(self._device), rank)

    def receive(self, rank: int) -> bytes:
        """Waits for a frame, b"" = the end; used by one thread a rank.

        Raises:
            WorkerLost: the rank is gone.
            FrameInvalid: the length is none.
        """
        length = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._do(self._group.recv, length, rank)
        num_bytes = int(length.item())
        if not 0 <= num_bytes <= _MAX_FRAME_BYTES:
            raise FrameInvalid(f"rank {rank} announced a frame of {num_bytes} bytes", field="layout")
        body = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        if num_bytes:
            self._do(self._group.recv, body, rank)
        return body.cpu().numpy().tobytes()

    @staticmethod
    def _do(operation: Callable[[list[Tensor], int, int], dist.Work], tensor: Tensor, rank: int) -> None:
        try:
            operation([tensor], rank, 0).wait()
        except RuntimeError as error:
            raise WorkerLost(f"rank {rank} of the group is gone: {error}") from None


@dataclass(frozen=True, kw_only=True)
class TorchLinks:
    """What one process of the group holds."""

    calls: OneWay
    answers: OneWay


def serve_store(port: int = 0) -> TCPStore:
    """The meeting point of a group; listens as long as the object lives, on a free port if 0."""
    return TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)


def form_group(place: GroupPlace, *, wait_s: float) -> TorchLinks:
    """Joins the group; returns when all its ranks have.

    Raises:
        ConfigError: the backend is not in this build of torch, or there is no GPU for it.
        WorkerLost: not all ranks came in time.
    """
    try:
        store = TCPStore(
            place.store_host, place.store_port, is_master=False, timeout=timedelta(seconds=wait_s)
        )
        store.set(f"rank {place.rank}", "here")
        store.wait([f"rank {rank}" for rank in range(place.num_ranks)], timedelta(seconds=wait_s))
        return TorchLinks(
            calls=_form(place, PrefixStore("calls", store)),
            answers=_form(place, PrefixStore("answers", store)),
        )
    except RuntimeError as error:  # of torch.distributed, errors of the network among them
        raise WorkerLost(f"the group of {place.num_ranks} ranks did not form: {error}") from None


def _form(place: GroupPlace, store: Store) -> OneWay:
    if place.backend == "gloo":
        gloo = ProcessGroupGloo(store, place.rank, place.num_ranks, _FOREVER)
        return OneWay(cast(dist.ProcessGroup, gloo), device=torch.device("cpu"))
    if not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise ConfigError(field="backend", wanted="nccl on a host with a GPU", given="no GPU or no NCCL here")
    # CPU builds of torch have no such name.
    from torch._C._distributed_c10d import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = _FOREVER
    nccl = ProcessGroupNCCL(store, place.rank, place.num_ranks, options)
    return OneWay(cast(dist.ProcessGroup, nccl), device=torch.device("cuda", torch.cuda.current_device()))
