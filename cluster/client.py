"""A client of the gRPC API, as the command line uses it."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio

from wire.errors import ERROR_KEY, DeadlinePassed, MorayError, NotReady, WorkerLost, from_rpc
from wire.proto import common_pb2, control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from wire.rpc import CHANNEL_OPTIONS, RECEIVED_KEY

_VIEW_S = 10.0
"""Seconds for a router to show its view of the cluster."""
_CANCEL_S = 2.0
_FIRST_RESUME_S = 0.1
_MAX_RESUME_S = 2.0


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to generate; None leaves the choice to the router."""

    model: str = ""
    n: int = 1
    """Outputs of each prompt."""
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    """Strings that end the text."""
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    logprobs: int | None = None
    """Most probable tokens to tell of beside each new one; None = tell nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt."""
    json_schema: str | None = None
    """What the text must be; at most one of these three."""
    regex: str | None = None
    grammar: str | None = None
    seed: int | None = None
    priority: int = 0
    """Higher goes first where requests wait."""
    tenant: str = ""
    """Who pays; empty = nobody in particular."""
    deadline_s: float | None = None
    num_resumes: int = 10
    """Times that an answer whose stream broke is asked for again, from the next token on."""


@dataclass
class Answer:
    """One whole output."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    """One a token, where asked for."""
    prompt_logprobs: list[common_pb2.TokenLogprobs] = field(default_factory=list)
    """One a token of the prompt, where asked for; the first is empty."""

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        """The next message."""
        self.token_ids.extend(response.token_ids)
        self.text += response.text
        self.logprobs.extend(response.logprobs)
        self.prompt_logprobs.extend(response.prompt_logprobs)


def make_request(prompt: str | Sequence[int], options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """The request for a text or for token ids."""
    sampling = common_pb2.SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=options.logit_bias,
        min_tokens=options.min_tokens,
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        seed=options.seed,
    )
    for kind in ("json_schema", "regex", "grammar"):
        if getattr(options, kind) is not None:
            setattr(sampling, kind, getattr(options, kind))
    request = inference_pb2.GenerateRequest(
        model=options.model,
        sampling=sampling,
        max_tokens=options.max_tokens,
        ignore_eos=options.ignore_eos,
        stop_token_ids=options.stop_token_ids,
        stop=options.stop,
        n=options.n if options.n != 1 else None,
        priority=options.priority,
        tenant=options.tenant,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.CopyFrom(inference_pb2.TokenIds(ids=prompt))
    return request


class InferenceClient:
    """Requests to one router; use as an async context manager."""

    def __init__(self, address: str, *, has_own_connection: bool = False) -> None:
        """Connects when first asked.

        Args:
            address: host:port of the router.
            has_own_connection: share none with other clients of this process, as gRPC would.
        """
        self._address = address
        own = (("grpc.use_local_subchannel_pool", 1),) if has_own_connection else ()
        self._channel = grpc.aio.insecure_channel(address, options=(*CHANNEL_OPTIONS, *own))
        self._stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(self._channel)
        self._cancels: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "InferenceClient":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.gather(*self._cancels)
        await self._channel.close()

    async def stream(
        self, prompt: str | Sequence[int], options: GenerateOptions
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """The messages of one answer, numbered without gap or repeat even where its stream broke.

        Leaving it before its end cancels the request.

        Raises:
            MorayError: what the cluster answered instead.
        """
        request = make_request(prompt, options)
        request.request_id = uuid.uuid4().hex if options.num_resumes else ""
        next_idxs: dict[int, int] = {}
        loop = asyncio.get_running_loop()
        end_s = None if options.deadline_s is None else loop.time() + options.deadline_s
        has_begun = False
        for resume_idx in itertools.count():
            call = self._stub.Generate(request, timeout=None if end_s is None else end_s - loop.time())
            has_ended = False
            try:
                async for response in call:
                    is_last = response.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED
                    next_idx = response.first_idx + len(response.token_ids) + is_last
                    next_idxs[response.output_idx] = next_idx
                    yield response
                has_ended = True
                return
            except grpc.aio.AioRpcError as error:
                has_ended = True
                has_begun = has_begun or bool(next_idxs) or await _is_received(call)
                if not has_begun or resume_idx == options.num_resumes or not _is_broken(error):
                    raise _router_error(error, self._address, has_begun=has_begun) from None
            finally:
                call.cancel()
                if request.request_id and not has_ended:
                    self._cancel_soon(request)
            request.resume_each[:] = [next_idxs.get(idx, 0) for idx in range(options.n)]
            await asyncio.sleep(min(_FIRST_RESUME_S * 2**resume_idx, _MAX_RESUME_S))

    def _cancel_soon(self, request: inference_pb2.GenerateRequest) -> None:
        asked = inference_pb2.CancelRequest(request_id=request.request_id, tenant=request.tenant)
        task = asyncio.get_running_loop().create_task(self._cancel(asked))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancel(self, asked: inference_pb2.CancelRequest) -> None:
        # Where this does not arrive, the router ends the request itself when its grace time is over.
        # UsageError: the channel is closed.
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError):
            await self._stub.Cancel(asked, timeout=_CANCEL_S)

    async def answer(self, prompt: str | Sequence[int], options: GenerateOptions) -> list[Answer]:
        """The `options.n` whole outputs of a prompt.

        Raises:
            MorayError: what the cluster answered instead.
        """
        answers = [Answer() for _ in range(options.n)]
        async for response in self.stream(prompt, options):
            answers[response.output_idx].add(response)
        return answers

    async def answers(self, prompts: Sequence[str | Sequence[int]], options: GenerateOptions) -> list[Answer]:
        """The outputs of several prompts, all asked at once; those of one prompt stand together.

        Raises:
            MorayError: of the first prompt that failed.
        """
        of_prompts = await asyncio.gather(*(self.answer(prompt, options) for prompt in prompts))
        return [answer for answers in of_prompts for answer in answers]

    async def tokens(self, prompt: str | Sequence[int], options: GenerateOptions) -> list[int]:
        """All new tokens of the first output.

        Raises:
            MorayError: what the cluster answered instead.
        """
        return (await self.answer(prompt, options))[0].token_ids

    async def all_tokens(
        self, prompts: Sequence[str | Sequence[int]], options: GenerateOptions
    ) -> list[list[int]]:
        """The new tokens of all outputs of several prompts, asked at once.

        Raises:
            MorayError: of the first prompt that failed.
        """
        return [answer.token_ids for answer in await self.answers(prompts, options)]

    async def cluster(self) -> control_pb2.ClusterSnapshot:
        """The router's view of the cluster.

        Raises:
            MorayError: what the router answered instead.
        """
        try:
            return await self._stub.GetCluster(inference_pb2.GetClusterRequest(), timeout=_VIEW_S)
        except grpc.aio.AioRpcError as error:
            raise _router_error(error, self._address) from None


async def shut_down(controller_address: str, *, deadline_s: float) -> None:
    """Asks a controller to end its cluster; returns when every member is gone.

    Raises:
        MorayError: nothing answers there, or not in time.
    """
    async with grpc.aio.insecure_channel(controller_address, options=CHANNEL_OPTIONS) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        try:
            await stub.Shutdown(control_pb2.ShutdownRequest(), timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            raise _controller_error(error, controller_address) from None


async def scale(
    controller_address: str, role: "control_pb2.Role.ValueType", num_workers: int, *, deadline_s: float
) -> int:
    """Gives a role of a running cluster another number of workers; the routing table's version then.

    Raises:
        MorayError: nothing answers there, the number cannot be, or it is not so in time.
    """
    request = control_pb2.ScaleRequest(role=role, num_workers=num_workers)
    async with grpc.aio.insecure_channel(controller_address, options=CHANNEL_OPTIONS) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        try:
            return (await stub.Scale(request, timeout=deadline_s)).table_version
        except grpc.aio.AioRpcError as error:
            raise _controller_error(error, controller_address) from None


async def set_role(
    controller_address: str, worker_id: str, role: "control_pb2.Role.ValueType", *, deadline_s: float
) -> int:
    """Has an attention worker of a running cluster work in another role; the snapshot that says so.

    Raises:
        MorayError: nothing answers there, or the role cannot be.
    """
    request = control_pb2.SetRoleRequest(worker_id=worker_id, role=role)
    async with grpc.aio.insecure_channel(controller_address, options=CHANNEL_OPTIONS) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        try:
            return (await stub.SetRole(request, timeout=deadline_s)).snapshot_version
        except grpc.aio.AioRpcError as error:
            raise _controller_error(error, controller_address) from None


async def drain(controller_address: str, node: str, *, deadline_s: float) -> list[str]:
    """Has the attention workers of a running cluster leave a node; those that did.

    Raises:
        MorayError: nothing answers there, or there is no such node.
    """
    async with grpc.aio.insecure_channel(controller_address, options=CHANNEL_OPTIONS) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        try:
            done = await stub.Drain(control_pb2.DrainRequest(node=node), timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            raise _controller_error(error, controller_address) from None
        return list(done.worker_ids)


async def rebalance(
    controller_address: str, request: control_pb2.RebalanceRequest, *, deadline_s: float
) -> control_pb2.RebalanceResponse:
    """Has a running cluster place its experts anew.

    Raises:
        MorayError: nothing answers there, or it could not be done.
    """
    async with grpc.aio.insecure_channel(controller_address, options=CHANNEL_OPTIONS) as channel:
        stub: control_pb2_grpc.ControlAsyncStub = control_pb2_grpc.ControlStub(channel)
        try:
            return await stub.Rebalance(request, timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            raise _controller_error(error, controller_address) from None


def _controller_error(error: grpc.aio.AioRpcError, address: str) -> MorayError:
    """What a controller answered; or, when it was the connection that failed, where to."""
    if _is_unreachable(error):
        return NotReady(f"no controller answers at {address} ({_cause(error)}); its cluster may be gone")
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlinePassed(f"not done before the deadline; the controller at {address} goes on with it")
    return from_rpc(error)


def _router_error(error: grpc.aio.AioRpcError, address: str, *, has_begun: bool = False) -> MorayError:
    """What a router answered; or, when it was the connection that failed, where to and what to do."""
    if _is_unreachable(error):
        if has_begun:
            return WorkerLost(
                f"the router at {address} went away ({_cause(error)}): no whole answer; ask again"
            )
        hint = "start a cluster with `moray up`, or name a router by --address or MORAY_ADDRESS"
        return NotReady(f"no router answers at {address} ({_cause(error)}); {hint}")
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlinePassed(f"no whole answer from {address} before the deadline")
    return from_rpc(error)


async def _is_received(
    call: "grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]",
) -> bool:
    """Whether a router had a request whose call failed."""
    try:
        return any(key == RECEIVED_KEY for key, _ in await call.initial_metadata())
    except grpc.aio.AioRpcError:
        return False


def _is_broken(error: grpc.aio.AioRpcError) -> bool:
    """Whether the same request may go on: the connection broke, or the router it ran in is shutting down."""
    return _is_unreachable(error) or isinstance(from_rpc(error), NotReady)


def _is_unreachable(error: grpc.aio.AioRpcError) -> bool:
    """Whether gRPC itself says UNAVAILABLE: a process of Moray that does names its error class beside it."""
    is_from_moray = any(key == ERROR_KEY for key, _ in error.trailing_metadata())
    return error.code() is grpc.StatusCode.UNAVAILABLE and not is_from_moray


def _cause(error: grpc.aio.AioRpcError) -> str:
    """The last of the causes that gRPC chains: "...; last error: UNKNOWN: ipv4:...: Connection refused"."""
    return (error.details() or "unavailable").rsplit(": ", 1)[-1].rstrip("]")
