"""The bounds of sampling parameters: routers refuse with them before any work, workers trust nobody."""

import json
import math
from collections.abc import Callable

from wire.errors import InvalidRequest
from wire.proto import common_pb2

MAX_LOGIT_BIASES = 1024
"""Entries of `logit_bias`, at most."""

MAX_LOGPROBS = 20
"""Most probable tokens that are told of one position, at most."""

MAX_GRAMMAR_CHARS = 65536
"""Characters of a schema, an expression or a grammar, at most."""

_Bound = tuple[str, str, Callable[[float], bool]]
_BOUNDS: tuple[_Bound, ...] = (
    ("temperature", "a finite number >= 0", lambda value: 0 <= value < math.inf),
    ("top_p", "a number in (0, 1]", lambda value: 0 < value <= 1),
    ("min_p", "a number in [0, 1]", lambda value: 0 <= value <= 1),
    ("repetition_penalty", "a finite number > 0", lambda value: 0 < value < math.inf),
    ("presence_penalty", "a number in [-2, 2]", lambda value: -2 <= value <= 2),
    ("frequency_penalty", "a number in [-2, 2]", lambda value: -2 <= value <= 2),
)
"""(field, what it wants, whether a value is fine); NaN is never."""
_LARGEST_BIAS = 100.0


def check_sampling(sampling: common_pb2.SamplingParams, *, vocab_tokens: int) -> None:
    """Refuses what is out of range.

    Raises:
        InvalidRequest: naming the field, what it wants and what it was given.
    """
    given = {field.name for field, _ in sampling.ListFields()}
    for name, wanted, is_fine in _BOUNDS:
        value = getattr(sampling, name)
        if not is_fine(value) and name in given:
            raise _invalid(name, wanted, f"{value:g}")
    _check_structure(sampling)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(sampling, name) > MAX_LOGPROBS:
            raise _invalid(name, f"at most {MAX_LOGPROBS}", str(getattr(sampling, name)))
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        raise _invalid("logit_bias", f"at most {MAX_LOGIT_BIASES} entries", str(len(sampling.logit_bias)))
    for token_id, bias in sampling.logit_bias.items():
        if token_id >= vocab_tokens:
            raise _invalid("logit_bias", f"token ids in [0, {vocab_tokens})", str(token_id))
        if not -_LARGEST_BIAS <= bias <= _LARGEST_BIAS:
            raise _invalid("logit_bias", "biases in [-100, 100]", f"{bias:g} for token {token_id}")


def _check_structure(sampling: common_pb2.SamplingParams) -> None:
    """What can be told without a tokenizer; the rest is told by the worker that compiles it."""
    kind = sampling.WhichOneof("structure")
    if kind is None:
        return
    text = getattr(sampling, kind)
    if not 1 <= len(text) <= MAX_GRAMMAR_CHARS:
        raise _invalid(kind, f"1 to {MAX_GRAMMAR_CHARS} characters", f"{len(text)} characters")
    if kind == "json_schema":
        try:
            schema = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _invalid(kind, "a JSON object", str(error)) from error
        if not isinstance(schema, dict):
            raise _invalid(kind, "a JSON object", type(schema).__name__)


def _invalid(name: str, wanted: str, got: str) -> InvalidRequest:
    field = f"sampling.{name}"
    return InvalidRequest(f"{field}: wanted {wanted}; got {got}", field=field)
