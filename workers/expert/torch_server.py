"""Takes calls of attention workers in a static group (router/experts/torch_links.py)."""

import logging
import threading
from collections.abc import Sequence

from router.experts.torch_links import TorchLinks
from wire.errors import MorayError
from wire.frames import Frame, decode_frame, encode_frame
from workers.expert.forward_stream import Submit

_log = logging.getLogger(__name__)
_END_S = 5.0
"""How long `close` waits for callers to end their directions."""


class TorchServer:
    """One thread for each caller's rank; whoever computed an answer sends it."""

    def __init__(self, links: TorchLinks, *, ranks: Sequence[int], submit: Submit) -> None:
        """Takes this process's links and the ranks of the attention workers."""
        self._callers = [_Caller(rank, links=links, submit=submit) for rank in ranks]

    def close(self) -> None:
        """Waits for every caller's end."""
        for caller in self._callers:
            caller.thread.join(_END_S)


class _Caller:
    """One attention worker's rank."""

    def __init__(self, rank: int, *, links: TorchLinks, submit: Submit) -> None:
        self._rank = rank
        self._links = links
        self._submit = submit
        self._sending = threading.Lock()
        self.thread = threading.Thread(target=self._run, name=f"experts-rank-{rank}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while data := self._links.calls.receive(self._rank):
                self._submit(decode_frame(data), self._reply)
        except MorayError as error:
            _log.warning("calls of rank %d end: %s", self._rank, error)
        self._send(b"")

    def _reply(self, answer: Frame) -> None:
        self._send(encode_frame(answer))

    def _send(self, data: bytes) -> None:
        try:
            with self._sending:
                self._links.answers.send(self._rank, data)
        except MorayError as error:
            _log.debug("rank %d has left: %s", self._rank, error)
