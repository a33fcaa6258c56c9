"""Requests from the wire: what is admitted, and how the rest is refused."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.front.validate import AdmissionRules, check_outputs, check_request, plan_admission
from router.requests.members import ModelFacts
from wire.errors import InvalidRequest, MorayError, PromptTooLong, UnknownModel
from wire.proto.common_pb2 import SamplingParams
from wire.proto.inference_pb2 import GenerateRequest, TokenIds

VOCAB = 300
CONTEXT = 64
MODEL = ModelFacts(
    name="toy",
    path="",
    fingerprint="f00d",
    vocab_tokens=VOCAB,
    max_context_tokens=CONTEXT,
    bos_token_id=0,
    eos_token_id=1,
)
RULES = AdmissionRules(model=MODEL, default_max_tokens=16)


def request(*ids, **fields):
    return GenerateRequest(tokens=TokenIds(ids=ids or (5, 6, 7)), **fields)


def admit(given, ids=None):
    check_request(given, MODEL)
    prompt_ids = tuple(given.tokens.ids) if ids is None else ids
    return plan_admission(given, prompt_ids, rules=RULES, rng=random.Random(0))


def admit_or_error(given):
    try:
        return admit(given)
    except InvalidRequest as error:
        return error


def sampled(**fields):
    return request(sampling=SamplingParams(**fields))


REFUSED = [
    (GenerateRequest(), InvalidRequest, "prompt", "neither"),
    (GenerateRequest(text=""), InvalidRequest, "text", "empty"),
    (GenerateRequest(tokens=TokenIds()), InvalidRequest, "tokens", "empty"),
    (request(5, VOCAB), InvalidRequest, "tokens", "300 at position 1"),
    (request(2**32 - 1), InvalidRequest, "tokens", "[0, 300)"),
    (request(max_tokens=0), InvalidRequest, "max_tokens", "at least 1"),
    (request(*[5] * CONTEXT), PromptTooLong, "tokens", "63 prompt tokens"),
    (request(*[5] * (CONTEXT + 9)), PromptTooLong, "tokens", "got 73"),
    (request(max_tokens=CONTEXT - 2), PromptTooLong, "max_tokens", "at most 61"),
    (request(max_tokens=2**32 - 1), PromptTooLong, "max_tokens", "got 4294967295"),
    (request(model="other"), UnknownModel, "model", "'toy'"),
    (request(request_id="x" * 129), InvalidRequest, "request_id", "129 characters"),
    (request(request_id="a b"), InvalidRequest, "request_id", "'a b'"),
    (request(request_id="line\n"), InvalidRequest, "request_id", "128"),
    (request(request_id="é"), InvalidRequest, "request_id", "128"),
    (request(priority=101), InvalidRequest, "priority", "-100 to 100"),
    (request(priority=-101), InvalidRequest, "priority", "-101"),
    (request(tenant="x" * 65), InvalidRequest, "tenant", "65 characters"),
    (request(tenant="a b"), InvalidRequest, "tenant", "'a b'"),
    (sampled(temperature=float("nan")), InvalidRequest, "sampling.temperature", "nan"),
    (sampled(temperature=float("inf")), InvalidRequest, "sampling.temperature", "inf"),
    (sampled(temperature=-0.5), InvalidRequest, "sampling.temperature", "-0.5"),
    (sampled(top_p=0.0), InvalidRequest, "sampling.top_p", "(0, 1]"),
    (sampled(top_p=1.5), InvalidRequest, "sampling.top_p", "1.5"),
    (sampled(top_p=float("nan")), InvalidRequest, "sampling.top_p", "nan"),
    (sampled(min_tokens=17), InvalidRequest, "sampling.min_tokens", "at most max_tokens, 16; got 17"),
    (sampled(logit_bias={VOCAB: 1.0}), InvalidRequest, "sampling.logit_bias", "[0, 300)"),
    (request(stop_token_ids=[VOCAB]), InvalidRequest, "stop_token_ids", "[0, 300); got 300"),
    (request(stop=["a"] * 17), InvalidRequest, "stop", "at most 16 strings; got 17"),
    (request(stop=["a", ""]), InvalidRequest, "stop", "got 0 characters"),
    (request(stop=["a" * 257]), InvalidRequest, "stop", "got 257 characters"),
    (request(stop_token_ids=range(257)), InvalidRequest, "stop_token_ids", "at most 256 ids; got 257"),
]


@pytest.mark.parametrize(("given", "kind", "field", "said"), REFUSED)
def test_refusal_names_the_field_wanted_and_got(given, kind, field, said):
    with pytest.raises(MorayError) as caught:
        admit(given)
    assert type(caught.value) is kind
    assert caught.value.field == field
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        (request(n=0), "n", "1 to 64 outputs; got 0"),
        (request(n=65), "n", "got 65"),
        (request(n=2**32 - 1, request_id="r"), "n", "got 4294967295"),
        (request(resume_from=1), "resume_from", "a request_id"),
        (request(n=2, resume_each=[1, 1]), "resume_each", "a request_id"),
        (request(n=2, request_id="r", resume_from=1), "resume_from", "one output"),
        (request(n=2, request_id="r", resume_each=[1]), "resume_each", "2 numbers"),
        (request(request_id="r", resume_each=[1, 1]), "resume_each", "1 numbers"),
        (request(request_id="r", resume_from=1, resume_each=[1]), "resume_each", "no resume_from"),
    ],
)
def test_outputs_that_cannot_be_are_refused_by_field(given, field, said):
    with pytest.raises(InvalidRequest) as caught:
        check_outputs(given)
    assert caught.value.field == field
    assert said in caught.value.message


@pytest.mark.parametrize(
    "given",
    [
        request(),
        request(n=64),
        request(request_id="r", resume_from=9),
        request(request_id="r", resume_each=[9]),
        request(n=2, request_id="r", resume_each=[9, 0]),
    ],
)
def test_outputs_that_can_be_are_let_in(given):
    check_outputs(given)


def test_empty_prompt_after_tokenizing_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        admit(GenerateRequest(text="x"), ids=())
    assert caught.value.field == "text"


def test_long_values_are_cut_in_messages():
    with pytest.raises(UnknownModel) as caught:
        admit(request(model="m" * 10_000))
    assert len(caught.value.message) < 300


def test_defaults_of_a_bare_request():
    got = admit(request())
    assert got.sampling == SamplingParams(seed=got.sampling.seed)
    assert got.sampling.HasField("seed")
    assert (got.max_tokens, got.stop_token_ids, got.model) == (16, (1,), "f00d")
    assert got.prompt_ids == (5, 6, 7)
    assert len(got.request_id) == 24


def test_everything_that_is_given_is_kept():
    sampling = SamplingParams(
        temperature=0.5, top_p=0.25, top_k=4, seed=2**64 - 1, min_tokens=3, logit_bias={4: 1.0}
    )
    got = admit(
        request(
            max_tokens=3,
            ignore_eos=True,
            request_id="my/req:1",
            model="toy",
            sampling=sampling,
            stop=["a", "b"],
        )
    )
    assert got.sampling == sampling
    assert (got.max_tokens, got.stop_token_ids, got.request_id) == (3, (), "my/req:1")
    assert got.stop == ("a", "b")


def test_own_stop_tokens_follow_the_end_token_and_count_without_it():
    assert admit(request(stop_token_ids=[9, 1, 9])).stop_token_ids == (1, 9)
    assert admit(request(stop_token_ids=[9], ignore_eos=True)).stop_token_ids == (9,)


def test_seed_that_is_drawn_does_not_change_the_clients_message():
    given_request = request()
    admit(given_request)
    assert given_request == request()


def test_seed_that_is_not_given_comes_from_the_id_or_is_drawn():
    seeds = [
        plan_admission(request(request_id=name), (5,), rules=RULES, rng=random.Random(draw)).sampling.seed
        for name, draw in (("a", 0), ("a", 1), ("b", 0), ("", 0), ("", 1))
    ]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 4


def test_wire_id_is_new_for_every_request():
    rng = random.Random(0)
    ids = [plan_admission(request(request_id="same"), (5,), rules=RULES, rng=rng).wire_id for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(wire_id.startswith("same~") for wire_id in ids)


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens"), [(1, 16), (CONTEXT - 16, 16), (CONTEXT - 15, 15), (CONTEXT - 1, 1)]
)
def test_default_max_tokens_is_cut_to_what_fits(num_prompt, max_tokens):
    assert admit(request(*[5] * num_prompt)).max_tokens == max_tokens


@pytest.mark.parametrize("num_prompt", [1, CONTEXT - 1])
def test_largest_max_tokens_is_admitted(num_prompt):
    assert (
        admit(request(*[5] * num_prompt, max_tokens=CONTEXT - num_prompt)).max_tokens == CONTEXT - num_prompt
    )


@given(
    ids=st.lists(st.integers(0, 2**32 - 1) | st.integers(0, VOCAB), max_size=CONTEXT + 2),
    max_tokens=st.none() | st.integers(0, CONTEXT * 2),
    temperature=st.none() | st.floats(width=32),
    top_p=st.none() | st.floats(width=32),
    request_id=st.text(max_size=5),
)
def test_any_request_is_admitted_within_limits_or_refused_by_field(
    ids, max_tokens, temperature, top_p, request_id
):
    sampling = SamplingParams(temperature=temperature, top_p=top_p)
    given_request = GenerateRequest(
        tokens=TokenIds(ids=ids), max_tokens=max_tokens, sampling=sampling, request_id=request_id
    )
    got = admit_or_error(given_request)
    if isinstance(got, InvalidRequest):
        assert got.field
        assert got.message.startswith(got.field)
        return
    assert got.max_tokens >= 1
    assert len(got.prompt_ids) + got.max_tokens <= CONTEXT
    assert max(got.prompt_ids) < VOCAB
    assert 0 <= got.sampling.temperature < float("inf")
    assert 0 < got.sampling.top_p <= 1 or not got.sampling.HasField("top_p")
    assert got.sampling.HasField("seed")
