"""The list of metrics keeps its own rules, and a process exports its role's and no other's."""

import re

import pytest
from prometheus_client import generate_latest

from wire.metrics import METRICS, Kind, Metrics

ROLES = ("router", "attention", "expert", "controller")
LABELS = (
    *("code", "role", "state", "phase", "direction", "reason", "result", "rank", "worker"),
    *("position", "outcome", "tier", "form"),
)
"""A worker is one of the expert workers: as many as the cluster has; positions are those of max_drafts."""
UNITLESS_GAUGES = (
    *("members", "requests", "pages", "version", "slots", "watchers", "workers"),
    *("ratio", "share", "score", "on"),
)


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_name_follows_the_scheme(spec):
    assert re.fullmatch(rf"moray_({'|'.join(ROLES)})(_[a-z]+)+", spec.name)
    endings = {
        Kind.COUNTER: ("_total",),
        Kind.HISTOGRAM: ("_seconds", "_bytes", "_tokens", "_rows", "_calls"),
        Kind.GAUGE: ("_seconds", "_bytes", "_tokens", "_rows", *UNITLESS_GAUGES),
    }
    assert spec.name.endswith(endings[spec.kind])


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_help_is_a_sentence(spec):
    assert len(spec.help) > 8
    assert spec.help.endswith(".")


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_labels_are_of_the_bounded_set(spec):
    assert set(spec.labels) <= set(LABELS)


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_only_histograms_have_buckets_and_they_rise(spec):
    assert bool(spec.buckets) == (spec.kind is Kind.HISTOGRAM)
    assert list(spec.buckets) == sorted(set(spec.buckets))


def test_names_are_unique():
    names = [spec.name for spec in METRICS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("role", ROLES)
def test_process_exports_its_own_role_only(role):
    text = generate_latest(Metrics(role).registry).decode()
    families = re.findall(r"^# TYPE (\w+)", text, flags=re.MULTILINE)
    assert families
    assert all(name.startswith(f"moray_{role}_") for name in families)


def test_metric_is_found_by_its_short_name_and_labels():
    metrics = Metrics("router")
    metrics.counter("requests_total", code="OK").inc(2)
    assert metrics.registry.get_sample_value("moray_router_requests_total", {"code": "OK"}) == 2


def test_wrong_kind_is_named():
    with pytest.raises(TypeError, match="is a Gauge, not a Counter"):
        Metrics("router").counter("active_requests")


def test_unknown_metric_is_an_error():
    with pytest.raises(KeyError):
        Metrics("router").gauge("expert_slots")
