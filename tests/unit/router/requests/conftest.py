"""Builders of views and requests."""

from types import SimpleNamespace

import pytest

from router.requests.members import ClusterView, ModelFacts, Worker
from router.requests.types import AdmittedRequest
from wire.proto.common_pb2 import SamplingParams

MODEL = ModelFacts(
    name="toy",
    path="",
    fingerprint="f00d",
    vocab_tokens=300,
    max_context_tokens=64,
    bos_token_id=0,
    eos_token_id=1,
)


def worker(name: str, role: str = "both", *, num_pages: int = 100, incarnation: int = 1) -> Worker:
    return Worker(
        worker_id=name,
        incarnation=incarnation,
        address=f"{name}:1",
        can_prefill=role in ("prefill", "both"),
        can_decode=role in ("decode", "both"),
        num_pages=num_pages,
    )


def view(*workers: Worker) -> ClusterView:
    keys = tuple(worker.key for worker in workers)
    return ClusterView(
        version=1, model=MODEL, page_tokens=4, has_table=True, workers=workers, present=keys, waiting_for=""
    )


def request(**changes: object) -> AdmittedRequest:
    values: dict[str, object] = {
        "request_id": "r",
        "wire_id": "r~1",
        "model": "f00d",
        "prompt_ids": (5, 6, 7),
        "max_tokens": 10,
        "stop_token_ids": (1,),
        "stop": (),
        "sampling": SamplingParams(temperature=0.5, top_p=0.9, top_k=3, seed=11),
    }
    return AdmittedRequest(**{**values, **changes})  # type: ignore[arg-type]  # built from a table


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    return SimpleNamespace(worker=worker, view=view, request=request, model=MODEL)
