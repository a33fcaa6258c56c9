"""Building an engine: the same parts in a worker of a cluster and whole in one process."""

from dataclasses import dataclass, field

from model.checkpoint import Checkpoint
from model.kernels.grouped_experts import LocalExperts
from model.transformer import Transformer
from model.weights import load_model_weights
from wire.metrics import Metrics
from workers.attention.cache import PagedCache
from workers.attention.engine import Engine, EngineParts
from workers.attention.moe import Experts
from workers.attention.pages import PageAllocator
from workers.attention.scheduler import StepLimits
from workers.config import AttentionConfig, KvConfig, MtpConfig


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The sections of the config that shape an engine."""

    group: AttentionConfig
    kv: KvConfig = field(default_factory=KvConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)


class InProcessExperts(LocalExperts):
    """Every routed expert in this process: nothing changes between steps."""

    def begin_step(self) -> None:
        """Nothing to put in force."""


def build_engine(
    checkpoint: Checkpoint, experts: Experts, *, config: EngineConfig, metrics: Metrics
) -> Engine:
    """An engine that is not started yet; reads every weight but the routed experts.

    Raises:
        CheckpointInvalid: a tensor is missing or misshapen.
    """
    device = "cuda" if config.group.num_gpus > 0 else "cpu"
    weights = load_model_weights(checkpoint, device=device)
    parts = EngineParts(
        transformer=Transformer(
            checkpoint.config, weights, zero_first_embedding=config.mtp.zero_first_embedding
        ),
        cache=PagedCache(
            num_layers=checkpoint.config.num_cache_layers,
            num_pages=config.group.num_pages,
            page_tokens=config.kv.page_tokens,
            width=checkpoint.config.cache_width,
            device=device,
        ),
        pages=PageAllocator(config.group.num_pages, page_tokens=config.kv.page_tokens),
        experts=experts,
        limits=StepLimits(config.group.max_batch_requests, config.group.max_step_tokens),
        metrics=metrics,
    )
    return Engine(parts)
