"""What a session does after an attempt failed: `(state, failure) -> (state, action)`, no I/O.

A failure spends one of `num_replays`, with two exceptions. An attempt that brought nothing, when every
worker has already failed this request, spends time instead (`patience_s` since the last progress). Such
attempts are how a session waits for a lost worker to come back, and they do not use the replays up. A worker
that answers that it is full spends neither, as long as there is another to ask.

Worked example, one decode worker, num_replays=3, patience_s=30: it dies after 7 tokens: replay 1 is spent.
The controller needs 4 s to start it again; the connections refused meanwhile spend time, not replays.
"""

from dataclasses import dataclass, replace

from router.requests.members import ClusterView
from router.requests.selection import Route, has_alternative
from router.requests.types import Failure
from wire.errors import (
    PREFILL_FIELD,
    FrameInvalid,
    InternalError,
    MorayError,
    Overloaded,
    RequestCancelled,
    StaleTable,
    WorkerLost,
)

_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0


@dataclass(frozen=True, kw_only=True)
class RetryState:
    """How a session has fared so far."""

    num_replays_left: int
    patience_s: float
    """Seconds without any progress after which the session gives up."""
    progress_s: float
    """When the last progress was made; the session's start before any."""
    avoid: tuple[str, ...] = ()
    """Keys of the workers that failed it, oldest first."""
    num_waits: int = 0
    """Attempts since the last progress that found no other worker to try."""
    retry_after_s: float = 0.0
    """The shortest delay that a full worker asked for; 0 = none did."""
    has_tokens: bool = False
    """The client has tokens already, so the request must not be refused lightly."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Start again after `delay_s`, or sooner if the cluster changes."""

    delay_s: float


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """Tell the client."""

    error: MorayError


def plan_retry(
    state: RetryState, failure: Failure, *, route: Route, view: ClusterView, now_s: float
) -> tuple[RetryState, Replay | GiveUp]:
    """What to do after `failure` on `route`.

    Args:
        state: the session so far.
        failure: what happened.
        route: the workers of the failed attempt.
        view: the newest cluster view.
        now_s: monotonic seconds.
    """
    error = _as_loss(failure)
    if not is_replayable(error):
        return state, GiveUp(error=error)
    if failure.made_progress:
        state = replace(state, progress_s=now_s, num_waits=0, has_tokens=True)
    was_exhausted = bool(state.avoid) and not has_alternative(view, state.avoid)
    state = replace(state, avoid=_with_blame(state.avoid, _blamed(failure, route)))
    can_switch = has_alternative(view, state.avoid)
    if isinstance(error, Overloaded):
        state = replace(state, retry_after_s=_sooner(state.retry_after_s, error.retry_after_s))
        if not can_switch and not state.has_tokens:
            return state, GiveUp(error=Overloaded(error.message, retry_after_s=state.retry_after_s))
    spends_time = was_exhausted and not failure.made_progress
    if spends_time and now_s - state.progress_s >= state.patience_s:
        return state, GiveUp(error=error)
    # A worker that was full did no work, and there are not many: it costs nothing to ask the next one.
    is_free = isinstance(error, Overloaded) and failure.is_answer and can_switch and not failure.made_progress
    if not spends_time and not is_free and state.num_replays_left == 0:
        return state, GiveUp(error=error)
    left = state.num_replays_left - (not spends_time and not is_free)
    delay_s = 0.0 if can_switch and not _is_transient(error) else _backoff_s(state.num_waits)
    num_waits = state.num_waits + (delay_s > 0)
    return replace(state, num_replays_left=left, num_waits=num_waits), Replay(delay_s=delay_s)


def is_replayable(error: MorayError) -> bool:
    """Whether another attempt can end better; damaged bytes are sent again, a refused handshake is not."""
    return error.is_retryable or isinstance(error, FrameInvalid)


def _as_loss(failure: Failure) -> MorayError:
    """The error, where a dropped call counts as a lost worker.

    The client did not cancel it, and an INTERNAL or UNKNOWN that no worker answered is gRPC's word for a
    connection that was torn down.
    """
    error = failure.error
    is_torn = isinstance(error, InternalError) and not failure.is_answer
    if is_torn or isinstance(error, RequestCancelled):
        return WorkerLost(f"the call to the worker was dropped: {error.message}")
    return error


def _is_transient(error: MorayError) -> bool:
    """The cluster catches up by itself in a moment; changing workers does not help."""
    return error.code is StaleTable.code


def _blamed(failure: Failure, route: Route) -> str:
    """The key of the worker at fault, or "".

    A decode worker that answers WorkerLost or FrameInvalid before its first token speaks of the prefill
    worker, and so does one that passes on that it is full; one that breaks off, or answers so later, is
    itself the one to leave.
    """
    if _is_transient(failure.error):
        return ""
    error = failure.error
    is_full = isinstance(error, Overloaded) and error.field == PREFILL_FIELD
    speaks_of_prefill = failure.is_answer and (is_full or isinstance(error, WorkerLost | FrameInvalid))
    if speaks_of_prefill and not failure.made_progress:
        return route.prefill.key
    return route.decode.key


def _sooner(first_s: float, second_s: float) -> float:
    """The shorter of two delays, of which 0 is none."""
    return min(first_s or second_s, second_s or first_s)


def _with_blame(avoid: tuple[str, ...], key: str) -> tuple[str, ...]:
    return avoid if not key or key in avoid else (*avoid, key)


def _backoff_s(num_waits: int) -> float:
    return float(min(_FIRST_BACKOFF_S * 2 ** min(num_waits, 10), _MAX_BACKOFF_S))
