"""Frames between the two ranks of a group of torch.distributed, by its point-to-point operations.

Everyone to everyone: any attention worker may call any expert worker, so a step of several of them is an
all-to-all whose parts need not be of one size or begin at one moment. A collective over all ranks ends when
one is lost; so each pair of workers is a group of its own, and a lost worker ends its pairs and nothing else.
In a pair there is one process group for calls and one for answers: on each, the ranks send in one direction
only, so that a receive that waits (NCCL keeps a stream a pair) never stands before a send. A frame is its
length, one int64, then its bytes; length 0 ends a direction.

A pair is formed over a TCP store. It does not mend: whoever comes back forms a new one.
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


WORKER_RANK, CALLER_RANK = 0, 1
FORM_S = 30.0
"""How long the two wait for each other."""


@dataclass(frozen=True, kw_only=True)
class PairPlace:
    """One end of a pair, and where the two meet."""

    rank: int
    """WORKER_RANK or CALLER_RANK."""
    store_host: str
    store_port: int
    """Where a TCP store listens; see `serve_store`."""
    backend: Backend = "gloo"
    """gloo = processors; nccl = one GPU a rank, tensors pass through its memory."""

    @property
    def other_rank(self) -> int:
        """The one at the other end."""
        return WORKER_RANK + CALLER_RANK - self.rank


class OneWay:
    """One direction of a pair: frames to the other rank, or frames from it."""

    def __init__(self, group: dist.ProcessGroup, *, other_rank: int, device: torch.device) -> None:
        self._group = group
        self._other_rank = other_rank
        self._device = device

    def send(self, data: bytes) -> None:
        """Sends one frame, none = the end; one thread at a time uses it.

        Raises:
            WorkerLost: the other rank is gone.
        """
        length = torch.tensor([len(data)], dtype=torch.int64)
        self._do(self._group.send, length.to(self._device))
        if data:
            body = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            self._do(self._group.send, body.to(self._device))

    def receive(self) -> bytes:
        """Waits for a frame, b"" = the end; one thread uses it.

        Raises:
            WorkerLost: the other rank is gone.
            FrameInvalid: the length is none.
        """
        length = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._do(self._group.recv, length)
        num_bytes = int(length.item())
        if not 0 <= num_bytes <= _MAX_FRAME_BYTES:
            raise FrameInvalid(f"a frame of {num_bytes} bytes was announced", field="layout")
        body = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        if num_bytes:
            self._do(self._group.recv, body)
        return body.cpu().numpy().tobytes()

    def _do(self, operation: Callable[[list[Tensor], int, int], dist.Work], tensor: Tensor) -> None:
        try:
            operation([tensor], self._other_rank, 0).wait()
        except RuntimeError as error:
            raise WorkerLost(f"the other rank of the pair is gone: {error}") from None


@dataclass(frozen=True, kw_only=True)
class TorchLinks:
    """What one end of a pair holds."""

    calls: OneWay
    answers: OneWay


def serve_store(port: int = 0) -> TCPStore:
    """The meeting point of a pair; listens as long as the object lives, on a free port if 0."""
    return TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)


def check_backend(backend: Backend) -> None:
    """Whether this process can be in a pair of it.

    Raises:
        ConfigError: the backend is not in this build of torch, or there is no GPU for it.
    """
    if backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise ConfigError(
            field="dispatch.torch_backend",
            wanted="gloo, or nccl on a host with a GPU",
            given="nccl, and no GPU or no NCCL here",
        )


def form_pair(place: PairPlace) -> TorchLinks:
    """Meets the other end; returns when both are there.

    Raises:
        ConfigError: see `check_backend`.
        WorkerLost: the other end did not come in time.
    """
    check_backend(place.backend)
    wait = timedelta(seconds=FORM_S)
    try:
        store = TCPStore(place.store_host, place.store_port, is_master=False, timeout=wait)
        store.set(f"rank {place.rank}", "here")
        store.wait([f"rank {place.other_rank}"], wait)
        return TorchLinks(
            calls=_form(place, PrefixStore("calls", store)),
            answers=_form(place, PrefixStore("answers", store)),
        )
    except RuntimeError as error:  # of torch.distributed, errors of the network among them
        raise WorkerLost(f"the pair did not form: {error}") from None


def _form(place: PairPlace, store: Store) -> OneWay:
    if place.backend == "gloo":
        gloo = ProcessGroupGloo(store, place.rank, 2, _FOREVER)
        return OneWay(cast(dist.ProcessGroup, gloo), other_rank=place.other_rank, device=torch.device("cpu"))
    # CPU builds of torch have no such name.
    from torch._C._distributed_c10d import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = _FOREVER
    nccl = ProcessGroupNCCL(store, place.rank, 2, options)
    device = torch.device("cuda", torch.cuda.current_device())
    return OneWay(cast(dist.ProcessGroup, nccl), other_rank=place.other_rank, device=device)
