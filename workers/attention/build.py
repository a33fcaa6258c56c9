"""Building an engine: the same parts in a worker of a cluster and whole in one process."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.local_experts import LocalExperts
from model.online_bias import OnlineBias, OnlineBiasRules
from model.profile import StepClock
from model.transformer import Transformer
from model.weights import ModelWeights, OnProgress, Packing, load_model_weights
from wire.errors import ConfigError
from wire.metrics import Metrics
from wire.phases import Phase
from wire.prefix import PrefixRules
from workers.attention.cache import PagedCache
from workers.attention.disk_pages import DiskPages
from workers.attention.drafter import MtpDrafter, Speculation
from workers.attention.engine import Engine, EngineParts
from workers.attention.gate import QueueLimits
from workers.attention.moe import Experts
from workers.attention.pages import PageAllocator
from workers.attention.prefix import PrefixCache
from workers.attention.scheduler import StepLimits
from workers.attention.speculation import DraftPolicy, DraftRules
from workers.attention.tiers import PageTiers
from workers.config import AttentionConfig, ComputeConfig, KvConfig, MtpConfig, SelectionBiasConfig
from workers.packing import make_packing


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The sections of the config that shape an engine."""

    group: AttentionConfig
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    selection_bias: SelectionBiasConfig = field(default_factory=SelectionBiasConfig)
    change_speculation: Callable[[Speculation], Speculation] = lambda speculation: speculation
    """For tests and benchmarks: what drafts in the MTP layer's place, and how often."""


class InProcessExperts(LocalExperts):
    """Every routed expert in this process: nothing changes between steps."""

    def begin_step(self, phase: Phase) -> None:
        """Nothing to put in force."""


def build_whole_engine(
    checkpoint: Checkpoint,
    *,
    config: EngineConfig,
    metrics: Metrics,
    clock: StepClock | None = None,
    on_progress: OnProgress | None = None,
) -> Engine:
    """An engine with every routed expert in its own process, not started yet; a clock counts its parts' time.

    Raises:
        CheckpointInvalid: a tensor is missing or misshapen.
    """
    packing = make_packing(config.group, config.compute)
    if clock is not None:
        packing = replace(packing, kernels=clock.time_kernels(packing.kernels))
    experts = InProcessExperts.load(checkpoint, packing, on_progress=on_progress)
    weights = load_model_weights(checkpoint, packing)
    if clock is not None:
        weights = clock.time_weights(weights)
    return _engine(checkpoint.config, weights, experts, packing, config=config, metrics=metrics)


def build_engine(
    checkpoint: Checkpoint,
    experts: Experts,
    packing: Packing,
    *,
    config: EngineConfig,
    metrics: Metrics,
    on_progress: OnProgress | None = None,
) -> Engine:
    """An engine that is not started yet; reads every weight but the routed experts.

    Raises:
        CheckpointInvalid: a tensor is missing or misshapen.
    """
    weights = load_model_weights(checkpoint, packing, on_progress=on_progress)
    return _engine(checkpoint.config, weights, experts, packing, config=config, metrics=metrics)


def _engine(
    model: ModelConfig,
    weights: ModelWeights,
    experts: Experts,
    packing: Packing,
    *,
    config: EngineConfig,
    metrics: Metrics,
) -> Engine:
    pages = PageAllocator(config.group.num_pages, page_tokens=config.kv.page_tokens)
    transformer = Transformer(
        model,
        weights,
        packing.kernels,
        zero_first_embedding=config.mtp.zero_first_embedding,
        online_bias=_online_bias(config.selection_bias),
    )
    cache = PagedCache(
        num_layers=model.num_cache_layers,
        num_pages=config.group.num_pages,
        page_tokens=config.kv.page_tokens,
        layout=model.cache_layout(config.kv.index_keys),
        form=config.kv.dtype,
        device=packing.device,
    )
    metrics.gauge("kv_token_bytes").set(cache.num_bytes() // (pages.num_pages * pages.page_tokens))
    speculation = None
    if model.num_nextn_predict_layers and config.mtp.max_drafts:
        drafter = MtpDrafter(transformer=transformer, cache=cache, experts=experts)
        policy = DraftPolicy(DraftRules(max_drafts=config.mtp.max_drafts))
        speculation = config.change_speculation(Speculation(drafter=drafter, policy=policy))
    parts = EngineParts(
        transformer=transformer,
        cache=cache,
        pages=pages,
        prefix=_prefix_cache(pages, cache, config.kv, model, metrics=metrics),
        experts=experts,
        limits=StepLimits(
            config.group.max_batch_requests,
            config.group.max_step_tokens,
            config.group.micro_batches,
            config.group.context_cost_tokens,
        ),
        queue=QueueLimits(
            max_requests=config.group.max_queued_requests,
            max_wait_s=config.group.max_queue_s,
            lookahead_tokens=config.group.lookahead_tokens,
        ),
        metrics=metrics,
        speculation=speculation,
    )
    return Engine(parts)


def _prefix_cache(
    pages: PageAllocator, cache: PagedCache, config: KvConfig, model: ModelConfig, *, metrics: Metrics
) -> PrefixCache:
    rules = PrefixRules(
        page_tokens=config.page_tokens,
        cache_form=f"{config.dtype} {config.index_keys}",
        index_topk=model.index_topk,
    )
    tiers = _tiers(cache, config, metrics=metrics) if config.prefix_reuse else None
    return PrefixCache(
        pages,
        rules=rules,
        is_on=config.prefix_reuse,
        copy_page=cache.copy_page,
        metrics=metrics,
        tiers=tiers,
    )


def _tiers(cache: PagedCache, config: KvConfig, *, metrics: Metrics) -> PageTiers | None:
    if not config.host_tier_bytes and not config.disk_tier_bytes:
        return None
    disk = None
    if config.disk_tier_bytes:
        parent = Path(config.disk_tier_dir or tempfile.gettempdir())
        try:
            disk = DiskPages(parent, config.disk_tier_bytes)
        except OSError as error:
            wanted, given = "a directory that can be written", f"{parent} ({error})"
            raise ConfigError(field="kv.disk_tier_dir", wanted=wanted, given=given) from error
    return PageTiers(cache, host_bytes=config.host_tier_bytes, disk=disk, metrics=metrics)


def _online_bias(config: SelectionBiasConfig) -> OnlineBias | None:
    if not config.enabled:
        return None
    return OnlineBias(
        OnlineBiasRules(step=config.step, limit=config.limit, most_changed_share=config.most_changed_share)
    )
