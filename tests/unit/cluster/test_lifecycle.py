"""What is refused before anything of a cluster starts."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import ray

from cluster.config import MorayConfig
from cluster.lifecycle import check_model, start_cluster
from wire.errors import ConfigError


@pytest.fixture
def without_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host where Moray was installed without the extra, and where Ray must not start."""
    find_spec = importlib.util.find_spec

    def find(name: str) -> ModuleSpec | None:
        return None if name.startswith("nixl") else find_spec(name)

    def start(**_: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(ray, "init", start)


@pytest.mark.usefixtures("without_nixl")
def test_nixl_without_its_package_is_refused_before_ray_starts() -> None:
    ports = {"grpc_port": 0, "http_port": 0}
    config = MorayConfig.from_mapping({"model": "tiny", "kv": {"transport": "nixl"}, "router": ports})
    with pytest.raises(ConfigError, match=r"kv\.transport.*pip install 'moray\[nixl\]'"):
        start_cluster(config, check_model(config))
