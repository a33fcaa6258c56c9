"""Scores prompts in both topologies: in this process, or through a prefill worker and expert workers."""

import asyncio
from collections.abc import Sequence

import grpc.aio
import numpy as np
import torch
from torch import Tensor

from cluster.config import MorayConfig
from cluster.lifecycle import check_model, start_cluster
from cluster.models import find_model
from model.precision import Precision
from model.weights import OnProgress
from wire.errors import from_rpc
from wire.frames import decode_frame
from wire.handshake import Handshake
from wire.metrics import Metrics
from wire.proto import attention_pb2
from wire.rpc import CHANNEL_OPTIONS, SCORE_METHOD
from workers.attention.build import EngineConfig, build_whole_engine
from workers.attention.requests import read_score
from workers.checkpoint import open_checkpoint
from workers.config import AttentionConfig, ComputeConfig, KvConfig

_PREFILL = "prefill-0"


def score_in_process(
    model: str,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: Precision,
    chunk_tokens: int,
    kv: KvConfig | None = None,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Tensor]]:
    """The tensors of each prompt, computed in this process with the same engine and no Ray.

    Raises:
        MorayError: the model or a prompt is wrong; names the field or tensor.
    """
    checkpoint = open_checkpoint(find_model(model).path)
    requests = [attention_pb2.ScoreRequest(token_ids=prompt, chunk_tokens=chunk_tokens) for prompt in prompts]
    specs = [read_score(request, checkpoint.config, max_chunk_tokens=chunk_tokens) for request in requests]
    config = EngineConfig(group=_group_for(prompts), compute=ComputeConfig(dtype=dtype), kv=kv or KvConfig())
    engine = build_whole_engine(
        checkpoint, config=config, metrics=Metrics("attention"), on_progress=on_progress
    )
    engine.start()
    try:
        return [engine.score(spec).result() for spec in specs]
    finally:
        engine.stop()


def score_in_cluster(
    model: str, prompts: Sequence[Sequence[int]], *, dtype: Precision, chunk_tokens: int, num_experts: int
) -> list[dict[str, Tensor]]:
    """The tensors of each prompt, from a cluster that is started for it and ended.

    Raises:
        MorayError: the model or a prompt is wrong; names the field or tensor.
    """
    config = MorayConfig.from_mapping(
        {
            "model": model,
            "name": "moray-logits",
            "compute": {"dtype": dtype},
            "expert": {"replicas": num_experts},
            "prefill": _group_for(prompts).model_dump(),
            "decode": {"replicas": 0},
            "router": {"replicas": 0},
        }
    )
    checked = check_model(config)
    handshake = Handshake(model=checked.fingerprint, page_tokens=config.kv.page_tokens)
    cluster = start_cluster(config, checked)
    try:
        status = cluster.wait_ready(deadline_s=config.controller.start_s, on_progress=lambda _: None)
        requests = [
            attention_pb2.ScoreRequest(token_ids=prompt, chunk_tokens=chunk_tokens) for prompt in prompts
        ]
        return asyncio.run(_score_all(status.addresses[_PREFILL], requests, handshake))
    finally:
        cluster.stop()


async def _score_all(
    address: str, requests: Sequence[attention_pb2.ScoreRequest], handshake: Handshake
) -> list[dict[str, Tensor]]:
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        return [await _score(channel, request, handshake) for request in requests]


async def _score(
    channel: grpc.aio.Channel, request: attention_pb2.ScoreRequest, handshake: Handshake
) -> dict[str, Tensor]:
    score: grpc.aio.UnaryStreamMultiCallable[attention_pb2.ScoreRequest, bytes] = channel.unary_stream(
        SCORE_METHOD, request_serializer=attention_pb2.ScoreRequest.SerializeToString
    )
    tensors = {}
    try:
        async for data in score(request, metadata=handshake.to_metadata()):
            frame = decode_frame(data)
            tensors[frame.meta.decode()] = torch.from_numpy(np.array(frame.tensors[0]))
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None
    return tensors


def _group_for(prompts: Sequence[Sequence[int]]) -> AttentionConfig:
    """One worker with pages enough for the longest prompt."""
    longest = max(len(prompt) for prompt in prompts)
    return AttentionConfig(replicas=1, num_pages=max(64, longest))
