"""The gRPC server of an attention worker: a shell around the engine.

The asyncio loop belongs to the network; the engine thread is reached through commands and answers through
`call_soon_threadsafe`. Cancelling a call cancels the sequence, and with it the prefill it waits for.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from router.experts.connect import make_transport
from router.experts.dispatcher import DispatchRules, ExpertDispatcher
from router.experts.payload import PayloadForms
from router.experts.peers import PeerRules
from router.experts.table import table_from_proto
from wire.errors import MorayError
from wire.frames import Frame, FrameKind, encode_frame
from wire.handshake import Handshake, check_handshake
from wire.metrics import Metrics
from wire.proto import attention_pb2, attention_pb2_grpc, control_pb2
from wire.rpc import (
    ATTENTION_FRAMES,
    SERVER_OPTIONS,
    Context,
    stream_errors,
    unary_errors,
)
from wire.watch import ClusterWatch
from workers.attention.build import EngineConfig, build_engine
from workers.attention.checkup import Checkup
from workers.attention.drain import Door
from workers.attention.event_streams import EventStreams, StreamTaker
from workers.attention.grammar import GrammarCompiler
from workers.attention.health import HealthRules, Verdict
from workers.attention.kv_receive import KvReceiver
from workers.attention.kv_send import KvSender
from workers.attention.kv_stage import KvStage
from workers.attention.moe import RemoteExperts
from workers.attention.nixl_link import open_link
from workers.attention.relay import EventRelay
from workers.attention.reports import Reports
from workers.attention.requests import read_grammar, read_score, read_sequence, write_event
from workers.attention.types import (
    Admitted,
    Event,
    Failed,
    NewToken,
    PromptLogprobs,
    RowsUnwanted,
    SequenceSpec,
    Source,
)
from workers.checkpoint import open_checkpoint
from workers.config import DispatchConfig, KvConfig
from workers.packing import make_packing
from workers.progress import log_progress

_log = logging.getLogger(__name__)

_SERVICE = attention_pb2.DESCRIPTOR.services_by_name["Attention"].full_name
_WAITS_PER_LEASE = 4
"""Rows wait this part of the lease for room in the stage: then a plain frame is their sign of life."""
_FAREWELL_S = 2.0
"""What calls that were sent away get to end."""


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """What an attention worker is told at start."""

    engine: EngineConfig
    dispatch: DispatchConfig
    controller_address: str
    host: str
    """Address to listen on and to be reached at."""


class AttentionServer(attention_pb2_grpc.AttentionServicer):
    """One attention worker of any role."""

    def __init__(self, worker_id: str, *, checkpoint_dir: Path, settings: AttentionSettings) -> None:
        """Loads every weight but the routed experts.

        Raises:
            ModelBroken: the checkpoint cannot be served; names the file or tensor.
            ConfigError: NIXL is wanted and cannot start.
        """
        checkpoint = open_checkpoint(checkpoint_dir)
        packing = make_packing(settings.engine.group, settings.engine.compute)
        self._config = checkpoint.config
        self._settings = settings
        self._link = open_link(worker_id, settings.engine.kv)
        self.metrics = Metrics("attention")
        self._grammars = GrammarCompiler(
            checkpoint_dir,
            vocab_tokens=self._config.vocab_size,
            eos_token_id=self._config.eos_token_id,
            metrics=self.metrics,
        )
        page_tokens = settings.engine.kv.page_tokens
        self._handshake = Handshake(model=checkpoint.fingerprint(), page_tokens=page_tokens)
        dispatch = settings.dispatch
        self._transport = make_transport(
            dispatch.transport,
            self._handshake,
            self.metrics,
            local_checksum=dispatch.local_checksum,
            torch_backend=dispatch.torch_backend,
        )
        self._dispatcher = ExpertDispatcher(
            self._transport,
            rules=DispatchRules(
                deadline_s=dispatch.deadline_s,
                peers=PeerRules(attempt_s=dispatch.attempt_s, quarantine_s=dispatch.quarantine_s),
            ),
            metrics=self.metrics,
            forms=PayloadForms(rows=dispatch.payload, sums=dispatch.combine),
        )
        experts = RemoteExperts(self._dispatcher)
        self._engine = build_engine(
            checkpoint,
            experts,
            packing,
            config=settings.engine,
            metrics=self.metrics,
            on_progress=log_progress(_log, f"tensors of {worker_id}"),
        )
        self._relay = EventRelay(self._on_event)
        self._streams = EventStreams()
        self._checkup = Checkup(
            self._engine,
            relay=self._relay,
            rules=HealthRules(
                probe_s=settings.engine.group.probe_s,
                stuck_s=settings.engine.group.stuck_s,
                hopeless_s=settings.engine.group.stuck_s + dispatch.deadline_s,
            ),
            on_verdict=self._on_verdict,
        )
        self._health = health.aio.HealthServicer()
        self._door = Door(worker_id)
        self._watch = ClusterWatch(
            settings.controller_address, member_id=worker_id, on_snapshot=self._on_snapshot
        )
        self._reports = Reports(
            settings.controller_address,
            member_id=worker_id,
            table_in_use=self._table_in_use,
            verdict=lambda: self._checkup.verdict,
        )
        self._table_version = 0
        """Of the table built last; most snapshots carry it again."""
        self._watching: list[asyncio.Task[None]] = []
        self._setting_health: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._sender, self._receiver = self._open_handover(settings.engine.kv)

    async def start(self, port: int = 0) -> int:
        """Listens and follows the controller; returns the port."""
        self._engine.start()
        self._watching = [
            asyncio.create_task(self._watch.run(), name="watch"),
            asyncio.create_task(self._reports.run(), name="reports"),
            asyncio.create_task(self._checkup.run(), name="checkup"),
        ]
        await self._set_health()
        server = grpc.aio.server(options=SERVER_OPTIONS)
        attention_pb2_grpc.add_AttentionServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        handlers: dict[str, grpc.RpcMethodHandler[object, object]] = {
            "Prefill": grpc.unary_stream_rpc_method_handler(
                self._prefill, request_deserializer=attention_pb2.SequenceRequest.FromString
            ),
            "Score": grpc.unary_stream_rpc_method_handler(
                self._score, request_deserializer=attention_pb2.ScoreRequest.FromString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(ATTENTION_FRAMES, handlers),))
        bound_port = server.add_insecure_port(f"{self._settings.host}:{port}")
        await server.start()
        self._server = server
        return bound_port

    async def drain(self) -> None:
        """Takes nothing new; lets what runs finish within the group's `drain_s`, and ends the rest."""
        self._door.close()
        self._checkup.leave()
        num_inside = self._door.num_inside
        num_sent_away = 0
        if not await self._door.wait_empty(self._settings.engine.group.drain_s):
            num_sent_away = self._door.send_away()
            await self._door.wait_empty(_FAREWELL_S)
        self.metrics.counter("drained_total", result="finished").inc(num_inside - num_sent_away)
        self.metrics.counter("drained_total", result="sent_away").inc(num_sent_away)
        _log.info("drained: %d of %d requests were sent away", num_sent_away, num_inside)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Ends open calls, the engine and every channel; the port is free afterwards."""
        self._door.close()
        await self._door.wait_empty(grace_s)
        self._streams.close()
        if self._server is not None:
            await self._server.stop(grace_s)
        for task in self._watching:
            await _cancel(task)
        self._dispatcher.give_up()
        await asyncio.to_thread(self._engine.stop)
        await asyncio.to_thread(self._transport.close)
        await self._receiver.close()
        if self._link is not None:
            await asyncio.to_thread(self._link.close)

    async def check_integrity(self) -> None:
        """Checks the page accounts, and those of the stage.

        Raises:
            RuntimeError: a page is lost, shared or owned by nobody; a piece of the stage is lent twice.
        """
        if self._sender.stage is not None:
            self._sender.stage.check_integrity()
        await asyncio.wrap_future(self._engine.check_integrity())

    @stream_errors
    async def Generate(
        self, request: attention_pb2.SequenceRequest, context: Context
    ) -> AsyncIterator[attention_pb2.SequenceEvent]:
        """Streams the new tokens of one sequence."""
        check_handshake(self._handshake, context.invocation_metadata() or ())
        spec = read_sequence(request, self._config, is_prefill_only=False)
        if (grammar := read_grammar(request.sampling)) is not None:
            matcher = await asyncio.to_thread(self._grammars.compile, grammar)
            spec = replace(spec, matcher=matcher)
        async with contextlib.AsyncExitStack() as stack:
            async for event in self._run(spec, request, stack):
                if isinstance(event, NewToken | PromptLogprobs) and not request.stream_id:
                    yield write_event(event)

    @stream_errors
    async def Follow(
        self, request: attention_pb2.FollowRequest, context: Context
    ) -> AsyncIterator[attention_pb2.EventBatch]:
        """Streams what all sequences tell that name this stream."""
        check_handshake(self._handshake, context.invocation_metadata() or ())
        async with contextlib.aclosing(self._streams.follow(request.stream_id)) as batches:
            async for batch in batches:
                yield batch

    @unary_errors
    async def _prefill(self, request: attention_pb2.SequenceRequest, context: Context) -> None:
        """Writes the cache rows of a prompt, then the first token."""
        check_handshake(self._handshake, context.invocation_metadata() or ())
        spec = read_sequence(request, self._config, is_prefill_only=True)
        await self._sender.send(spec, request.transfer, context, nixl_bytes=request.nixl_bytes)

    @stream_errors
    async def _score(self, request: attention_pb2.ScoreRequest, context: Context) -> AsyncIterator[bytes]:
        """Streams the tensors of one scored prompt."""
        check_handshake(self._handshake, context.invocation_metadata() or ())
        spec = read_score(request, self._config, max_chunk_tokens=self._settings.engine.group.max_step_tokens)
        for name, tensor in (await asyncio.wrap_future(self._engine.score(spec))).items():
            yield encode_frame(Frame(kind=FrameKind.SCORES, tensors=(tensor.numpy(),), meta=name.encode()))

    async def _run(
        self, spec: SequenceSpec, request: attention_pb2.SequenceRequest, stack: contextlib.AsyncExitStack
    ) -> AsyncIterator[Event]:
        """The events of a sequence up to its last; leaving `stack` gives up what is not finished."""
        came_s = asyncio.get_running_loop().time()
        events: asyncio.Queue[Event] = asyncio.Queue()
        stack.enter_context(self._door.enter(spec.source, lambda error: events.put_nowait(Failed(error))))
        stack.callback(self._engine.cancel, spec)
        stream = self._streams.find(request.stream_id)
        taker = events if stream is None else StreamTaker(stream, request.sequence_number, events)
        self._engine.submit(spec, self._relay.sink(taker))
        pulling: asyncio.Task[None] | None = None
        while True:
            event = await events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Admitted) and spec.source is Source.REMOTE:
                pulling = asyncio.create_task(
                    self._receiver.receive(
                        spec,
                        request,
                        first_row=event.num_cached_tokens,
                        came_s=came_s,
                        on_error=lambda error: events.put_nowait(Failed(error)),
                    ),
                    name=f"pull-{spec.request_id}",
                )
                stack.push_async_callback(_cancel, pulling)
            if isinstance(event, RowsUnwanted) and pulling is not None:
                pulling.cancel()
            yield event
            if isinstance(event, NewToken) and event.finish:
                return

    def _open_handover(self, kv: KvConfig) -> tuple[KvSender, KvReceiver]:
        sender = KvSender(
            engine=self._engine,
            relay=self._relay,
            door=self._door,
            lease_s=kv.lease_s,
            metrics=self.metrics,
            stage=None if self._link is None else KvStage(self._link, wait_s=kv.lease_s / _WAITS_PER_LEASE),
        )
        receiver = KvReceiver(
            engine=self._engine,
            handshake=self._handshake,
            lease_s=kv.lease_s,
            metrics=self.metrics,
            link=self._link,
        )
        return sender, receiver

    def _on_snapshot(self, snapshot: control_pb2.ClusterSnapshot) -> None:
        self._transport.update_members(snapshot.members)
        experts = [member for member in snapshot.members if member.role == control_pb2.ROLE_EXPERT]
        has_experts = any(member.address for member in experts)
        if snapshot.HasField("table") and snapshot.table.version != self._table_version:
            try:
                self._dispatcher.set_table(table_from_proto(snapshot.table))
                self._table_version = snapshot.table.version
                self._reports.notice_table()
            except MorayError:
                _log.exception("refused routing table %d; keeping the last one", snapshot.table.version)
        self._checkup.on_cluster(has_table=self._table_version > 0, has_experts=has_experts)

    @property
    def trouble(self) -> str:
        """Why it takes no requests now; "" = it does."""
        return self._checkup.verdict.trouble

    def _on_event(self, event: Event) -> None:
        self._checkup.on_event(event)

    def _on_verdict(self, verdict: Verdict) -> None:
        _log.info("takes no requests: %s" if verdict.trouble else "takes requests%s", verdict.trouble)
        self._reports.notice_verdict()
        self._setting_health = asyncio.get_running_loop().create_task(self._set_health())

    async def _set_health(self) -> None:
        states = health_pb2.HealthCheckResponse
        status = states.NOT_SERVING if self.trouble else states.SERVING
        for service in ("", _SERVICE):
            await self._health.set(service, status)

    async def _table_in_use(self) -> int:
        version = self._table_version
        await asyncio.wrap_future(self._engine.wait_step())
        return version


async def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
