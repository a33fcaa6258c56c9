"""The answer to one request, message by message, and the shelf where whole answers are kept for a while.

A client whose stream broke asks again with the same request id and the first token that it still wants; it
gets every token from there on, nothing repeated and nothing missing. That needs the answer in pieces of one
token: a client may ask from any of them. A reader that is behind gets many pieces merged into one message.

No clock and no I/O; who writes and who reads share one asyncio loop.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from wire.errors import InternalError, InvalidRequest
from wire.proto import common_pb2, inference_pb2

_MAX_MERGED_TOKENS = 256

Positions = tuple[int, ...]
"""Of each output, the first message still wanted: token i is message i, and the end follows the tokens."""

RequestKey = tuple[str, str]
"""Tenant and request id: no tenant reaches a request of another."""


def fingerprint_of(request: inference_pb2.GenerateRequest) -> bytes:
    """16 bytes, equal for requests that ask for the same answer, whatever part of it is still wanted."""
    asked = inference_pb2.GenerateRequest()
    asked.CopyFrom(request)
    asked.ClearField("resume_from")
    asked.ClearField("resume_each")
    return hashlib.blake2b(asked.SerializeToString(deterministic=True), digest_size=16).digest()


def first_wanted(request: inference_pb2.GenerateRequest) -> Positions:
    """Where a request wants each of its outputs to begin."""
    return tuple(request.resume_each) or (request.resume_from,) + (0,) * (max(request.n, 1) - 1)


def advance(positions: Positions, message: inference_pb2.GenerateResponse) -> Positions:
    """What is wanted next after a message: of (4, 2), behind token 2 and the end of output 1, (4, 4)."""
    is_last = message.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED
    moved = list(positions)
    moved[message.output_idx] = message.first_idx + len(message.token_ids) + is_last
    return tuple(moved)


class AnswerLog:
    """Every message of one output so far; only grows. Message i holds token i; the last one ends the output.

    A message is kept as bytes, about 80 of them a token. Merging is the concatenation of those bytes, which
    protobuf reads as one message with the lists joined, so that fields added later need no code here.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._parts: list[bytes] = []
        self._texts: list[str] = []
        self.is_whole = False
        """The message with the finish reason is here; nothing follows it."""

    @property
    def num_tokens(self) -> int:
        """New tokens so far."""
        return len(self._parts) - self.is_whole

    def add(self, message: inference_pb2.GenerateResponse) -> None:
        """Takes the next message: one token, or the finish reason and no token.

        Raises:
            InternalError: it does not follow the one before.
        """
        is_last = message.finish_reason != common_pb2.FINISH_REASON_UNSPECIFIED
        num_tokens = len(message.token_ids)
        if self.is_whole or message.first_idx != self.num_tokens or num_tokens != (not is_last):
            raise InternalError(
                f"request {self._request_id}: wanted one token or the end at {self.num_tokens} (the answer "
                f"{'is whole' if self.is_whole else 'goes on'}); got {num_tokens} at {message.first_idx}"
            )
        part = inference_pb2.GenerateResponse()
        part.CopyFrom(message)
        part.ClearField("request_id")
        part.ClearField("first_idx")
        part.ClearField("text")
        self._parts.append(part.SerializeToString())
        self._texts.append(message.text)
        self.is_whole = is_last

    def read(self, token_idx: int) -> inference_pb2.GenerateResponse | None:
        """What there is from a token on, as one message; None = nothing yet.

        Of the tokens 7, 8 and the end, `read(1)` gives token 8 and the end in one message.
        """
        end = min(len(self._parts), token_idx + _MAX_MERGED_TOKENS)
        if token_idx >= end:
            return None
        message = inference_pb2.GenerateResponse.FromString(b"".join(self._parts[token_idx:end]))
        message.request_id = self._request_id
        message.first_idx = token_idx
        message.text = "".join(self._texts[token_idx:end])
        return message


class AnswerLogs:
    """The logs of all outputs of one request."""

    def __init__(self, request_id: str, *, num_outputs: int = 1) -> None:
        self._logs = tuple(AnswerLog(request_id) for _ in range(num_outputs))

    @property
    def is_whole(self) -> bool:
        """Every output has ended."""
        return all(log.is_whole for log in self._logs)

    @property
    def num_tokens(self) -> int:
        """New tokens of all outputs so far."""
        return sum(log.num_tokens for log in self._logs)

    def add(self, message: inference_pb2.GenerateResponse) -> None:
        """Takes the next message of one of the outputs.

        Raises:
            InternalError: it does not follow the one before.
        """
        self._logs[message.output_idx].add(message)

    def check_start(self, positions: Positions) -> None:
        """Refuses to read what the whole answer does not have.

        Raises:
            InvalidRequest: an output is shorter.
        """
        field = "resume_from" if len(self._logs) == 1 else "resume_each"
        for idx, (log, position) in enumerate(zip(self._logs, positions, strict=True)):
            if position > log.num_tokens + 1:
                wanted = f"wanted at most the {log.num_tokens} tokens of output {idx} and its end"
                raise InvalidRequest(f"{field}: {wanted}; got {position}", field=field)

    def read(self, positions: Positions) -> inference_pb2.GenerateResponse | None:
        """What there is of the output that is furthest behind; None = nothing yet of any."""
        for idx in sorted(range(len(self._logs)), key=positions.__getitem__):
            if message := self._logs[idx].read(positions[idx]):
                return message
        return None


@dataclass(frozen=True, kw_only=True)
class KeptAnswer:
    """A whole answer on the shelf."""

    fingerprint: bytes
    log: AnswerLogs
    end_s: float
    """Monotonic second in which it became whole."""


@dataclass(frozen=True, kw_only=True)
class ShelfLimits:
    """How much is kept, and how long."""

    keep_s: float
    keep_requests: int
    keep_tokens: int


class AnswerShelf:
    """Whole answers by tenant and request id; the oldest goes first when there are too many."""

    def __init__(self, limits: ShelfLimits) -> None:
        self._limits = limits
        self._kept: OrderedDict[RequestKey, KeptAnswer] = OrderedDict()
        self.num_tokens = 0
        """Tokens of all answers on the shelf."""

    def __len__(self) -> int:
        """Answers on the shelf."""
        return len(self._kept)

    def find(self, key: RequestKey, *, now_s: float) -> KeptAnswer | None:
        """The answer under a key, unless it is too old."""
        self._drop_old(now_s)
        return self._kept.get(key)

    def put(self, key: RequestKey, answer: KeptAnswer, *, now_s: float) -> None:
        """Keeps a whole answer; one that alone passes the limits is not kept."""
        self._drop_old(now_s)
        if key in self._kept:
            self._drop(key)
        self._kept[key] = answer
        self.num_tokens += answer.log.num_tokens
        while len(self._kept) > self._limits.keep_requests or self.num_tokens > self._limits.keep_tokens:
            self._drop(next(iter(self._kept)))

    def check_integrity(self) -> None:
        """The sum of tokens is right, and only whole answers are kept.

        Raises:
            InternalError: what is wrong.
        """
        counted = sum(answer.log.num_tokens for answer in self._kept.values())
        if counted != self.num_tokens or not all(answer.log.is_whole for answer in self._kept.values()):
            raise InternalError(f"answers kept: they sum to {counted} tokens, booked are {self.num_tokens}")

    def _drop_old(self, now_s: float) -> None:
        while self._kept:
            key, answer = next(iter(self._kept.items()))
            if now_s - answer.end_s < self._limits.keep_s:
                return
            self._drop(key)

    def _drop(self, key: RequestKey) -> None:
        self.num_tokens -= self._kept.pop(key).log.num_tokens
