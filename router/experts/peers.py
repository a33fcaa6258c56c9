"""What a dispatcher knows of the expert workers it talks to: speed, queue, and whether to trust them now.

A pure book: events with their time go in, decisions come out. A worker that fails is quarantined: it gets no
rows, but a probe (a call of no rows) once its time is over; the answer lets it back in, and each further
failure doubles the time.

Worked example (also a test): a took 2 ms a row in its last calls, b and c took 1 ms. The score of a is 2: it
is a straggler, and each row that it gets counts twice when rows are spread. a fails at 10 s: it gets no rows
until a probe sent at 10.5 s is answered; if the probe fails at 11.5 s, the next one is sent at 12.5 s.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

_STEP = 0.2
"""Weight of the newest call in the moving averages."""
_RELIEF = 1.5
"""Straggler score above which a worker is relieved of rows."""


@dataclass(frozen=True, kw_only=True)
class PeerRules:
    """When a worker is late, and how long one that failed is left alone."""

    attempt_s: float = 1.0
    """Shortest time that a worker gets to answer."""
    slack: float = 8.0
    """A call may take this many times what the worker took for such calls lately."""
    quarantine_s: float = 0.5
    """First quarantine; doubles with each further failure."""
    longest_quarantine_s: float = 30.0


@dataclass
class _Peer:
    seconds_per_row: float = 0.0
    """Moving average; 0 = no call yet."""
    queue_rows: int = 0
    """Rows that waited at the worker when it answered last."""
    num_failures: int = 0
    """In a row."""
    probe_at_s: float | None = None
    """End of its quarantine; None = it is trusted."""
    is_probed: bool = False
    """Whether a probe is under way."""


@dataclass
class PeerBook:
    """The book of one dispatcher; used by one thread."""

    rules: PeerRules = field(default_factory=PeerRules)
    _peers: defaultdict[str, _Peer] = field(default_factory=lambda: defaultdict(_Peer))
    """Whoever is asked about is noted: trusted, and as quick as the others."""

    def on_answer(self, worker_id: str, *, num_rows: int, seconds: float, queue_rows: int) -> None:
        """A call of `num_rows` rows was answered after `seconds`."""
        peer = self._peers[worker_id]
        now = seconds / max(num_rows, 1)
        old = peer.seconds_per_row or now
        peer.seconds_per_row = old + _STEP * (now - old)
        peer.queue_rows = queue_rows
        if peer.probe_at_s is None:
            peer.num_failures = 0

    def on_failure(self, worker_id: str, *, now_s: float) -> None:
        """A call was lost, late, or answered with what cannot be used."""
        peer = self._peers[worker_id]
        if peer.probe_at_s is not None and not peer.is_probed and now_s < peer.probe_at_s:
            return  # Calls that were under way when the first of them failed.
        wait_s = self.rules.quarantine_s * 2 ** min(peer.num_failures, 20)
        peer.num_failures += 1
        peer.probe_at_s = now_s + min(wait_s, self.rules.longest_quarantine_s)
        peer.is_probed = False

    def on_probe_sent(self, worker_id: str) -> None:
        """A probe is under way: no second one until it fails."""
        self._peers[worker_id].is_probed = True

    def on_probe_answered(self, worker_id: str) -> None:
        """The worker has proved itself; its next failure counts as one more."""
        peer = self._peers[worker_id]
        peer.probe_at_s, peer.is_probed, peer.queue_rows = None, False, 0

    def keep(self, worker_ids: Sequence[str]) -> None:
        """Forgets everyone else: they left the cluster."""
        kept = {worker_id: self._peers[worker_id] for worker_id in worker_ids}
        self._peers = defaultdict(_Peer, kept)

    def trusted(self, worker_ids: Sequence[str]) -> list[bool]:
        """(W,) whether each may get rows."""
        return [self._peers[worker_id].probe_at_s is None for worker_id in worker_ids]

    def due_probes(self, *, now_s: float) -> list[str]:
        """Quarantined workers whose time is over and that are not being probed."""
        return [
            worker_id
            for worker_id, peer in self._peers.items()
            if peer.probe_at_s is not None and peer.probe_at_s <= now_s and not peer.is_probed
        ]

    def num_quarantined(self) -> int:
        """Workers that get no rows now."""
        return sum(peer.probe_at_s is not None for peer in self._peers.values())

    def attempt_s(self, worker_id: str, *, num_rows: int) -> float:
        """How long a call may take before its rows are sent elsewhere too."""
        expected_s = self._peers[worker_id].seconds_per_row * max(num_rows, 1)
        return max(self.rules.attempt_s, self.rules.slack * expected_s)

    def backlog_rows(self, worker_ids: Sequence[str]) -> list[float]:
        """(W,) rows that wait at each worker, as it told last."""
        return [float(self._peers[worker_id].queue_rows) for worker_id in worker_ids]

    def row_costs(self, worker_ids: Sequence[str]) -> list[float]:
        """(W,) what one row costs at each worker: 1, or a straggler's score."""
        return [score if score > _RELIEF else 1.0 for score in self.straggler_scores(worker_ids)]

    def straggler_scores(self, worker_ids: Sequence[str]) -> list[float]:
        """(W,) each one's time for a row over the median of all; 1 = as the others, or not known yet.

        The median of two is the faster one: of two workers one can be a straggler.
        """
        known = sorted(peer.seconds_per_row for peer in self._peers.values() if peer.seconds_per_row)
        median = known[(len(known) - 1) // 2] if known else 1.0
        return [(self._peers[worker_id].seconds_per_row or median) / median for worker_id in worker_ids]

    def queue_rows(self, worker_id: str) -> int:
        """Rows that waited there when it answered last."""
        return self._peers[worker_id].queue_rows

    def seconds_per_row(self, worker_id: str) -> float:
        """Moving average of its calls; 0 = no call yet."""
        return self._peers[worker_id].seconds_per_row
