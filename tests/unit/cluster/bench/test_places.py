"""The places that are measured: an engine in this process; a cluster that is ended whatever happens."""

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cluster.bench import places
from cluster.bench.places import PAGE_TOKENS, Place, in_cluster, in_process
from cluster.config import MorayConfig
from cluster.controller_actor import ClusterStatus
from model.checkpoint import Checkpoint
from model.profile import PARTS, StepClock
from tests.reference_data import checkpoint_dir
from wire.errors import ConfigError, NotReady, PromptTooLong

PLACE = Place(dtype="int8", num_threads=1, num_cached_tokens=40, step_tokens=16, num_requests=2)


@dataclass
class FakeCluster:
    """Is ready at once, with these members."""

    addresses: dict[str, str]
    configs: list[MorayConfig] = field(default_factory=list)
    num_stops: int = 0

    def wait_ready(self, **_: Any) -> ClusterStatus:
        return ClusterStatus(waiting_for="", is_ready=True, fatal=None, addresses=self.addresses)

    def stop(self) -> None:
        self.num_stops += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    fake = FakeCluster({"router-0": "h:1", "decode-0": "h:2"})

    def start(config: MorayConfig, checked: object) -> FakeCluster:
        fake.configs.append(config)
        return fake

    monkeypatch.setattr(places, "check_model", lambda _: None)
    monkeypatch.setattr(places, "start_cluster", start)
    return fake


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "engine"]


def test_group_has_pages_for_every_request() -> None:
    group = PLACE.group()
    assert group.num_pages == 3 + 2
    assert (group.max_batch_requests, group.max_step_tokens, group.num_threads) == (2, 16, 1)


def test_number_that_no_worker_takes_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'num_threads'"):
        replace(PLACE, num_threads=2000).group()


def test_process_answers_every_prompt_with_the_moments_of_its_tokens() -> None:
    clock, done = StepClock(), []
    checkpoint = Checkpoint.open(checkpoint_dir("default"))
    with in_process(checkpoint, PLACE, clock=clock, on_progress=lambda *n: done.append(n)) as ask:
        moments = ask([[5, 6, 7], [8]], 4)
    assert [len(times) for times in moments] == [4, 4]
    assert [times == sorted(times) for times in moments] == [True, True]
    assert [moment_s for moment_s, _ in clock.marks] == moments[0]
    # The prompts are too short for the indexer to choose.
    assert set(clock.seconds) == set(PARTS) - {"indexer"}
    assert done[-1][0] == done[-1][1]


def test_process_raises_what_a_prompt_failed_with_and_ends_its_thread() -> None:
    before = engine_threads()
    with (
        pytest.raises(PromptTooLong, match="raise num_pages"),
        in_process(Checkpoint.open(checkpoint_dir("default")), PLACE) as ask,
    ):
        ask([[5] * 6 * PAGE_TOKENS], 1)
    assert engine_threads() == before


def test_cluster_is_configured_as_the_place_and_ended(cluster: FakeCluster) -> None:
    place = replace(PLACE, num_threads=6)
    with in_cluster("nano", place, num_experts=3):
        assert cluster.num_stops == 0
    assert cluster.num_stops == 1
    (config,) = cluster.configs
    assert (config.model, config.compute.dtype, config.expert.replicas) == ("nano", "int8", 3)
    assert config.both == place.group().model_copy(update={"replicas": 1})
    assert config.prefill.replicas == config.decode.replicas == 0
    assert config.expert.num_threads == 2


def test_cluster_without_a_router_is_ended(cluster: FakeCluster) -> None:
    cluster.addresses = {"decode-0": "h:2"}
    with pytest.raises(NotReady, match="no router among"), in_cluster("nano", PLACE, num_experts=1):
        pass
    assert cluster.num_stops == 1


def test_cluster_is_ended_when_a_measurement_fails(cluster: FakeCluster) -> None:
    with pytest.raises(ZeroDivisionError), in_cluster("nano", PLACE, num_experts=1):
        raise ZeroDivisionError
    assert cluster.num_stops == 1
