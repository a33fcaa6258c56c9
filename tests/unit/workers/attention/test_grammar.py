"""Structured output: what may follow is a function of grammar and tokens, and texts that follow it match."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits
from tokenizers import Tokenizer

from model.byte_tokenizer import FIRST_BYTE_ID, make_tokenizer
from tests.unit.workers.attention.harness import Lab, make_spec, open_engine
from tests.unit.workers.attention.test_engine_drafts import open_drafting
from tests.unit.workers.attention.test_engine_text import mixed_prompts
from wire.errors import InvalidRequest
from wire.metrics import Metrics
from workers.attention.adjust import adjust_logits
from workers.attention.grammar import Grammar, GrammarCompiler, GrammarMatcher
from workers.attention.sampler import Turn, choose_token
from workers.attention.types import NewToken, Sampling

NANO = Path(__file__).parents[4] / "assets" / "nano"
VOCAB = 320
EOS = 1
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
NUMBERS = Grammar("regex", "[0-9]{2,4}(,[0-9]{2})*")
GRAMMARS = [
    NUMBERS,
    Grammar("json_schema", SCHEMA),
    Grammar("grammar", 'root ::= "yes" | "no" tail\ntail ::= ", " [a-z]+ "!"'),
    Grammar("grammar", 'start: "yes" | "no" TAIL\nTAIL: /, [a-z]+!/'),
]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    """Of the byte tokenizer, in a vocabulary that is larger than it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return make_compiler(folder)


def make_compiler(folder: Path, **fields: Any) -> GrammarCompiler:
    values = {"vocab_tokens": VOCAB, "eos_token_id": EOS, "metrics": Metrics("attention"), **fields}
    return GrammarCompiler(folder, **values)


def is_match(grammar: Grammar, text: str) -> bool:
    """The plain reference."""
    if grammar.kind == "json_schema":
        read = json.loads(text)
        fits = isinstance(read["name"], str) and len(read["name"]) <= 5 and 0 <= read["age"] <= 150
        return fits and set(read) == {"name", "age"}
    pattern = grammar.text if grammar.kind == "regex" else "yes|no, [a-z]+!"
    return re.fullmatch(pattern, text) is not None


def ids_of(text: str) -> list[int]:
    return [FIRST_BYTE_ID + byte for byte in text.encode()]


def allowed_ids(matcher: GrammarMatcher, output: Sequence[int]) -> list[int] | None:
    mask_V = matcher.allowed(output)
    if mask_V is None:
        return None
    assert (mask_V.dtype, tuple(mask_V.shape)) == (torch.bool, (VOCAB,))
    return mask_V.nonzero().flatten().tolist()


def walk(matcher: GrammarMatcher, rng: random.Random, *, num_steps: int = 200) -> list[int]:
    """A text that the grammar allows, drawn token by token; ends at the end token where that comes."""
    output: list[int] = []
    for _ in range(num_steps):
        allowed = allowed_ids(matcher, output)
        assert allowed
        token_id = EOS if EOS in allowed and rng.random() < 0.3 else rng.choice(allowed)
        if token_id == EOS:
            return output
        output.append(token_id)
    raise AssertionError("no end")


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25)
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.text[:6])
def test_any_walk_through_the_masks_ends_in_a_text_of_the_grammar(
    compiler: GrammarCompiler, grammar: Grammar, seed: int
) -> None:
    output = walk(compiler.compile(grammar), random.Random(seed))
    assert is_match(grammar, bytes(token_id - FIRST_BYTE_ID for token_id in output).decode(errors="replace"))


@given(
    outputs=st.lists(
        st.lists(st.sampled_from([*ids_of("0123456789,"), EOS]), max_size=9), min_size=1, max_size=8
    )
)
def test_what_may_follow_is_a_function_of_the_tokens_whatever_was_asked_before(
    compiler: GrammarCompiler, outputs: list[list[int]]
) -> None:
    used = compiler.compile(NUMBERS)
    assert [allowed_ids(used, output) for output in outputs] == [
        allowed_ids(compiler.compile(NUMBERS), output) for output in outputs
    ]


def test_example(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(NUMBERS)
    digits, comma = ids_of("0123456789"), ids_of(",")
    assert allowed_ids(matcher, []) == digits
    assert allowed_ids(matcher, ids_of("12")) == sorted([EOS, *comma, *digits])
    assert allowed_ids(matcher, ids_of("12345")) is None
    assert allowed_ids(matcher, ids_of("1234")) == sorted([EOS, *comma])
    assert allowed_ids(matcher, [*ids_of("12"), EOS]) == [EOS]


def test_text_that_cannot_go_on_leaves_the_end_token_alone(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar("regex", "ab"))
    assert allowed_ids(matcher, ids_of("ab")) == [EOS]
    assert allowed_ids(matcher, [*ids_of("ab"), EOS, EOS]) == [EOS]
    assert allowed_ids(matcher, ids_of("a")) == ids_of("b")


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar("regex", "[0-9"), "unclosed character class"),
        (Grammar("json_schema", '{"type": "objec"}'), "objec"),
        (Grammar("json_schema", '{"$ref": "#/nowhere"}'), "nowhere"),
        (Grammar("grammar", "start: foo"), 'unknown name: "foo"'),
        (Grammar("grammar", "root ::= foo"), "foo"),
        (Grammar("grammar", "root ::= ("), "got"),
        (Grammar("grammar", "?"), "got"),
    ],
    ids=str,
)
def test_what_is_no_grammar_is_refused_by_its_field(
    compiler: GrammarCompiler, grammar: Grammar, said: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(grammar)
    assert caught.value.field == f"sampling.{grammar.kind}"
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_checkpoint_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="the checkpoint has no tokenizer") as caught:
        make_compiler(tmp_path).compile(NUMBERS)
    assert caught.value.field == "sampling.regex"


def test_newest_grammars_are_compiled_once(tmp_path: Path) -> None:
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    metrics = Metrics("attention")
    compiler = make_compiler(tmp_path, metrics=metrics, max_kept=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        compiler.compile(Grammar("regex", text))
    count = metrics.registry.get_sample_value
    assert count("moray_attention_grammars_total", {"result": "compiled"}) == 4
    assert count("moray_attention_grammars_total", {"result": "kept"}) == 2


def test_matchers_of_one_grammar_are_apart(compiler: GrammarCompiler) -> None:
    one, two = compiler.compile(NUMBERS), compiler.compile(NUMBERS)
    one.allowed(ids_of("1234"))
    assert allowed_ids(two, []) == ids_of("0123456789")


def test_nano_has_a_token_too_long_for_the_trie_and_works() -> None:
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    compiler = make_compiler(NANO, vocab_tokens=1536)
    matcher = compiler.compile(Grammar("json_schema", SCHEMA))
    output = tokenizer.encode('{"name": "Ann", "age": 42}', add_special_tokens=False).ids
    for idx, token_id in enumerate(output):
        mask_V = matcher.allowed(output[:idx])
        assert mask_V is not None
        assert mask_V[token_id]
    mask_V = matcher.allowed(output)
    assert mask_V is not None
    assert mask_V[EOS]


def test_mask_comes_first_and_min_tokens_gives_way_to_a_complete_text(compiler: GrammarCompiler) -> None:
    spec = make_spec(
        [5],
        matcher=compiler.compile(Grammar("regex", "ab")),
        sampling=Sampling(min_tokens=9, logit_bias=((7, 100.0),)),
        stop_token_ids=frozenset({EOS}),
    )
    logits_V = torch.zeros(VOCAB)
    assert adjust_logits(logits_V, spec, [5]).isfinite().nonzero().flatten().tolist() == ids_of("a")
    assert choose_token(logits_V, Turn(spec, [5, *ids_of("ab")])).token_id == EOS


SAMPLINGS = [Sampling(), Sampling(temperature=1.5, seed=4)]


def texts(compiler: GrammarCompiler, sampling: Sampling, engine: Any) -> list[list[int]]:
    """Structured outputs of mixed prompts, all at once."""
    with engine as lab:
        listeners = [
            lab.submit(
                make_spec(
                    prompt,
                    request_id=str(i),
                    max_tokens=20,
                    sampling=sampling,
                    stop_token_ids=frozenset({EOS}),
                    matcher=compiler.compile(GRAMMARS[i % len(GRAMMARS)]),
                )
            )
            for i, prompt in enumerate(mixed_prompts())
        ]
        return [listener.tokens() for listener in listeners]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seed"])
def test_engine_makes_texts_of_the_grammar_with_drafts_and_without(
    compiler: GrammarCompiler, sampling: Sampling
) -> None:
    plain = texts(compiler, sampling, open_engine("mtp"))
    assert texts(compiler, sampling, open_drafting(max_drafts=3)) == plain
    ended = [(i, output) for i, output in enumerate(plain) if output[-1] == EOS]
    assert ended
    for i, output in ended:
        text = bytes(token_id - FIRST_BYTE_ID for token_id in output[:-1]).decode(errors="replace")
        assert is_match(GRAMMARS[i % len(GRAMMARS)], text)


def test_preempted_sequences_go_on_in_their_grammars(compiler: GrammarCompiler) -> None:
    """Each begins in 6 pages and grows to 11: three begin in 20 pages and one ends there."""
    grammar = Grammar("regex", "[a-z0-9 ]{30}")

    def ask_all(lab: Lab) -> list[list[int]]:
        lab.door.hold()
        listeners = [
            lab.submit(
                make_spec(
                    [*range(20 + i, 41 + i)],
                    request_id=str(i),
                    max_tokens=24,
                    sampling=Sampling(temperature=1.5, seed=i),
                    matcher=compiler.compile(grammar),
                )
            )
            for i in range(4)
        ]
        lab.door.open()
        return [listener.tokens() for listener in listeners]

    with open_engine("sparse") as lab:
        alone = ask_all(lab)
    with open_engine("sparse", num_pages=20, lookahead_tokens=1) as lab:
        assert ask_all(lab) == alone
        assert sum(lab.metric("preemptions_total", state=s) for s in ("prefill", "decode")) > 0
    assert all(re.fullmatch(b"[a-z0-9 ]{24}", bytes(i - FIRST_BYTE_ID for i in ids)) for ids in alone)


@pytest.mark.parametrize("num_before", [1, 4, 8])
def test_replay_goes_on_in_the_grammar_where_the_text_stopped(
    compiler: GrammarCompiler, num_before: int
) -> None:
    prompt, sampling = mixed_prompts()[4], Sampling(temperature=1.2, seed=9)
    with open_engine("default") as lab:

        def run(tokens: list[int], attempt: int) -> list[int]:
            spec = make_spec(
                tokens,
                attempt=attempt,
                num_prompt_tokens=len(prompt),
                max_tokens=10 - len(tokens) + len(prompt),
                sampling=sampling,
                matcher=compiler.compile(Grammar("json_schema", SCHEMA)),
            )
            return lab.submit(spec).tokens()

        whole = run(prompt, 0)
        assert whole[:num_before] + run([*prompt, *whole[:num_before]], 1) == whole


@pytest.mark.parametrize("is_drafting", [False, True], ids=["plain", "drafts"])
def test_grammar_that_grows_too_complex_fails_its_own_request_alone(
    tmp_path: Path, is_drafting: bool
) -> None:
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    compiler = make_compiler(tmp_path, limits=LLParserLimits(step_max_items=40, verbose_errors=False))
    growing = Grammar(
        "grammar", "start: part start start | part\npart: A | B | C\nA: /a/\nB: /ab?/\nC: /ac?/"
    )
    matcher = compiler.compile(growing)
    prompt = mixed_prompts()[4]
    with open_drafting() if is_drafting else open_engine("mtp") as lab:
        wanted = lab.run(prompt, max_tokens=30)
        failing = lab.submit(make_spec(prompt, request_id="f", max_tokens=30, matcher=matcher))
        other = lab.submit(make_spec(prompt, request_id="o", max_tokens=30))
        error = failing.error()
        assert (type(error), error.field) == (InvalidRequest, "sampling.grammar")
        assert "Too many items" in error.message
        assert any(isinstance(event, NewToken) for event in failing.events)
        assert other.tokens() == wanted
