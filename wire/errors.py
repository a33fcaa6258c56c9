"""The one tree of errors that cross a process, drawn here; each leaf knows how it travels.

    MorayError
    ├── ClientError                 the caller can mend it
    │   ├── InvalidRequest          INVALID_ARGUMENT    400
    │   ├── PromptTooLong           INVALID_ARGUMENT    400
    │   ├── UnknownModel            NOT_FOUND           404
    │   ├── ConfigError             INVALID_ARGUMENT    400
    │   ├── DeadlinePassed          DEADLINE_EXCEEDED   504
    │   └── RequestCancelled        CANCELLED           499
    └── ServerError                 the cluster must mend it
        ├── Overloaded              RESOURCE_EXHAUSTED  429  retry
        ├── NotReady                UNAVAILABLE         503  retry
        ├── WorkerLost              UNAVAILABLE         503  retry
        ├── StaleTable              ABORTED             503  retry
        ├── ExpertNotLoaded         ABORTED             503  retry
        ├── HandshakeRefused        FAILED_PRECONDITION 500
        ├── FrameInvalid            DATA_LOSS           500
        ├── ModelBroken             FAILED_PRECONDITION 500
        └── InternalError           INTERNAL            500

Over gRPC an error is a status code, the message, and the trailing metadata `moray-error` (class name),
`moray-field` and `moray-retry-after-ms`; `from_rpc` turns it back into the same class on the other side.
"""

from collections.abc import Sequence
from typing import ClassVar

import grpc

ERROR_KEY = "moray-error"
FIELD_KEY = "moray-field"
RETRY_KEY = "moray-retry-after-ms"
PREFILL_FIELD = "prefill_address"
"""Field of an Overloaded that a decode worker passes on: it is the prefill worker that is full."""


class MorayError(Exception):
    """Any failure that Moray reports to a caller; subclasses fix code, HTTP status and retry."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    http_status: ClassVar[int] = 500
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", *, field: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        """The request or config field at fault, or ""."""
        self.retry_after_s = retry_after_s
        """Seconds after which another try makes sense; 0 = nothing is known."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.field, self.retry_after_s))


def _rebuild(cls: type[MorayError], message: str, field: str, retry_after_s: float) -> MorayError:
    error = cls.__new__(cls)
    MorayError.__init__(error, message, field=field, retry_after_s=retry_after_s)
    return error


class ClientError(MorayError):
    """The caller can mend it; a retry of the same request fails the same way."""


class InvalidRequest(ClientError):
    """A field of the request is missing, malformed or out of range."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400


class PromptTooLong(InvalidRequest):
    """Prompt and requested tokens do not fit the model's context."""


class UnknownModel(ClientError):
    """The request names a model that this cluster does not serve."""

    code = grpc.StatusCode.NOT_FOUND
    http_status = 404


class ConfigError(ClientError):
    """A config file or flag is wrong: names the field, what was wanted, what was given."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400

    def __init__(self, *, field: str, wanted: str, given: str, hint: str = "") -> None:
        message = f"config field {field!r}: wanted {wanted}; got {given}"
        super().__init__(f"{message}; {hint}" if hint else message, field=field)


class DeadlinePassed(ClientError):
    """The caller's deadline passed before the work was done."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504


class RequestCancelled(ClientError):
    """The caller gave the request up."""

    code = grpc.StatusCode.CANCELLED
    http_status = 499


class ServerError(MorayError):
    """The cluster's fault; the request itself was fine."""


class Overloaded(ServerError):
    """No capacity now; refused before any work was done."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    is_retryable = True


class NotReady(ServerError):
    """The cluster has no worker that can take this yet."""

    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    is_retryable = True


class WorkerLost(ServerError):
    """A worker went away while it held the work."""

    code = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    is_retryable = True


class StaleTable(ServerError):
    """A dispatch was planned with another routing table than the worker or the caller holds."""

    code = grpc.StatusCode.ABORTED
    http_status = 503
    is_retryable = True


class ExpertNotLoaded(ServerError):
    """Rows were sent to a worker that does not hold the expert."""

    code = grpc.StatusCode.ABORTED
    http_status = 503
    is_retryable = True


class HandshakeRefused(ServerError):
    """Two processes speak another protocol version or serve another model."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class FrameInvalid(ServerError):
    """Bytes from the wire are not the frame that they should be."""

    code = grpc.StatusCode.DATA_LOSS


class ModelBroken(ServerError):
    """The checkpoint on disk cannot be served; names the file or tensor."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class InternalError(ServerError):
    """A fault in Moray itself."""

    code = grpc.StatusCode.INTERNAL


def all_errors(root: type[MorayError] = MorayError) -> list[type[MorayError]]:
    """Every class of the tree, parents before children."""
    return [root, *(leaf for child in root.__subclasses__() for leaf in all_errors(child))]


def to_trailers(error: MorayError) -> tuple[tuple[str, str], ...]:
    """The trailing metadata that carries an error over gRPC."""
    retry_ms = str(round(error.retry_after_s * 1000)) if error.retry_after_s else ""
    pairs = ((ERROR_KEY, type(error).__name__), (FIELD_KEY, error.field), (RETRY_KEY, retry_ms))
    return tuple((key, value) for key, value in pairs if value)


def from_status(
    code: grpc.StatusCode, message: str, trailers: Sequence[tuple[str, str | bytes]]
) -> MorayError:
    """The error that a peer sent, as the class it raised; a bare status maps by its code."""
    metadata = {key: value for key, value in trailers if isinstance(value, str)}
    by_name = {cls.__name__: cls for cls in all_errors()}
    cls = by_name.get(metadata.get(ERROR_KEY, ""), _BY_CODE.get(code, InternalError))
    retry_ms = metadata.get(RETRY_KEY, "")
    retry_after_s = int(retry_ms) / 1000 if retry_ms.isdecimal() else 0.0
    return _rebuild(cls, message, metadata.get(FIELD_KEY, ""), retry_after_s)


def from_rpc(error: grpc.RpcError) -> MorayError:
    """The error behind a failed call, sync or asyncio."""
    code = error.code() if callable(getattr(error, "code", None)) else grpc.StatusCode.UNKNOWN
    details = error.details() if callable(getattr(error, "details", None)) else str(error)
    read = getattr(error, "trailing_metadata", None)
    trailers = [(item[0], item[1]) for item in (read() if callable(read) else None) or ()]
    return from_status(code, details or str(code), trailers)


_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: UnknownModel,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlinePassed,
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: WorkerLost,
    grpc.StatusCode.ABORTED: StaleTable,
    grpc.StatusCode.FAILED_PRECONDITION: HandshakeRefused,
    grpc.StatusCode.DATA_LOSS: FrameInvalid,
}
