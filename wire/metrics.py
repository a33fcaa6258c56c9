"""Every Prometheus metric of Moray, declared once: name, kind, help, labels, buckets.

Names are `moray_<role>_<what>_<unit>`. A process makes a `Metrics` for its own role and hands it down;
labels are bounded (roles, reasons, directions), never request ids or tokens.
"""

import contextlib
import enum
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_CALLS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)


class Kind(enum.Enum):
    """The Prometheus types in use."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class MetricSpec:
    """One metric."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("moray_router_requests_total", Kind.COUNTER, "Requests finished, by gRPC status.", ("code",)),
    MetricSpec("moray_router_active_requests", Kind.GAUGE, "Requests in flight."),
    MetricSpec("moray_router_prompt_tokens_total", Kind.COUNTER, "Prompt tokens of admitted requests."),
    MetricSpec("moray_router_generated_tokens_total", Kind.COUNTER, "New tokens sent to clients."),
    MetricSpec(
        "moray_router_first_token_seconds",
        Kind.HISTOGRAM,
        "From a stream's begin to its first token.",
        (),
        _SECONDS,
    ),
    MetricSpec(
        "moray_router_token_gap_seconds", Kind.HISTOGRAM, "Between two messages of a stream.", (), _SECONDS
    ),
    MetricSpec(
        "moray_router_resumes_total",
        Kind.COUNTER,
        "Streams that joined a request by its id, by whether it was running or finished.",
        ("state",),
    ),
    MetricSpec("moray_router_queued_requests", Kind.GAUGE, "Requests that wait for room at the workers."),
    MetricSpec(
        "moray_router_queue_seconds", Kind.HISTOGRAM, "Wait of a request until there was room.", (), _SECONDS
    ),
    MetricSpec(
        "moray_router_refused_total",
        Kind.COUNTER,
        "Requests refused before any work: full, wait, tenant, deadline or displaced.",
        ("reason",),
    ),
    MetricSpec(
        "moray_router_routes_total",
        Kind.COUNTER,
        "Attempts sent to workers, by why that prefill worker: prefix, load or cold.",
        ("reason",),
    ),
    MetricSpec(
        "moray_router_prefix_lookup_tokens_total", Kind.COUNTER, "Tokens of the prompts sent to workers."
    ),
    MetricSpec(
        "moray_router_prefix_hit_tokens_total",
        Kind.COUNTER,
        "Of them, those believed cached at the prefill worker.",
    ),
    MetricSpec(
        "moray_router_prefix_corrections_total",
        Kind.COUNTER,
        "Times that a worker had less of a prompt than was believed.",
    ),
    MetricSpec("moray_router_replays_total", Kind.COUNTER, "Requests started again on other workers."),
    MetricSpec("moray_router_members", Kind.GAUGE, "Workers known to this router.", ("role", "state")),
    MetricSpec("moray_router_snapshot_version", Kind.GAUGE, "Newest cluster snapshot seen."),
    MetricSpec("moray_attention_requests", Kind.GAUGE, "Requests held, by state.", ("state",)),
    MetricSpec("moray_attention_pages", Kind.GAUGE, "KV pages, by state.", ("state",)),
    MetricSpec(
        "moray_attention_prefix_lookup_tokens_total",
        Kind.COUNTER,
        "Prompt tokens looked for in cached pages.",
    ),
    MetricSpec(
        "moray_attention_prefix_hit_tokens_total", Kind.COUNTER, "Prompt tokens taken from cached pages."
    ),
    MetricSpec(
        "moray_attention_preemptions_total",
        Kind.COUNTER,
        "Sequences that gave their pages up, by what they did then.",
        ("state",),
    ),
    MetricSpec("moray_attention_refused_total", Kind.COUNTER, "Requests refused, by reason.", ("reason",)),
    MetricSpec("moray_attention_prefix_evictions_total", Kind.COUNTER, "Cached pages given away again."),
    MetricSpec("moray_attention_integrity_errors_total", Kind.COUNTER, "Failed checks of the page accounts."),
    MetricSpec(
        "moray_attention_drained_total", Kind.COUNTER, "Requests held when it began to leave.", ("result",)
    ),
    MetricSpec("moray_attention_tokens_total", Kind.COUNTER, "Tokens computed, by phase.", ("phase",)),
    MetricSpec("moray_attention_step_seconds", Kind.HISTOGRAM, "One step of the engine.", (), _SECONDS),
    MetricSpec("moray_attention_step_tokens", Kind.HISTOGRAM, "Tokens of one step.", (), _TOKENS),
    MetricSpec(
        "moray_attention_drafts_total",
        Kind.COUNTER,
        "Tokens that the MTP layer drafted, by position in their step and by what became of them.",
        ("position", "outcome"),
    ),
    MetricSpec(
        "moray_attention_grammars_total",
        Kind.COUNTER,
        "Grammars of structured outputs, by whether they were compiled or kept from earlier.",
        ("result",),
    ),
    MetricSpec(
        "moray_attention_kv_token_bytes",
        Kind.GAUGE,
        "Cache bytes of one token in all layers, indexer keys too.",
    ),
    MetricSpec("moray_attention_kv_tier_pages", Kind.GAUGE, "Cold KV pages, by tier.", ("tier",)),
    MetricSpec("moray_attention_kv_tier_bytes", Kind.GAUGE, "Bytes of cold KV pages, by tier.", ("tier",)),
    MetricSpec(
        "moray_attention_kv_tier_hits_total", Kind.COUNTER, "Cold KV pages used again, by tier.", ("tier",)
    ),
    MetricSpec(
        "moray_attention_kv_tier_lost_total",
        Kind.COUNTER,
        "Cold KV pages lost: corrupt, read_failed, write_failed, failed, backlog.",
        ("reason",),
    ),
    MetricSpec("moray_attention_kv_bytes_total", Kind.COUNTER, "Cache bytes moved.", ("direction",)),
    MetricSpec(
        "moray_attention_kv_refused_total", Kind.COUNTER, "Cache frames refused, by reason.", ("reason",)
    ),
    MetricSpec(
        "moray_attention_kv_frames_total",
        Kind.COUNTER,
        "Frames of cache rows, by form: plain; nixl = left to be read; no_room = plain for want of room.",
        ("form",),
    ),
    MetricSpec(
        "moray_attention_kv_transfers_total",
        Kind.COUNTER,
        "Hand-overs that ended, by result: received, local, lost, failed; sent, superseded, cut_off.",
        ("result",),
    ),
    MetricSpec(
        "moray_attention_dispatch_seconds", Kind.HISTOGRAM, "One layer, plan to combine.", (), _SECONDS
    ),
    MetricSpec(
        "moray_attention_combine_seconds", Kind.HISTOGRAM, "Adding up one layer's sums.", (), _SECONDS
    ),
    MetricSpec(
        "moray_attention_peer_row_seconds",
        Kind.GAUGE,
        "Round trip of a call over its rows, moving average.",
        ("worker",),
    ),
    MetricSpec(
        "moray_attention_peer_queue_rows",
        Kind.GAUGE,
        "Rows that waited at an expert worker when it answered last.",
        ("worker",),
    ),
    MetricSpec(
        "moray_attention_peer_straggler_score",
        Kind.GAUGE,
        "An expert worker's time for a row over the median of all.",
        ("worker",),
    ),
    MetricSpec("moray_attention_quarantined_workers", Kind.GAUGE, "Expert workers that get no rows for now."),
    MetricSpec("moray_attention_dispatch_rows_total", Kind.COUNTER, "Rows sent to expert workers."),
    MetricSpec("moray_attention_dispatch_bytes_total", Kind.COUNTER, "Dispatch bytes.", ("direction",)),
    MetricSpec(
        "moray_attention_dispatch_retries_total", Kind.COUNTER, "Calls sent again, by error.", ("reason",)
    ),
    MetricSpec(
        "moray_attention_dispatch_fallbacks_total",
        Kind.COUNTER,
        "Streams over gRPC to workers of this host whose socket was not there.",
    ),
    MetricSpec(
        "moray_attention_dispatch_dropped_total",
        Kind.COUNTER,
        "Streams ended because an answer could not be read, by what was wrong.",
        ("reason",),
    ),
    MetricSpec(
        "moray_attention_dispatch_refused_total",
        Kind.COUNTER,
        "Answers of expert workers refused, by what was wrong.",
        ("reason",),
    ),
    MetricSpec(
        "moray_attention_selection_bias_on", Kind.GAUGE, "Whether online selection bias moves choices now."
    ),
    MetricSpec(
        "moray_attention_selection_bias_changed_share",
        Kind.GAUGE,
        "Share of expert choices that online selection bias changed.",
    ),
    MetricSpec("moray_attention_table_version", Kind.GAUGE, "Routing table in use."),
    MetricSpec(
        "moray_expert_rows_total",
        Kind.COUNTER,
        "Rows computed; a row counts once per chosen expert.",
        ("phase",),
    ),
    MetricSpec("moray_expert_calls_total", Kind.COUNTER, "Forward calls answered, by result.", ("result",)),
    MetricSpec(
        "moray_expert_batch_calls",
        Kind.HISTOGRAM,
        "Calls of several attention workers computed together.",
        (),
        _CALLS,
    ),
    MetricSpec("moray_expert_queue_rows", Kind.GAUGE, "Rows received and not yet computed."),
    MetricSpec("moray_expert_forward_seconds", Kind.HISTOGRAM, "Arithmetic of one Forward.", (), _SECONDS),
    MetricSpec("moray_expert_slots", Kind.GAUGE, "Expert slots that hold weights."),
    MetricSpec("moray_expert_weights_bytes", Kind.GAUGE, "Bytes of expert weights held."),
    MetricSpec(
        "moray_expert_load_balance_ratio", Kind.GAUGE, "Mean over most rows of an expert held, lately."
    ),
    MetricSpec(
        "moray_expert_load_gini_ratio", Kind.GAUGE, "Of the experts' rows, lately: 0 even, 1 all in one."
    ),
    MetricSpec(
        "moray_expert_top_expert_rows", Kind.GAUGE, "Rows of the busiest experts held, lately.", ("rank",)
    ),
    MetricSpec("moray_controller_members", Kind.GAUGE, "Workers, by role and state.", ("role", "state")),
    MetricSpec("moray_controller_table_version", Kind.GAUGE, "Routing table published."),
    MetricSpec("moray_controller_snapshot_version", Kind.GAUGE, "Cluster snapshot published."),
    MetricSpec("moray_controller_restarts_total", Kind.COUNTER, "Workers started again, by role.", ("role",)),
    MetricSpec("moray_controller_heartbeats_missed_total", Kind.COUNTER, "Heartbeats without an answer."),
    MetricSpec("moray_controller_table_age_seconds", Kind.GAUGE, "Since the newest routing table was made."),
    MetricSpec("moray_controller_experts_loaded_total", Kind.COUNTER, "Experts loaded by workers, on order."),
    MetricSpec("moray_controller_moves_total", Kind.COUNTER, "Copies of experts moved to balance load."),
    MetricSpec("moray_controller_moved_bytes_total", Kind.COUNTER, "Weights loaded to balance load."),
    MetricSpec("moray_controller_replans_total", Kind.COUNTER, "Placements planned anew.", ("result",)),
    MetricSpec("moray_controller_load_balance_ratio", Kind.GAUGE, "Mean over most load of a worker, lately."),
    MetricSpec(
        "moray_controller_phase_workers",
        Kind.GAUGE,
        "Expert workers of the newest table, by the phase whose rows they take.",
        ("phase",),
    ),
    MetricSpec(
        "moray_controller_phase_load_balance_ratio",
        Kind.GAUGE,
        "The same of the rows of one phase alone.",
        ("phase",),
    ),
    MetricSpec("moray_controller_watchers", Kind.GAUGE, "Open table streams."),
)


class Metrics:
    """The metrics of one process, by name without the `moray_<role>_` prefix.

    >>> Metrics("router").gauge("active_requests").set(3)
    """

    def __init__(self, role: str) -> None:
        self.registry = CollectorRegistry()
        self._prefix = f"moray_{role}_"
        self._by_name: dict[str, Counter | Gauge | Histogram] = {
            spec.name: self._make(spec) for spec in METRICS if spec.name.startswith(self._prefix)
        }

    def counter(self, name: str, **labels: str) -> Counter:
        """The counter `moray_<role>_<name>`, with its labels set."""
        return self._find(Counter, name, labels)

    def gauge(self, name: str, **labels: str) -> Gauge:
        """The gauge `moray_<role>_<name>`, with its labels set."""
        return self._find(Gauge, name, labels)

    def histogram(self, name: str, **labels: str) -> Histogram:
        """The histogram `moray_<role>_<name>`, with its labels set."""
        return self._find(Histogram, name, labels)

    def forget(self, name: str, **labels: str) -> None:
        """Stops exporting one set of labels: what it named is gone."""
        metric = self._by_name[self._prefix + name]
        with contextlib.suppress(KeyError):
            metric.remove(*labels.values())

    def serve(self, host: str, port: int) -> int:
        """Serves /metrics over HTTP in a daemon thread; returns the port, chosen by the system when 0."""
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return int(server.server_port)

    def _find(self, cls: type[_Metric], name: str, labels: dict[str, str]) -> _Metric:
        metric = self._by_name[self._prefix + name]
        if not isinstance(metric, cls):
            raise TypeError(f"{self._prefix}{name} is a {type(metric).__name__}, not a {cls.__name__}")
        return metric.labels(**labels) if labels else metric

    def _make(self, spec: MetricSpec) -> Counter | Gauge | Histogram:
        if spec.kind is Kind.COUNTER:
            return Counter(spec.name, spec.help, spec.labels, registry=self.registry)
        if spec.kind is Kind.GAUGE:
            return Gauge(spec.name, spec.help, spec.labels, registry=self.registry)
        return Histogram(spec.name, spec.help, spec.labels, registry=self.registry, buckets=spec.buckets)
