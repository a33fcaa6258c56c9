"""Takes calls of attention workers over torch.distributed (router/experts/torch_links.py)."""

import logging
import threading
from collections.abc import Callable

from router.experts.torch_links import (
    WORKER_RANK,
    Backend,
    PairPlace,
    TorchLinks,
    check_backend,
    form_pair,
    serve_store,
)
from wire.errors import MorayError
from wire.frames import Frame, decode_frame, encode_frame
from workers.expert.forward_stream import Submit

_log = logging.getLogger(__name__)
_END_S = 5.0
"""How long `close` waits for callers to end their directions."""


class TorchServer:
    """A pair for each caller; one thread serves each."""

    def __init__(self, submit: Submit) -> None:
        """Takes where calls go."""
        self._submit = submit
        self._lock = threading.Lock()
        self._pairs: set[_Pair] = set()

    def join(self, backend: Backend) -> int:
        """Begins to form a pair with whoever asked for it; the port of the store where the two meet.

        Raises:
            ConfigError: no such pairs can be formed here.
        """
        check_backend(backend)
        pair = _Pair(backend, submit=self._submit, on_end=self._forget)
        with self._lock:
            self._pairs.add(pair)
        pair.start()
        return pair.store_port

    def close(self) -> None:
        """Ends every pair from this side, and waits a little for the callers' ends."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.end()
        for pair in pairs:
            pair.join(_END_S)

    def _forget(self, pair: "_Pair") -> None:
        with self._lock:
            self._pairs.discard(pair)


class _Pair(threading.Thread):
    """One caller: whoever computed an answer sends it."""

    def __init__(self, backend: Backend, *, submit: Submit, on_end: "Callable[[_Pair], None]") -> None:
        super().__init__(name="experts-pair", daemon=True)
        self._store = serve_store()
        self.store_port = self._store.port
        self._backend = backend
        self._submit = submit
        self._on_end = on_end
        self._sending = threading.Lock()
        self._links: TorchLinks | None = None
        """Written under `_sending`; None before the pair is formed and after it ended."""

    def run(self) -> None:
        """Forms the pair and takes calls until the caller ends."""
        place = PairPlace(
            rank=WORKER_RANK, store_host="127.0.0.1", store_port=self.store_port, backend=self._backend
        )
        try:
            links = form_pair(place)
            with self._sending:
                self._links = links
            while data := links.calls.receive():
                self._submit(decode_frame(data), self._reply)
        except MorayError as error:
            _log.warning("calls of a pair end: %s", error)
        self.end()
        self._on_end(self)

    def end(self) -> None:
        """Sends nothing any more; the caller ends its direction when it hears of it."""
        with self._sending:
            links, self._links = self._links, None
            if links is not None:
                _send(links, b"")

    def _reply(self, answer: Frame) -> None:
        with self._sending:
            if self._links is not None:
                _send(self._links, encode_frame(answer))


def _send(links: TorchLinks, data: bytes) -> None:
    try:
        links.answers.send(data)
    except MorayError as error:
        _log.debug("a caller has left: %s", error)
