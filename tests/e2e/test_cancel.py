"""A client that goes away takes nothing with it: its pages are free again on every worker."""

import signal
import time

import grpc
import pytest
from e2e_cluster import Running, scrape, wait_until

from cluster.client import GenerateOptions, make_request
from wire.proto import inference_pb2_grpc

WORKERS = ("prefill-0", "decode-0")


def used_pages(cluster: Running) -> dict[str, float]:
    members = cluster.shell.members()
    return {
        worker: scrape(members[worker]["metrics_address"])['moray_attention_pages{state="used"}']
        for worker in WORKERS
    }


def check_books(cluster: Running) -> None:
    """No worker lost or doubled a page."""
    members = cluster.shell.members()
    for worker in WORKERS:
        samples = scrape(members[worker]["metrics_address"])
        assert samples["moray_attention_integrity_errors_total"] == 0
        pages = {state: samples[f'moray_attention_pages{{state="{state}"}}'] for state in ("free", "used")}
        assert sum(pages.values()) == members[worker]["num_pages"]


def test_killing_the_client_mid_stream_frees_its_pages(cluster: Running) -> None:
    client = cluster.shell.popen("generate", "A long story", "--max-tokens", "3000", "--ignore-eos")
    wait_until(lambda: used_pages(cluster)["decode-0"] > 0, what="the stream to begin")

    client.send_signal(signal.SIGKILL)
    client.communicate(timeout=30)

    wait_until(lambda: not any(used_pages(cluster).values()), what="the pages to be free")
    check_books(cluster)


def test_a_deadline_ends_the_request_and_frees_its_pages(cluster: Running) -> None:
    done = cluster.shell.run(
        "generate", "A long story", "--max-tokens", "3000", "--ignore-eos", "--deadline-s", "1.5"
    )
    assert done.returncode == 1
    wait_until(lambda: not any(used_pages(cluster).values()), what="the pages to be free")
    check_books(cluster)


def test_cancelling_the_call_frees_its_pages(cluster: Running) -> None:
    address = cluster.shell.members()["router-0"]["address"]
    options = GenerateOptions(max_tokens=3000, ignore_eos=True)
    with grpc.insecure_channel(address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(make_request([5] * 30, options))
        next(iter(call))
        call.cancel()
    wait_until(lambda: not any(used_pages(cluster).values()), what="the pages to be free")
    check_books(cluster)


@pytest.mark.slow
def test_a_hundred_clients_leave_nothing_behind(cluster: Running) -> None:
    for i in range(100):
        client = cluster.shell.popen("generate", f"story {i}", "--max-tokens", "3000", "--ignore-eos")
        time.sleep(0.5 + i % 7 / 10)
        client.send_signal(signal.SIGKILL)
        client.communicate(timeout=30)
    wait_until(lambda: not any(used_pages(cluster).values()), what="the pages to be free")
    check_books(cluster)
