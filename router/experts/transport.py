"""What carries calls to expert workers; one interface, several implementations."""

from concurrent.futures import Future
from typing import Protocol

from wire.frames import Frame


class ExpertTransport(Protocol):
    """Sends frames to expert workers and gives futures of their answers."""

    def send(self, worker_id: str, frame: Frame) -> "Future[Frame]":
        """Starts one FORWARD call; does not block.

        Returns:
            A future of the PARTIAL frame. It fails with WorkerLost when the worker is gone or unknown, and
            with the error that the worker reported otherwise.
        """

    def close(self) -> None:
        """Ends every stream; open futures fail with WorkerLost."""
