"""The gRPC servicer of moray.v1.Inference."""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator

from router.config import RouterConfig
from router.front.admission import Admission
from router.front.meter import RequestMeter
from router.front.outputs import merge_streams, plan_outputs
from router.front.reply import ReplyStream, split_end
from router.front.runs import SharedRuns
from router.front.tokenizer import PromptTokenizer, TextStream, TokenizerStore
from router.front.validate import AdmissionRules, check_outputs, check_request, plan_admission
from router.requests.answers import AnswerShelf, ShelfLimits
from router.requests.roster import Roster
from router.requests.session import SessionRunner
from router.requests.types import AdmittedRequest
from wire.errors import InvalidRequest, NotReady
from wire.metrics import Metrics
from wire.proto import common_pb2, control_pb2, inference_pb2, inference_pb2_grpc
from wire.rpc import RECEIVED_KEY, Context, unary_errors

_log = logging.getLogger(__name__)


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Answers clients; all of its parts are handed in."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        roster: Roster,
        runner: SessionRunner,
        admission: Admission,
        metrics: Metrics,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._roster = roster
        self._runner = runner
        self._admission = admission
        self._metrics = metrics
        self._rng = rng
        self._tokenizers = TokenizerStore()
        limits = ShelfLimits(
            keep_s=config.keep_s, keep_requests=config.keep_requests, keep_tokens=config.keep_tokens
        )
        self._runs = SharedRuns(
            self._answer,
            admission=admission,
            shelf=AnswerShelf(limits),
            grace_s=config.resume_grace_s,
            metrics=metrics,
        )

    @unary_errors
    async def Generate(  # type: ignore[override]  # gRPC's write style, which the generated base does not know
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> None:
        """Streams new tokens.

        A request with an id of its client's own can be joined and resumed (router/front/runs.py).

        Written in gRPC's write style, not as a generator: a client that goes away while a message is being
        written then cancels this coroutine itself, and the worker's call ends in the same turn of the loop.
        """
        left_s = context.time_remaining()
        end_s = None if left_s is None else asyncio.get_running_loop().time() + left_s
        if not request.tenant:
            request.tenant = _tenant_of(context)
        is_shared = bool(request.request_id)
        door = self._admission.follow() if is_shared else self._admission.enter()
        # Whose stream breaks before its first token then knows that a router had the request.
        await context.send_initial_metadata(((RECEIVED_KEY, "1"),))
        with RequestMeter(self._metrics, context) as meter, door:
            check_outputs(request)
            answer = self._runs.follow(request, end_s=end_s) if is_shared else self._answer(request, end_s)
            async with contextlib.aclosing(answer) as messages:
                async for message in messages:
                    meter.count(message)
                    await context.write(message)

    @unary_errors
    async def Cancel(
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        """Ends a request of the caller's tenant that runs in this router, by its id."""
        key = request.tenant or _tenant_of(context), request.request_id
        return inference_pb2.CancelResponse(was_running=self._runs.cancel(key))

    @unary_errors
    async def ListModels(
        self, _request: inference_pb2.ListModelsRequest, _context: Context
    ) -> inference_pb2.ListModelsResponse:
        """The model that is served; none before the first snapshot."""
        snapshot = self._roster.snapshot
        has_model = snapshot is not None and snapshot.HasField("model")
        return inference_pb2.ListModelsResponse(models=[snapshot.model] if snapshot and has_model else [])

    @unary_errors
    async def GetCluster(
        self, _request: inference_pb2.GetClusterRequest, _context: Context
    ) -> control_pb2.ClusterSnapshot:
        """The newest snapshot. Raises NotReady before the first."""
        if self._roster.snapshot is None:
            raise NotReady(f"this router waits for {self._roster.view.waiting_for}")
        return self._roster.snapshot

    async def _answer(
        self, request: inference_pb2.GenerateRequest, end_s: float | None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        admitted, tokenizer = await self._admit(request, end_s=end_s)
        self._metrics.counter("prompt_tokens_total").inc(len(admitted.prompt_ids))
        # Only who has an id can come back and ask from any token on.
        in_pieces = bool(request.request_id)
        streams = [
            self._replies(output, tokenizer, end_s=end_s, in_pieces=in_pieces)
            for output in plan_outputs(admitted, request.n or 1)
        ]
        if len(streams) == 1:
            async with contextlib.aclosing(streams[0]) as responses:
                async for response in responses:
                    yield response
            return
        async with contextlib.aclosing(merge_streams(streams)) as numbered:
            async for output_idx, response in numbered:
                response.output_idx = output_idx
                yield response

    async def _replies(
        self,
        output: AdmittedRequest,
        tokenizer: PromptTokenizer | None,
        *,
        end_s: float | None,
        in_pieces: bool = False,
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """The messages of one output; its call to a worker has ended when this has."""
        reply = ReplyStream(output, TextStream(tokenizer))
        async with contextlib.aclosing(self._runner.run(output, end_s=end_s)) as batches:
            async for batch in batches:
                for piece in batch.split() if in_pieces else (batch,):
                    if (response := reply.take(piece)) is None:
                        continue
                    for part in split_end(response) if in_pieces else (response,):
                        yield part
                    if response.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED:
                        # A stop string may end it before the worker does, whose call ends with `batches`.
                        return

    async def _admit(
        self, request: inference_pb2.GenerateRequest, *, end_s: float | None
    ) -> tuple[AdmittedRequest, PromptTokenizer | None]:
        wait_s = self._config.ready_wait_s
        if end_s is not None:
            wait_s = min(wait_s, max(end_s - asyncio.get_running_loop().time(), 0.0))
        view = await self._roster.wait_for(lambda view: view.model is not None, timeout_s=wait_s)
        if view.model is None:
            raise NotReady(f"this router waits for {view.waiting_for}")
        check_request(request, view.model)
        if request.WhichOneof("prompt") == "text":
            prompt_ids = await self._tokenizers.encode(request.text, view.model)
        else:
            prompt_ids = tuple(request.tokens.ids)
        rules = AdmissionRules(model=view.model, default_max_tokens=self._config.default_max_tokens)
        admitted = plan_admission(request, prompt_ids, rules=rules, rng=self._rng)
        _log.debug("request %s: %d prompt tokens", admitted.request_id, len(prompt_ids))
        tokenizer = await self._tokenizers.find(view.model)
        if admitted.stop and tokenizer is None:
            wanted = "wanted none, because the router has no tokenizer of this model"
            raise InvalidRequest(f"stop: {wanted}; got {len(admitted.stop)} strings", field="stop")
        return admitted, tokenizer


def _tenant_of(context: Context) -> str:
    """The tenant that the call's metadata names; a gateway may set it for its clients."""
    return next((str(value) for key, value in context.invocation_metadata() or () if key == "x-tenant"), "")
