"""The error tree: every class survives pickling and gRPC, and the drawing tells the truth."""

import pickle
import re

import grpc
import pytest

import wire.errors
from wire.errors import (
    ClientError,
    ConfigError,
    InternalError,
    MorayError,
    Overloaded,
    ServerError,
    UnknownModel,
    WorkerLost,
    all_errors,
    from_rpc,
    from_status,
    to_trailers,
)

CLASSES = all_errors()
LEAVES = [cls for cls in CLASSES if cls not in (MorayError, ClientError, ServerError)]
DRAWN = re.findall(
    r"[├└]── (\w+) +([A-Z_]+) +(\d{3})( +retry)?$", wire.errors.__doc__ or "", flags=re.MULTILINE
)


def make(cls: type[MorayError]) -> MorayError:
    if cls is ConfigError:
        return ConfigError(field="router.http_port", wanted="a port", given="-1", hint="0 picks one")
    return cls(f"{cls.__name__} happened", field="max_tokens")


@pytest.mark.parametrize("cls", CLASSES)
def test_error_pickles_with_message_and_field(cls):
    error = make(cls)
    got = pickle.loads(pickle.dumps(error))
    assert type(got) is cls
    assert (got.message, got.field, str(got)) == (error.message, error.field, str(error))


@pytest.mark.parametrize("cls", CLASSES)
def test_error_comes_back_from_grpc_as_the_same_class(cls):
    error = make(cls)
    got = from_status(cls.code, error.message, to_trailers(error))
    assert type(got) is cls
    assert (got.message, got.field) == (error.message, error.field)


@pytest.mark.parametrize(("name", "code", "http_status", "retry"), DRAWN)
def test_drawing_states_what_the_class_has(name, code, http_status, retry):
    cls = getattr(wire.errors, name)
    assert (cls.code.name, str(cls.http_status), cls.is_retryable) == (code, http_status, bool(retry))


def test_drawing_has_every_leaf():
    assert sorted(name for name, *_ in DRAWN) == sorted(cls.__name__ for cls in LEAVES)


@pytest.mark.parametrize("cls", LEAVES)
def test_leaf_is_on_one_side_of_the_root(cls):
    assert issubclass(cls, ClientError) != issubclass(cls, ServerError)


@pytest.mark.parametrize("cls", [cls for cls in LEAVES if issubclass(cls, ClientError)])
def test_client_errors_are_not_retried(cls):
    assert not cls.is_retryable


def test_bare_status_maps_by_its_code():
    assert type(from_status(grpc.StatusCode.UNAVAILABLE, "gone", ())) is WorkerLost
    assert type(from_status(grpc.StatusCode.NOT_FOUND, "what", ())) is UnknownModel
    assert type(from_status(grpc.StatusCode.UNIMPLEMENTED, "no", ())) is InternalError


def test_unknown_class_name_of_a_newer_peer_maps_by_its_code():
    got = from_status(grpc.StatusCode.UNAVAILABLE, "new", (("moray-error", "FromTheFuture"),))
    assert type(got) is WorkerLost


def test_retry_delay_travels():
    error = Overloaded("full", retry_after_s=1.25)
    assert ("moray-retry-after-ms", "1250") in to_trailers(error)
    assert from_status(error.code, "full", to_trailers(error)).retry_after_s == 1.25
    assert pickle.loads(pickle.dumps(error)).retry_after_s == 1.25


def test_nonsense_for_a_retry_delay_is_none():
    assert from_status(Overloaded.code, "full", (("moray-retry-after-ms", "soon"),)).retry_after_s == 0


def test_trailers_leave_empty_values_out():
    assert to_trailers(WorkerLost("gone")) == (("moray-error", "WorkerLost"),)


def test_rpc_error_without_a_status_is_internal():
    assert type(from_rpc(grpc.RpcError("broken"))) is InternalError


def test_config_error_names_field_wanted_and_given():
    message = make(ConfigError).message
    assert all(part in message for part in ("router.http_port", "a port", "-1", "0 picks one"))
