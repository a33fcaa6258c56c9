"""The dispatcher that an attention worker holds: routing tables in, dispatches out, and a book of its peers.

An expert call stores nothing, so one that is lost, late or answered with nonsense is sent to another copy of
its experts, or to a worker that loads them for it. Exact partial sums add up in FP64 and are rounded once, so
none of this changes a bit.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from router.experts.payload import PayloadForms
from router.experts.peers import PeerBook, PeerRules
from router.experts.pending import PendingDispatch
from router.experts.plan import Float32, Int32, assignments_of
from router.experts.replicas import WorkerLoads
from router.experts.table import RoutingTable
from router.experts.transport import ExpertTransport
from wire.errors import NotReady
from wire.frames import Frame, FrameKind
from wire.metrics import Metrics
from wire.phases import Phase

_log = logging.getLogger(__name__)

_NO_TABLE = "no routing table yet: the expert workers are still loading"


@dataclass(frozen=True, kw_only=True)
class DispatchRules:
    """How long is waited for whom."""

    deadline_s: float = 60.0
    """For one layer's dispatch, everything included."""
    peers: PeerRules = field(default_factory=PeerRules)


@dataclass(frozen=True)
class _Probe:
    answer: "Future[Frame]"
    until_s: float


class ExpertDispatcher:
    """Sends each layer's rows to the expert workers of the routing table in force.

    `set_table` is called by the thread that follows the controller and `give_up` by whoever ends the engine;
    everything else by the engine thread, which so never sees the table change within a step.
    """

    def __init__(
        self,
        transport: ExpertTransport,
        *,
        metrics: Metrics,
        rules: DispatchRules | None = None,
        forms: PayloadForms | None = None,
    ) -> None:
        self.transport = transport
        self.metrics = metrics
        self.rules = rules or DispatchRules()
        self.forms = forms or PayloadForms()
        self.book = PeerBook(rules=self.rules.peers)
        # Looked up once: they are counted on every layer's way.
        self.sent_rows = metrics.counter("dispatch_rows_total")
        self.sent_bytes = metrics.counter("dispatch_bytes_total", direction="sent")
        self.received_bytes = metrics.counter("dispatch_bytes_total", direction="received")
        self.combine_seconds = metrics.histogram("combine_seconds")
        self.dispatch_seconds = metrics.histogram("dispatch_seconds")
        self.phase: Phase = "decode"
        """Of the step under way."""
        self.changed = threading.Event()
        """An answer or a newer table came: what wakes the engine's thread, which waits for one dispatch at a
        time and looks at all of its calls whatever woke it."""
        self._changed = threading.Condition()
        self._newest: RoutingTable | None = None
        self._in_force: RoutingTable | None = None
        self._probes: dict[str, _Probe] = {}
        self._hidden_size = 0
        """D of the rows seen last."""
        self.has_given_up = False
        """Whether nothing is waited for any more."""

    def set_table(self, table: RoutingTable) -> None:
        """Offers a newer table; it is in force from the next step or retry on."""
        with self._changed:
            self._newest = table
            self._changed.notify_all()
        self.changed.set()

    def give_up(self) -> None:
        """Ends every wait, with WorkerLost for what has no answer: called by whoever stops the engine."""
        with self._changed:
            self.has_given_up = True
            self._changed.notify_all()
        self.changed.set()

    def adopt_table(self, phase: Phase) -> None:
        """Puts the newest table in force and looks after quarantined workers; called between steps.

        Waits for the very first table.

        Args:
            phase: of the step that begins; its rows say so.

        Raises:
            NotReady: no table came within the deadline.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._newest is not None or self.has_given_up, self.rules.deadline_s
            )
            newest = self._newest
        if newest is None:
            raise NotReady(_NO_TABLE)
        self.phase = phase
        if newest is not self._in_force:
            self._forget_absent(newest)
            self._in_force = newest
            self.metrics.gauge("table_version").set(newest.version)
        self._probe(newest)
        self._export(newest)

    def table_in_force(self) -> RoutingTable:
        """The table of this step.

        Raises:
            NotReady: `adopt_table` found none.
        """
        if self._in_force is None:
            raise NotReady(_NO_TABLE)
        return self._in_force

    def newest_table(self) -> RoutingTable:
        """The newest table, for rows that are sent again; that in force while none has come."""
        with self._changed:
            return self._newest or self.table_in_force()

    def loads_of(self, table: RoutingTable) -> WorkerLoads:
        """What the book says of a table's workers."""
        return WorkerLoads(
            is_usable_W=self.book.trusted(table.worker_ids),
            backlog_W=self.book.backlog_rows(table.worker_ids),
            row_cost_W=self.book.row_costs(table.worker_ids),
        )

    def count_sent(self, frames: Sequence[Frame]) -> None:
        """Counts the rows and bytes of calls that were sent."""
        self.sent_rows.inc(sum(len(frame.tensors[0]) for frame in frames))
        self.sent_bytes.inc(sum(tensor.nbytes for frame in frames for tensor in frame.tensors))

    def start(self, layer_idx: int, x_TD: Float32, ids_TK: Int32, weights_TK: Float32) -> PendingDispatch:
        """Starts the routed experts of one layer.

        Args:
            layer_idx: MoE layer.
            x_TD: (T, D) float32 rows.
            ids_TK: (T, K) int32 chosen experts, -1 = none.
            weights_TK: (T, K) float32 weights.
        """
        self._hidden_size = x_TD.shape[1]
        return PendingDispatch(
            self, layer_idx=layer_idx, x_TD=x_TD, assignments=assignments_of(ids_TK, weights_TK)
        )

    def _forget_absent(self, table: RoutingTable) -> None:
        gone = set(self._in_force.worker_ids if self._in_force else ()) - set(table.worker_ids)
        self.book.keep(table.worker_ids)
        for worker_id in sorted(gone):
            self._probes.pop(worker_id, None)
            for name in ("peer_row_seconds", "peer_queue_rows", "peer_straggler_score"):
                self.metrics.forget(name, worker=worker_id)

    def _probe(self, table: RoutingTable) -> None:
        """Sends a call of no rows to workers whose quarantine is over; lets in those that answered."""
        now_s = time.monotonic()
        for worker_id, probe in list(self._probes.items()):
            if not probe.answer.done() and now_s < probe.until_s:
                continue
            del self._probes[worker_id]
            if probe.answer.done() and probe.answer.exception() is None:
                _log.info("expert worker %s answers again", worker_id)
                self.book.on_probe_answered(worker_id)
            else:
                self.book.on_failure(worker_id, now_s=now_s)
        for worker_id in self.book.due_probes(now_s=now_s):
            answer = self.transport.send(worker_id, _empty_call(table, hidden_size=self._hidden_size))
            until_s = now_s + self.book.attempt_s(worker_id, num_rows=0)
            self._probes[worker_id] = _Probe(answer, until_s)
            self.book.on_probe_sent(worker_id)

    def _export(self, table: RoutingTable) -> None:
        self.metrics.gauge("quarantined_workers").set(self.book.num_quarantined())
        book, gauge = self.book, self.metrics.gauge
        scores = book.straggler_scores(table.worker_ids)
        for worker_id, score in zip(table.worker_ids, scores, strict=True):
            gauge("peer_row_seconds", worker=worker_id).set(book.seconds_per_row(worker_id))
            gauge("peer_queue_rows", worker=worker_id).set(book.queue_rows(worker_id))
            gauge("peer_straggler_score", worker=worker_id).set(score)


def _empty_call(table: RoutingTable, *, hidden_size: int) -> Frame:
    """A FORWARD that asks for nothing; a worker refuses it only when it cannot answer at all."""
    no_numbers = np.zeros(0, dtype=np.int32)
    return Frame(
        kind=FrameKind.FORWARD,
        tensors=(
            np.zeros((0, hidden_size), dtype=np.float32),
            no_numbers,
            no_numbers,
            np.zeros(0, dtype=np.float32),
        ),
        table_version=table.version,
        layer_idx=next(iter(table.layers)),
    )
