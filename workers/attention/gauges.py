"""What an engine shows of itself between two steps."""

from collections import Counter
from collections.abc import Iterable

from model.transformer import Transformer
from wire.metrics import Metrics
from workers.attention.pages import PageAllocator
from workers.attention.types import Phase, SequenceState


class EngineGauges:
    """Writes the gauges; the engine thread is its only user."""

    def __init__(self, metrics: Metrics, *, pages: PageAllocator, transformer: Transformer) -> None:
        self._metrics = metrics
        self._pages = pages
        self._transformer = transformer
        self._num_evictions_told = 0

    def show(self, sequences: Iterable[SequenceState]) -> None:
        """Shows what is true now."""
        counts = Counter(sequence.phase for sequence in sequences)
        for phase in Phase:
            self._metrics.gauge("requests", state=phase.value).set(counts[phase])
        self._show_pages()
        online_bias = self._transformer.online_bias
        if online_bias is not None:
            self._metrics.gauge("selection_bias_on").set(online_bias.is_on)
            share = online_bias.num_changed / max(online_bias.num_choices, 1)
            self._metrics.gauge("selection_bias_changed_share").set(share)

    def _show_pages(self) -> None:
        pages = self._pages
        self._metrics.gauge("pages", state="free").set(pages.num_free)
        self._metrics.gauge("pages", state="cached").set(pages.num_cached)
        self._metrics.gauge("pages", state="used").set(pages.num_pages - pages.num_available)
        num_new = pages.num_evictions - self._num_evictions_told
        self._metrics.counter("prefix_evictions_total").inc(num_new)
        self._num_evictions_told = pages.num_evictions
