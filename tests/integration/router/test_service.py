"""The router as a process: health, reflection, HTTP side, drain, stop, text."""

import asyncio
import json
import signal
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from router.config import RouterConfig
from router.front.service import RouterService
from wire.errors import ConfigError, InvalidRequest, NotReady, from_rpc
from wire.proto import attention_pb2, common_pb2, control_pb2

INFERENCE = "moray.v1.Inference"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(lab, service=""):
    stub = health_pb2_grpc.HealthStub(lab.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


@pytest.mark.parametrize("service", ["", INFERENCE])
def test_health_follows_the_cluster(kit, service):
    async def main():
        async with kit.open_lab(push=False) as lab:
            assert await health_of(lab, service) == NOT_SERVING
            request = health_pb2.HealthCheckRequest(service=service)
            watch = health_pb2_grpc.HealthStub(lab.channel).Watch(request)
            assert (await watch.read()).status == NOT_SERVING
            lab.push()
            assert (await watch.read()).status == SERVING
            lab.push(not_ready=("d0",))
            assert (await watch.read()).status == NOT_SERVING
            watch.cancel()

    kit.run(main())


def test_health_of_an_unknown_service_is_not_found(kit):
    async def main():
        async with kit.open_lab() as lab:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health_of(lab, "nobody")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    kit.run(main())


def test_reflection_describes_the_api_to_a_standard_client(kit):
    def ask(port):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            file = database.FindFileContainingSymbol(INFERENCE)
            return database.get_services(), [service.name for service in file.service]

    async def main():
        async with kit.open_lab() as lab:
            services, described = await asyncio.to_thread(ask, lab.service.grpc_port)
            assert set(services) >= {INFERENCE, "grpc.health.v1.Health"}
            assert described == ["Inference"]

    kit.run(main())


def test_readyz_and_healthz(kit):
    async def main():
        async with kit.open_lab(push=False) as lab:
            assert (await lab.get("/healthz")).status_code == 200
            waiting = await lab.get("/readyz")
            assert waiting.status_code == 503
            assert waiting.json()["waiting_for"] == "the first snapshot of the controller"
            lab.push(not_ready=("d0",))
            await lab.pushed()
            assert "a decode worker" in (await lab.get("/readyz")).json()["waiting_for"]
            lab.push()
            await lab.pushed()
            ready = await lab.get("/readyz")
            assert ready.status_code == 200
            assert ready.json() == {"ready": True, "waiting_for": ""}

    kit.run(main())


def test_sd_names_the_router_the_controller_and_every_worker(kit):
    async def main():
        async with kit.open_lab() as lab:
            response = await lab.get("/sd")
            assert response.headers["content-type"] == "application/json"
            groups = response.json()
            assert [group["labels"]["role"] for group in groups] == [
                "router",
                "controller",
                "decode",
                "prefill",
            ]
            assert groups[0]["targets"] == [f"127.0.0.1:{lab.service.http_port}"]
            assert groups[0]["labels"]["worker_id"] == "router-7"
            assert groups[2]["labels"]["zone"] == "zone-1"

    kit.run(main())


def test_metrics_count_what_happened(kit):
    async def main():
        async with kit.open_lab() as lab:
            await lab.tokens(lab.call(max_tokens=4))
            response = await lab.get("/metrics")
            assert response.headers["content-type"].startswith("text/plain")
            families = {family.name: family for family in text_string_to_metric_families(response.text)}
            values = {
                (sample.name, *sample.labels.values()): sample.value
                for family in families.values()
                for sample in family.samples
            }
            assert values["moray_router_requests_total", "OK"] == 1
            assert values["moray_router_prompt_tokens_total",] == 3
            assert values["moray_router_generated_tokens_total",] == 4
            assert values["moray_router_first_token_seconds_count",] == 1
            assert values["moray_router_token_gap_seconds_count",] == 3
            assert values["moray_router_active_requests",] == 0
            assert values["moray_router_members", "decode", "ready"] == 1
            assert values["moray_router_snapshot_version",] == 1

    kit.run(main())


def test_index_and_unknown_path(kit):
    async def main():
        async with kit.open_lab() as lab:
            assert "/metrics" in (await lab.get("/")).json()["paths"]
            assert (await lab.get("/v1/models")).status_code == 404

    kit.run(main())


def test_drain_finishes_what_runs_and_refuses_what_comes(kit):
    async def main():
        worker = kit.worker("d0", control_pb2.ROLE_BOTH, script=kit.hang_after(2))
        async with kit.open_lab(worker) as lab:
            stream = asyncio.create_task(lab.tokens(lab.call(max_tokens=6)))
            await worker.is_hanging.wait()
            drain = asyncio.create_task(lab.service.drain())
            await lab.until(lambda: lab.service.is_draining)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(lab.call())
            assert isinstance(from_rpc(caught.value), NotReady)
            assert await health_of(lab) == NOT_SERVING
            assert (await lab.get("/readyz")).status_code == 503
            worker.release.set()
            assert await stream == kit.expected((5, 6, 7), 6)
            await drain

    kit.run(main())


def test_drain_ends_what_outlasts_it(kit):
    async def main():
        worker = kit.worker("d0", control_pb2.ROLE_BOTH, script=kit.hang_after(2))
        async with kit.open_lab(worker, drain_s=0.2) as lab:
            stream = asyncio.create_task(lab.tokens(lab.call(max_tokens=6)))
            await worker.is_hanging.wait()
            await lab.service.drain()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream
            error = from_rpc(caught.value)
            assert isinstance(error, NotReady)
            assert "shutting down" in error.message
            await asyncio.wait_for(worker.is_cancelled.wait(), 5)
            assert lab.service.ledger.loads == {}

    kit.run(main())


def test_stop_leaves_no_port_and_no_task(kit):
    async def main():
        worker = kit.worker("d0", control_pb2.ROLE_BOTH, script=kit.hang_after(1))
        async with kit.open_lab(worker) as lab:
            stream = asyncio.create_task(lab.tokens(lab.call(max_tokens=6)))
            await worker.is_hanging.wait()
            await lab.service.stop()
            with pytest.raises(grpc.aio.AioRpcError):
                await stream
            for port in (lab.service.grpc_port, lab.service.http_port):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
                    probe.listen()

    kit.run(main())


@pytest.mark.parametrize("field", ["grpc_port", "http_port"])
def test_port_in_use_is_named(kit, field):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports = {"grpc_port": 0, "http_port": 0, field: taken.getsockname()[1]}
            service = RouterService(RouterConfig(**ports), controller_address="127.0.0.1:1")
            with pytest.raises(ConfigError) as caught:
                await service.start()
            assert caught.value.field == f"router.{field}"
            assert str(ports[field]) in caught.value.message

    kit.run(main())


def test_wait_ready_says_what_is_missing(kit):
    async def main():
        async with kit.open_lab(push=False) as lab:
            with pytest.raises(NotReady, match="first snapshot"):
                await lab.service.wait_ready(0.05)

    kit.run(main())


def test_router_keeps_serving_and_finds_a_controller_that_comes_back(kit):
    async def main():
        async with kit.open_lab() as lab:
            assert lab.controller.watchers == ["router-7"]
            await lab.controller.stop()
            assert await lab.tokens(lab.call(max_tokens=3)) == kit.expected((5, 6, 7), 3)
            assert await health_of(lab) == SERVING
            await lab.controller.start(lab.controller.address)
            lab.push(not_ready=("d0",))
            await lab.pushed()
            assert await health_of(lab) == NOT_SERVING

    kit.run(main())


def _byte_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1} | {char: 2 + idx for idx, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    return tokenizer


def test_text_goes_in_and_comes_out_in_whole_characters(kit, tmp_path):
    tokenizer = _byte_tokenizer(tmp_path)

    async def main():
        async with kit.open_lab(path=str(tmp_path)) as lab:
            responses = [response async for response in lab.call(text="naïve €", max_tokens=30)]
            prompt = tuple(lab["d0"].requests[0].token_ids)
            assert prompt == (0, *tokenizer.encode("naïve €").ids)
            ids = [token_id for response in responses for token_id in response.token_ids]
            assert ids == kit.expected(prompt, 30)
            assert "".join(response.text for response in responses) == tokenizer.decode(ids)

    kit.run(main())


def test_character_that_stays_unfinished_shows_in_the_last_message(kit, tmp_path):
    tokenizer = _byte_tokenizer(tmp_path)
    ids = [tokenizer.token_to_id("h"), tokenizer.token_to_id("â")]

    async def half_a_character(worker, request, context):
        await context.write(attention_pb2.SequenceEvent(token_ids=ids[:1]))
        stop = common_pb2.FINISH_REASON_LENGTH
        await context.write(attention_pb2.SequenceEvent(token_ids=ids[1:], finish_reason=stop))

    async def main():
        worker = kit.worker("d0", control_pb2.ROLE_BOTH, script=half_a_character)
        async with kit.open_lab(worker, path=str(tmp_path)) as lab:
            responses = [response async for response in lab.call(max_tokens=2)]
            assert [response.text for response in responses] == ["h", "\ufffd"]
            assert responses[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
            assert responses[-1].usage.completion_tokens == 2

    kit.run(main())


@pytest.mark.parametrize("request_id", ["", "mine"])
def test_stop_string_ends_the_answer_and_the_workers_call(kit, tmp_path, request_id):
    """The worker says "ab#", then "#", then hangs with more to say: the router does not wait for it."""
    tokenizer = _byte_tokenizer(tmp_path)

    async def says_and_hangs(worker, request, context):
        for text in ("a", "b", "#", "#c"):
            ids = [tokenizer.token_to_id(char) for char in text]
            await context.write(attention_pb2.SequenceEvent(token_ids=ids))
        await worker.release.wait()

    async def main():
        worker = kit.worker("d0", control_pb2.ROLE_BOTH, script=says_and_hangs)
        async with kit.open_lab(worker, path=str(tmp_path)) as lab:
            call = lab.call(max_tokens=20, stop=["##"], request_id=request_id)
            responses = [response async for response in call]
            assert "".join(response.text for response in responses) == "ab"
            assert sum(len(response.token_ids) for response in responses) == 4
            assert responses[-1].finish_reason == common_pb2.FINISH_REASON_STOP
            assert responses[-1].usage.completion_tokens == 4
            await worker.is_cancelled.wait()
            await lab.idle()
            assert lab.metric("requests_total", code="OK") == 1
            assert lab.metric("generated_tokens_total") == 4

    kit.run(main())


def test_stop_string_without_a_tokenizer_is_refused_by_name(kit):
    async def main():
        async with kit.open_lab() as lab:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lab.tokens(lab.call(max_tokens=2, stop=["x"]))
            error = from_rpc(caught.value)
            assert (type(error), error.field) == (InvalidRequest, "stop")

    kit.run(main())


def test_signal_handlers_of_the_process_are_left_alone(kit):
    async def main():
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        async with kit.open_lab():
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    kit.run(main())
