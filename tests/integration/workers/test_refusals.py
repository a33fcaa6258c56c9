"""What workers refuse over the wire: strangers, wrong requests, damaged frames, broken checkpoints."""

import asyncio
import itertools
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from router.experts.connect import TransportKind, make_transport
from tests.integration.workers.lab import HOST, Cluster, drain, open_cluster, run_test
from tests.reference_data import checkpoint_dir, goldens
from wire.errors import (
    PREFILL_FIELD,
    FrameInvalid,
    HandshakeRefused,
    InvalidRequest,
    ModelBroken,
    MorayError,
    Overloaded,
    PromptTooLong,
    WorkerLost,
    from_rpc,
)
from wire.frames import Frame, FrameKind, decode_frame, encode_frame
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.proto import attention_pb2, control_pb2, expert_pb2
from wire.rpc import ATTENTION_FRAMES, FORWARD_METHOD, SCORE_METHOD, SERVER_OPTIONS, abort_with
from wire.same_host import Block
from workers.attention.build import EngineConfig
from workers.attention.server import AttentionServer, AttentionSettings
from workers.config import AttentionConfig, DispatchConfig
from workers.expert.server import ExpertServer, ExpertSettings

GOLDEN = goldens("default")[1]
ROWS = np.zeros((1, 128), np.float32)
FORWARD = Frame(
    kind=FrameKind.FORWARD,
    tensors=(ROWS, np.zeros(1, np.int32), np.zeros(1, np.int32), np.ones(1, np.float32)),
    call_id=5,
    layer_idx=1,
)


async def forward(cluster: Cluster, handshake: Handshake, data: bytes | None = None) -> list[Frame]:
    """The answers of an expert worker to one raw frame."""
    call = cluster.channel(cluster.experts["expert-0"]).stream_stream(FORWARD_METHOD)
    try:
        answers = call(iter([data or encode_frame(FORWARD)]), metadata=handshake.to_metadata())
        return [decode_frame(answer) async for answer in answers]
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None


def test_damaged_shared_memory_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls and answers in shared memory are damaged now and then; their bodies are summed."""
    num_written, write = itertools.count(), Block.write

    def damage(block: Block, parts: Any, *, num_bytes: int) -> bool:
        is_written = write(block, parts, num_bytes=num_bytes)
        if next(num_written) in {5, 26, 47}:
            block.memory[num_bytes // 2] ^= 64
        return is_written

    async def main() -> None:
        dispatch = DispatchConfig(local_checksum=True, quarantine_s=0.01)
        async with open_cluster(num_experts=1, dispatch=dispatch) as cluster:
            await cluster.start_expert("expert-1", range(16))
            await cluster.push()
            monkeypatch.setattr(Block, "write", damage)
            greedy = GOLDEN.tensor("greedy").tolist()
            assert await cluster.generate(GOLDEN.prompt, max_tokens=len(greedy)) == greedy
            refused = [
                cluster.metric(w, "dispatch_retries_total", reason="FrameInvalid") for w in cluster.attention
            ]
            assert 0 < sum(refused) <= 3
            assert next(num_written) > 47

    run_test(main())


async def score(cluster: Cluster, handshake: Handshake) -> Any:
    request = attention_pb2.ScoreRequest(token_ids=[5])
    return await cluster.frames("decode-0", SCORE_METHOD, request, metadata=handshake.to_metadata())


async def prefill(cluster: Cluster, handshake: Handshake) -> Any:
    return await cluster.prefill([5], metadata=handshake.to_metadata())


async def generate(cluster: Cluster, handshake: Handshake) -> Any:
    return await cluster.generate([5], metadata=handshake.to_metadata())


async def load_slots(cluster: Cluster, handshake: Handshake) -> Any:
    worker = cluster.experts["expert-0"]
    try:
        return await cluster.load(worker, worker.slots, metadata=handshake.to_metadata())
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None


ATTENTION_CALLS = [generate, prefill, score]
Call = Callable[[Cluster, Handshake], Awaitable[Any]]


@pytest.mark.parametrize(
    ("call", "wrong", "what"),
    [
        *((c, {"model": "other"}, "model differs") for c in (*ATTENTION_CALLS, forward, load_slots)),
        *((c, {"protocol": 99}, "protocol version differs") for c in (*ATTENTION_CALLS, forward, load_slots)),
        *((c, {"page_tokens": 16}, "page_tokens differs") for c in ATTENTION_CALLS),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_stranger_is_refused_by_name(call: Call, wrong: dict[str, Any], what: str) -> None:
    async def main() -> None:
        async with open_cluster(num_experts=1) as cluster:
            with pytest.raises(HandshakeRefused, match=what):
                await call(cluster, replace(cluster.handshake, **wrong))
            assert await call(cluster, cluster.handshake)

    run_test(main())


@pytest.mark.parametrize("kind", ["grpc", "local"])
def test_transport_of_a_stranger_gets_the_refusal_and_not_a_lost_worker(kind: TransportKind) -> None:
    """A lost worker would be tried again until the deadline; another model never mends."""

    async def main() -> None:
        async with open_cluster(num_experts=1) as cluster:
            transport = make_transport(kind, replace(cluster.handshake, model="other"), Metrics("attention"))
            worker = cluster.experts["expert-0"]
            transport.update_members(
                [
                    control_pb2.Member(
                        worker_id=worker.worker_id, role=control_pb2.ROLE_EXPERT, address=worker.address
                    )
                ]
            )
            errors = [transport.send(name, FORWARD) for name in ("expert-0", "nobody")]
            with pytest.raises(HandshakeRefused):
                await asyncio.wrap_future(errors[0])
            with pytest.raises(WorkerLost, match="nobody is not in the cluster"):
                await asyncio.wrap_future(errors[1])
            await asyncio.to_thread(transport.close)

    run_test(main())


def test_prefill_worker_of_another_model_is_told_to_the_client() -> None:
    async def main() -> None:
        async with open_cluster(num_experts=1) as cluster, open_cluster("sparse", num_experts=1) as other:
            address = other.attention["prefill-0"].address
            with pytest.raises(HandshakeRefused, match="model differs"):
                await drain(cluster.open_generate([5], prefill="", prefill_address=address))
            await cluster.is_empty("decode-0")

    run_test(main())


async def _is_full(_request: attention_pb2.SequenceRequest, context: Any) -> None:
    await abort_with(context, Overloaded("no pages here", retry_after_s=2.5))


def test_full_prefill_worker_is_told_as_such_with_its_delay() -> None:
    async def main() -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(
            _is_full, request_deserializer=attention_pb2.SequenceRequest.FromString
        )
        handlers = grpc.method_handlers_generic_handler(ATTENTION_FRAMES, {"Prefill": handler})
        server.add_generic_rpc_handlers((handlers,))
        address = f"{HOST}:{server.add_insecure_port(f'{HOST}:0')}"
        await server.start()
        async with open_cluster(num_experts=1) as cluster:
            with pytest.raises(Overloaded, match="no pages here") as caught:
                await drain(cluster.open_generate([5], prefill="", prefill_address=address))
            assert (caught.value.field, caught.value.retry_after_s) == (PREFILL_FIELD, 2.5)
            await cluster.is_empty("decode-0")
        await server.stop(None)

    run_test(main())


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"prompt": []}, InvalidRequest, "tokens"),
        ({"prompt": [320]}, InvalidRequest, "tokens"),
        ({"prompt": [5], "max_tokens": 0}, InvalidRequest, "max_tokens"),
        ({"prompt": [5] * 500, "max_tokens": 13}, PromptTooLong, "max_tokens"),
        ({"prompt": [5], "sampling": {"top_p": 2.0}}, InvalidRequest, "sampling.top_p"),
        ({"prompt": [5], "prompt_tokens": 2}, InvalidRequest, "prompt_tokens"),
        ({"prompt": [5] * 90, "max_tokens": 8}, PromptTooLong, "max_tokens"),
    ],
    ids=str,
)
def test_wrong_request_is_refused_by_field(
    fields: dict[str, Any], error: type[MorayError], field: str
) -> None:
    """The decode worker has 24 pages: 96 tokens."""

    async def main() -> None:
        attention = {"prefill-0": {}, "decode-0": {"num_pages": 24}}
        async with open_cluster(num_experts=1, attention=attention) as cluster:
            with pytest.raises(error) as caught:
                await cluster.generate(fields.pop("prompt"), **fields)
            assert caught.value.field == field

    run_test(main())


def test_prompt_that_only_the_prefill_worker_cannot_hold_is_refused() -> None:
    async def main() -> None:
        attention = {"prefill-0": {"num_pages": 4}, "decode-0": {}}
        async with open_cluster(num_experts=1, attention=attention) as cluster:
            with pytest.raises(PromptTooLong, match="needs 5 KV pages of 4 tokens, the worker has 4"):
                await cluster.generate([5] * 17)
            await cluster.is_empty("decode-0")

    run_test(main())


def test_damaged_forward_frame_is_refused() -> None:
    async def main() -> None:
        async with open_cluster(num_experts=1) as cluster:
            data = bytearray(encode_frame(FORWARD))
            data[-9] ^= 1
            with pytest.raises(FrameInvalid, match="checksum"):
                await forward(cluster, cluster.handshake, bytes(data))
            assert [f.kind for f in await forward(cluster, cluster.handshake)] == [FrameKind.PARTIAL]

    run_test(main())


def test_wrong_forward_frame_is_answered_with_its_error() -> None:
    async def main() -> None:
        async with open_cluster(num_experts=1) as cluster:
            wrong = encode_frame(replace(FORWARD, layer_idx=7))
            (reply,) = await forward(cluster, cluster.handshake, wrong)
            assert (reply.kind, reply.call_id) == (FrameKind.ERROR, 5)
            assert reply.meta.startswith(b"ExpertNotLoaded: layer 7")

    run_test(main())


@pytest.mark.parametrize(
    ("slots", "error", "what"),
    [
        ([(1, 0, 16)], ModelBroken, r"model\.layers\.1\.mlp\.experts\.16"),
        ([(0, 0, 1)], ModelBroken, r"model\.layers\.0\.mlp\.experts\.1"),
        ([(9, 0, 1)], ModelBroken, r"model\.layers\.9\.mlp\.experts\.1"),
        ([(1, 0, 1), (1, 0, 2)], InvalidRequest, "name one slot twice"),
    ],
    ids=str,
)
def test_slots_that_cannot_be_loaded_are_refused_and_change_nothing(
    slots: list[tuple[int, int, int]], error: type[MorayError], what: str
) -> None:
    async def main() -> None:
        async with open_cluster(num_experts=1) as cluster:
            worker = cluster.experts["expert-0"]
            asked = [
                expert_pb2.SlotAssignment(layer_idx=layer, slot_idx=slot, expert_idx=expert)
                for layer, slot, expert in slots
            ]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.load(worker, asked)
            with pytest.raises(error, match=what):
                raise from_rpc(caught.value)
            assert await cluster.generate(GOLDEN.prompt, max_tokens=16) == GOLDEN.tensor("greedy").tolist()

    run_test(main())


def test_slot_report_says_what_is_held() -> None:
    async def main() -> None:
        async with open_cluster(num_experts=2) as cluster:
            worker = cluster.experts["expert-1"]
            report = await cluster.load(worker, worker.slots[:3])
            assert (report.worker_id, list(report.slots)) == ("expert-1", worker.slots[:3])
            assert report.table_version == cluster.table_version + 1
            # Three experts of three 128 x moe_intermediate_size matrices, BF16 as the checkpoint has them.
            assert report.weight_bytes == 3 * 3 * 128 * cluster.config.moe_intermediate_size * 2
            assert cluster.metric("expert-1", "weights_bytes") == report.weight_bytes
            await cluster.load(worker, worker.slots)

    run_test(main())


@pytest.fixture(params=["missing", "misshapen"])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint with one wrong tensor of attention and one of an expert; the name of the first."""
    folder = Path(shutil.copytree(checkpoint_dir("default"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.self_attn.kv_b_proj.weight"
    wrong = tensors.pop(name)[:-1].contiguous()
    save_file(
        tensors if request.param == "missing" else {**tensors, name: wrong}, folder / "model.safetensors"
    )
    return folder, name


def test_broken_checkpoint_is_refused_before_anything_listens(broken: tuple[Path, str]) -> None:
    folder, name = broken
    settings = AttentionSettings(
        engine=EngineConfig(group=AttentionConfig()),
        dispatch=DispatchConfig(),
        controller_address="127.0.0.1:1",
        host=HOST,
    )
    with pytest.raises(ModelBroken, match=name.replace(".", r"\.")):
        AttentionServer("both-0", checkpoint_dir=folder, settings=settings)
    with pytest.raises(ModelBroken, match=name.replace(".", r"\.")):
        ExpertServer("expert-0", checkpoint_dir=folder, settings=ExpertSettings(host=HOST))
