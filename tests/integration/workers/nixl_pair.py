"""Two processes with an agent each: rows of one are read by the other, then the first is killed."""

import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection

import numpy as np

from wire.checksum import add_checksum
from wire.errors import FrameInvalid
from workers.attention.kv_transfer import Place
from workers.attention.nixl_agent import NixlAgent
from workers.attention.nixl_link import NixlLink

NUM_BYTES = 1_000_000
LIMIT_S = 20


def leave(connection: Connection) -> None:
    """Leaves bytes, and says when they were read."""
    link = NixlLink(NixlAgent("prefill-0"), area_bytes=NUM_BYTES)
    link.staging[:] = np.random.default_rng(0).integers(0, 256, NUM_BYTES, dtype=np.uint8)
    read = link.watch(1)
    connection.send(
        Place(
            agent=link.name,
            agent_metadata=link.metadata,
            address=link.staging.ctypes.data,
            checksum=add_checksum(link.staging.data, 0),
            ticket=1,
        )
    )
    read.result(timeout=LIMIT_S)
    connection.send("peer told of ticket")
    signal.pause()


def main() -> None:
    """Writes what came of each step."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    peer = context.Process(target=leave, args=(there,), daemon=True)
    peer.start()
    place = here.recv()
    link = NixlLink(NixlAgent("decode-0"), area_bytes=NUM_BYTES)
    data = link.read(place, NUM_BYTES).result(timeout=LIMIT_S)
    num_read = data.nbytes if add_checksum(data.data, 0) == place.checksum else 0
    sys.stdout.write(f"read {num_read} of {NUM_BYTES}\n")
    sys.stdout.write(f"{here.recv()}\n")
    os.kill(peer.pid or 0, signal.SIGKILL)
    peer.join()
    try:
        link.read(place, NUM_BYTES).result(timeout=LIMIT_S)
    except FrameInvalid as error:
        sys.stdout.write(f"{error.field}\n")
    link.close()


if __name__ == "__main__":
    main()
