"""The whole config of a cluster: composed of what each room owns, read from one YAML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from router.config import RouterConfig
from wire.config import FrozenConfig
from wire.errors import ConfigError
from workers.config import (
    AttentionConfig,
    ComputeConfig,
    DispatchConfig,
    ExpertConfig,
    KvConfig,
    MtpConfig,
    SelectionBiasConfig,
)


class ControllerConfig(FrozenConfig):
    """The controller: one Ray actor beside the process that ran `moray up`."""

    port: int = Field(0, ge=0, le=65535)
    """Port of the table stream; 0 picks a free one when the cluster starts and keeps it."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Port of the controller's own metrics; 0 picks a free one."""
    start_s: float = Field(600.0, gt=0)
    """Seconds for a worker to start and load before it is started again."""
    restart_delay_s: float = Field(1.0, ge=0)
    """Seconds between two attempts to restart a worker."""
    heartbeat_s: float = Field(0.5, gt=0)
    """Seconds between two heartbeats of an expert worker, and for the answer to each."""
    heartbeat_misses: int = Field(4, ge=1)
    """Heartbeats in a row without an answer after which an expert worker is lost and started again."""
    report_s: float = Field(2.0, gt=0)
    """Seconds in which an attention worker must report at least once."""
    report_misses: int = Field(3, ge=1)
    """Such times in a row without a report after which an attention worker is lost and started again."""
    reader_lease_s: float = Field(15.0, gt=0)
    """Seconds after which an attention worker that does not report keeps no old routing table alive."""
    retire_s: float = Field(5.0, gt=0)
    """Seconds that a worker which leaves gets to end by itself, after the `drain_s` of its group."""


class BalanceConfig(FrozenConfig):
    """How experts are moved between workers, and copied, as their load changes."""

    enabled: bool = True
    """Whether the controller moves experts by itself; `Control.Rebalance` works in any case."""
    interval_s: float = Field(60.0, gt=0)
    """Seconds between two looks at the load."""
    half_life_s: float = Field(120.0, gt=0)
    """Seconds after which a row counts half."""
    min_gain: float = Field(0.1, ge=0)
    """Nothing moves unless the mean over the busiest worker's load grows by at least this."""
    min_rows: int = Field(10_000, ge=0)
    """Nothing moves before so many rows were counted, a row once for each of its experts."""
    bytes_per_s: float = Field(1e9, gt=0)
    """Weights that are loaded for moves, a second, over all workers."""
    pause_s: float = Field(5.0, ge=0)
    """Seconds from one step of a move to the next at least: every step takes some time from who computes."""
    placements: Literal["joint", "by_phase"] = "joint"
    """joint = one placement for the rows of prefill and decode; by_phase = one for each, on workers of its
    own, as soon as there were rows: needs an `expert.num_slots` with which each part holds every expert."""


class TopologyConfig(FrozenConfig):
    """Where node labels come from, and which ones name failure domains."""

    source: Literal["auto", "kubernetes", "ray"] = "auto"
    """auto = kubernetes inside a pod, Ray node labels elsewhere."""
    zone_label: str = "topology.kubernetes.io/zone"
    """Label that names a node's zone."""
    rack_label: str = "topology.kubernetes.io/rack"
    """Label that names a node's rack."""
    accelerator_label: str = "nvidia.com/gpu.product"
    """Label that names a node's accelerator."""


class MorayConfig(FrozenConfig):
    """Everything that can be set, by the key that it has in YAML and in Helm values."""

    model: str = "nano"
    """Checkpoint directory in the HF layout, or the name of a model in the box (nano, tiny)."""
    name: str = Field("moray", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=40)
    """Name of the cluster: the Ray namespace and the prefix of actor names."""
    expert: ExpertConfig = ExpertConfig()
    """The expert workers."""
    prefill: AttentionConfig = AttentionConfig(replicas=1)
    """Attention workers that only prefill."""
    decode: AttentionConfig = AttentionConfig(replicas=1)
    """Attention workers that only decode."""
    both: AttentionConfig = AttentionConfig(replicas=0)
    """Attention workers that prefill and decode in one."""
    compute: ComputeConfig = ComputeConfig()
    """How weights are held and multiplied; the same in every worker."""
    kv: KvConfig = KvConfig()
    """The paged latent cache; the same in every attention worker."""
    dispatch: DispatchConfig = DispatchConfig()
    """How attention workers send tokens to expert workers."""
    mtp: MtpConfig = MtpConfig()
    """The multi-token-prediction layer."""
    selection_bias: SelectionBiasConfig = SelectionBiasConfig()
    """Online selection bias of the gate; it changes outputs, so it is off."""
    router: RouterConfig = RouterConfig()
    """The public endpoint."""
    controller: ControllerConfig = ControllerConfig()
    """The controller."""
    balance: BalanceConfig = BalanceConfig()
    """How experts are moved as their load changes."""
    topology: TopologyConfig = TopologyConfig()
    """Where node labels come from."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe records that every process logs, as JSON lines on stderr."""

    def check_serves(self) -> None:
        """Refuse worker counts with which no request could be answered.

        Raises:
            ConfigError: no worker would prefill, or none would decode.
        """
        for role, group in (("prefill", self.prefill), ("decode", self.decode)):
            if group.replicas == 0 and self.both.replicas == 0:
                wanted = f"at least 1 (or both.replicas at least 1): without one nothing can {role}"
                raise ConfigError(field=f"{role}.replicas", wanted=wanted, given="0")


def load_config(path: Path | None, *, overrides: Mapping[str, Any] | None = None) -> MorayConfig:
    """The config in a YAML file, with `overrides` (dotted key -> value) laid over it.

    Args:
        path: a YAML file; None = all defaults.
        overrides: e.g. {"expert.replicas": 3}; None values are skipped.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, or a field is wrong.
    """
    raw = {} if path is None else _read_yaml(path)
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _set_dotted(raw, dotted, value)
    return MorayConfig.from_mapping(raw)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        # YAML's errors quote the file over several lines; the command line shows one.
        problem = " ".join(str(error).split())
        raise ConfigError(
            field="--config", wanted="a readable YAML file", given=f"{path}: {problem}"
        ) from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(field="--config", wanted="a mapping at the top level", given=type(raw).__name__)
    return raw


def _set_dotted(raw: dict[str, Any], dotted: str, value: object) -> None:
    *parents, leaf = dotted.split(".")
    for depth, parent in enumerate(parents, start=1):
        section = raw.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(field=".".join(parents[:depth]), wanted="a mapping", given=repr(section))
        raw = section
    raw[leaf] = value
