"""Bounds of sampling parameters: every refusal names its field."""

import math
from typing import Any

import pytest

from wire.errors import InvalidRequest
from wire.proto.common_pb2 import SamplingParams
from wire.sampling import MAX_LOGIT_BIASES, check_sampling

NAN = math.nan


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"temperature": -0.5}, "temperature", "got -0.5"),
        ({"temperature": math.inf}, "temperature", "got inf"),
        ({"temperature": NAN}, "temperature", "got nan"),
        ({"top_p": 0.0}, "top_p", "got 0"),
        ({"top_p": 1.5}, "top_p", "(0, 1]"),
        ({"min_p": -0.1}, "min_p", "got -0.1"),
        ({"min_p": 1.1}, "min_p", "[0, 1]"),
        ({"min_p": NAN}, "min_p", "got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "got 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty", "got inf"),
        ({"presence_penalty": 2.1}, "presence_penalty", "got 2.1"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "[-2, 2]"),
        ({"json_schema": ""}, "json_schema", "got 0 characters"),
        ({"regex": "a" * 65537}, "regex", "got 65537 characters"),
        ({"json_schema": "{"}, "json_schema", "a JSON object; got Expecting"),
        ({"json_schema": "[1]"}, "json_schema", "a JSON object; got list"),
        ({"json_schema": "[" * 60000}, "json_schema", "a JSON object; got"),
        ({"logprobs": 21}, "logprobs", "at most 20; got 21"),
        ({"prompt_logprobs": 2**32 - 1}, "prompt_logprobs", "got 4294967295"),
        ({"logit_bias": {300: 1.0}}, "logit_bias", "[0, 300); got 300"),
        ({"logit_bias": {3: 100.5}}, "logit_bias", "got 100.5 for token 3"),
        ({"logit_bias": {3: NAN}}, "logit_bias", "got nan for token 3"),
        ({"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIASES + 1), 0.0)}, "logit_bias", "got 1025"),
    ],
    ids=str,
)
def test_refusal_names_the_field_wanted_and_got(fields: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(SamplingParams(**fields), vocab_tokens=300)
    assert caught.value.field == f"sampling.{field}"
    assert said in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_p": 1.0, "min_p": 1.0, "repetition_penalty": 0.01},
        {"json_schema": "{}"},
        {"grammar": 'start: "a"'},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "logit_bias": {0: -100.0, 299: 100.0}},
    ],
    ids=str,
)
def test_bounds_themselves_are_fine(fields: dict[str, Any]) -> None:
    check_sampling(SamplingParams(**fields), vocab_tokens=300)
