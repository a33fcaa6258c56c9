"""A client that goes away takes nothing with it: its pages are free again on every worker."""

import signal
import time

import grpc
import pytest
from e2e_cluster import Running, wait_until
from e2e_pages import used_pages, wait_no_page_is_used

from cluster.client import GenerateOptions, make_request
from wire.proto import inference_pb2_grpc


def test_killing_the_client_mid_stream_frees_its_pages(cluster: Running) -> None:
    client = cluster.shell.popen("generate", "A long story", "--max-tokens", "3000", "--ignore-eos")
    wait_until(lambda: used_pages(cluster)["decode-0"] > 0, what="the stream to begin")

    client.send_signal(signal.SIGKILL)
    client.communicate(timeout=30)

    wait_no_page_is_used(cluster)


def test_a_deadline_ends_the_request_and_frees_its_pages(cluster: Running) -> None:
    done = cluster.shell.run(
        "generate", "A long story", "--max-tokens", "3000", "--ignore-eos", "--deadline-s", "1.5"
    )
    assert done.returncode == 1
    wait_no_page_is_used(cluster)


def test_cancelling_the_call_frees_its_pages(cluster: Running) -> None:
    address = cluster.shell.members()["router-0"]["address"]
    options = GenerateOptions(max_tokens=3000, ignore_eos=True)
    with grpc.insecure_channel(address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(make_request([5] * 30, options))
        next(iter(call))
        call.cancel()
    wait_no_page_is_used(cluster)


@pytest.mark.slow
def test_a_hundred_clients_leave_nothing_behind(cluster: Running) -> None:
    for i in range(100):
        client = cluster.shell.popen("generate", f"story {i}", "--max-tokens", "3000", "--ignore-eos")
        time.sleep(0.5 + i % 7 / 10)
        client.send_signal(signal.SIGKILL)
        client.communicate(timeout=30)
    wait_no_page_is_used(cluster)
