"""A request from the wire becomes an admitted one, or an error that names the field. Pure.

Three steps: `check_outputs` before a run is looked up, `check_request` before the text is tokenized, and
`plan_admission` with its tokens.
"""

import hashlib
import random
import re
from dataclasses import dataclass

from router.requests.members import ModelFacts
from router.requests.types import AdmittedRequest
from wire.errors import InvalidRequest, PromptTooLong, UnknownModel
from wire.proto import common_pb2, inference_pb2
from wire.sampling import check_sampling

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
_TENANT = re.compile(r"[A-Za-z0-9._:/-]{1,64}")
_MAX_PRIORITY = 100
_MAX_SHOWN_CHARS = 80
_MAX_STOP_TOKENS = 256
_MAX_STOPS = 16
_MAX_STOP_CHARS = 256
_MAX_OUTPUTS = 64


@dataclass(frozen=True, kw_only=True)
class AdmissionRules:
    """What admission needs besides the request."""

    model: ModelFacts
    default_max_tokens: int
    """New tokens of a request that does not say; cut to what fits."""


def check_request(request: inference_pb2.GenerateRequest, model: ModelFacts) -> None:
    """Refuses what can be refused before the text is tokenized.

    Raises:
        UnknownModel: the request names another model.
        InvalidRequest: naming the field, what it wants and what it was given.
    """
    if request.model and request.model != model.name:
        raise UnknownModel(
            f"model {_show(request.model)} is not served here; this cluster serves {model.name!r}",
            field="model",
        )
    if request.request_id and not _REQUEST_ID.fullmatch(request.request_id):
        raise _invalid(
            "request_id",
            "1 to 128 characters of A-Z a-z 0-9 . _ : / -",
            f"{len(request.request_id)} characters, {_show(request.request_id)}",
        )
    _check_share(request)
    _check_prompt(request)
    if request.HasField("max_tokens") and request.max_tokens == 0:
        raise _invalid("max_tokens", "at least 1", "0; leave it unset for the default")
    check_sampling(request.sampling, vocab_tokens=model.vocab_tokens)
    _check_stop_tokens(request, model)
    _check_stops(request)


def check_outputs(request: inference_pb2.GenerateRequest) -> None:
    """Refuses what cannot be the outputs of a request, or where they resume; before anything is kept.

    Raises:
        InvalidRequest: naming the field.
    """
    if request.HasField("n") and not 1 <= request.n <= _MAX_OUTPUTS:
        raise _invalid("n", f"1 to {_MAX_OUTPUTS} outputs", str(request.n))
    num_outputs, num_each = request.n or 1, len(request.resume_each)
    if request.resume_from and num_outputs > 1:
        raise _invalid("resume_from", "one output; several have resume_each", f"n = {request.n}")
    if num_each and (num_each != num_outputs or request.resume_from):
        given = f"{num_each} beside resume_from = {request.resume_from}"
        raise _invalid("resume_each", f"{num_outputs} numbers, one an output, and no resume_from", given)
    if (request.resume_from or num_each) and not request.request_id:
        field = "resume_each" if num_each else "resume_from"
        raise _invalid(field, "a request_id beside it", "none")


def plan_admission(
    request: inference_pb2.GenerateRequest,
    prompt_ids: tuple[int, ...],
    *,
    rules: AdmissionRules,
    rng: random.Random,
) -> AdmittedRequest:
    """The request as workers will get it.

    Args:
        request: passed `check_request`.
        prompt_ids: token ids of its prompt.
        rules: the model and the defaults.
        rng: draws the wire id, and the request id and the seed that the client left out.

    Raises:
        InvalidRequest: a token id is not in the vocabulary, or min_tokens exceeds max_tokens.
        PromptTooLong: prompt and new tokens do not fit the context.
    """
    field = request.WhichOneof("prompt") or "prompt"
    model = rules.model
    if not prompt_ids:
        raise _invalid(field, "at least one token", "none")
    _check_vocabulary(prompt_ids, model, field=field)
    max_tokens = _plan_max_tokens(request, len(prompt_ids), rules=rules, field=field)
    if request.sampling.min_tokens > max_tokens:
        wanted = f"at most max_tokens, {max_tokens}"
        raise _invalid("sampling.min_tokens", wanted, str(request.sampling.min_tokens))
    request_id = request.request_id or f"{rng.getrandbits(96):024x}"
    sampling = common_pb2.SamplingParams()
    sampling.CopyFrom(request.sampling)
    sampling.seed = _plan_seed(request, rng)
    end_ids = () if request.ignore_eos else (model.eos_token_id,)
    return AdmittedRequest(
        request_id=request_id,
        wire_id=f"{request_id}~{rng.getrandbits(64):016x}",
        model=model.fingerprint,
        prompt_ids=prompt_ids,
        max_tokens=max_tokens,
        stop_token_ids=tuple(dict.fromkeys((*end_ids, *request.stop_token_ids))),
        stop=tuple(request.stop),
        sampling=sampling,
        priority=request.priority,
        tenant=request.tenant,
    )


def _plan_seed(request: inference_pb2.GenerateRequest, rng: random.Random) -> int:
    """The client's seed, or one that any router gives the same request id, or a random one."""
    if request.sampling.HasField("seed"):
        return request.sampling.seed
    if request.request_id:
        digest = hashlib.blake2b(request.request_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")
    return rng.getrandbits(64)


def _check_share(request: inference_pb2.GenerateRequest) -> None:
    if abs(request.priority) > _MAX_PRIORITY:
        raise _invalid("priority", f"-{_MAX_PRIORITY} to {_MAX_PRIORITY}", str(request.priority))
    if request.tenant and not _TENANT.fullmatch(request.tenant):
        wanted = "up to 64 characters of A-Z a-z 0-9 . _ : / -"
        raise _invalid("tenant", wanted, f"{len(request.tenant)} characters, {_show(request.tenant)}")


def _check_prompt(request: inference_pb2.GenerateRequest) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise _invalid("prompt", "text or tokens", "neither")
    if kind == "text" and not request.text:
        raise _invalid("text", "at least one character", "an empty string")
    if kind == "tokens" and not request.tokens.ids:
        raise _invalid("tokens", "at least one token id", "an empty list")


def _check_stop_tokens(request: inference_pb2.GenerateRequest, model: ModelFacts) -> None:
    ids = request.stop_token_ids
    if len(ids) > _MAX_STOP_TOKENS:
        raise _invalid("stop_token_ids", f"at most {_MAX_STOP_TOKENS} ids", str(len(ids)))
    wrong = [token_id for token_id in ids if token_id >= model.vocab_tokens]
    if wrong:
        raise _invalid("stop_token_ids", f"token ids in [0, {model.vocab_tokens})", str(wrong[0]))


def _check_stops(request: inference_pb2.GenerateRequest) -> None:
    if len(request.stop) > _MAX_STOPS:
        raise _invalid("stop", f"at most {_MAX_STOPS} strings", str(len(request.stop)))
    for stop in request.stop:
        if not 1 <= len(stop) <= _MAX_STOP_CHARS:
            raise _invalid("stop", f"strings of 1 to {_MAX_STOP_CHARS} characters", f"{len(stop)} characters")


def _check_vocabulary(prompt_ids: tuple[int, ...], model: ModelFacts, *, field: str) -> None:
    if max(prompt_ids) < model.vocab_tokens:
        return
    idx, token_id = next((i, t) for i, t in enumerate(prompt_ids) if t >= model.vocab_tokens)
    raise _invalid(
        field,
        f"token ids in [0, {model.vocab_tokens})",
        f"{token_id} at position {idx}, not in the vocabulary",
    )


def _plan_max_tokens(
    request: inference_pb2.GenerateRequest, num_prompt_tokens: int, *, rules: AdmissionRules, field: str
) -> int:
    context = rules.model.max_context_tokens
    room = context - num_prompt_tokens
    if room < 1:
        raise PromptTooLong(
            f"{field}: wanted at most {context - 1} prompt tokens "
            f"(context {context}, one new token at least); got {num_prompt_tokens}; shorten the prompt",
            field=field,
        )
    if not request.HasField("max_tokens"):
        return min(rules.default_max_tokens, room)
    if request.max_tokens > room:
        raise PromptTooLong(
            f"max_tokens: wanted at most {room} new tokens after a prompt of {num_prompt_tokens} "
            f"(context {context}); got {request.max_tokens}; lower max_tokens or shorten the prompt",
            field="max_tokens",
        )
    return request.max_tokens


def _invalid(field: str, wanted: str, got: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: wanted {wanted}; got {got}", field=field)


def _show(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}...")
