"""Structured output: grammars compiled once, and which tokens may follow in an output. V vocabulary.

What may follow is a function of the grammar and of the output's tokens. So a replay goes on where it was, and
the row behind drafted tokens is masked as if they stood, whatever becomes of them.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from torch import Tensor

from wire.errors import InvalidRequest
from wire.metrics import Metrics

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # there for type checkers only

_MAX_TOKEN_BYTES = 250
"""llguidance's trie takes no longer tokens; such ones never stand in a structured output."""
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,16}"
"""Between the parts of a JSON text: enough for indents, and no model can stay in white space for ever."""


@dataclass(frozen=True)
class Grammar:
    """What the text must be; `text` is a schema, an expression or rules, as `kind` says."""

    kind: str
    """The field of SamplingParams: json_schema, regex or grammar."""
    text: str


class GrammarTooComplex(Exception):
    """Internal to a step: what may follow could not be found within the limits."""


class GrammarMatcher:
    """One output's place in a grammar; used by one thread."""

    def __init__(self, beginning: LLMatcher, *, field: str, vocab_tokens: int) -> None:
        self.field = field
        """Of the request: where the grammar came from."""
        self._beginning = beginning
        """Never moved: shared by all who use the grammar."""
        self._matcher = beginning.deep_copy()
        self._vocab_tokens = vocab_tokens
        self._consumed: list[int] = []
        """Tokens that the matcher has taken; only a memory of the last call."""

    def allowed(self, output_ids: Sequence[int]) -> Tensor | None:
        """The tokens that may follow an output.

        Args:
            output_ids: every new token behind the client's prompt.

        Returns:
            (V,) bool; the end token alone where the text is complete and nothing may follow; None where the
            output does not follow the grammar, which only drafts can bring about.

        Raises:
            GrammarTooComplex: at this place of the grammar.
        """
        num_common = len(self._consumed)
        if list(output_ids[:num_common]) != self._consumed:
            num_common = _count_common(self._consumed, output_ids)
            self._matcher.rollback(len(self._consumed) - num_common)
        rest = list(output_ids[num_common:])
        num_taken = self._matcher.try_consume_tokens(rest) if rest else 0
        self._consumed = [*output_ids[:num_common], *rest[:num_taken]]
        if num_taken < len(rest) and not self._matcher.is_stopped():
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            problem = self._matcher.get_error()
            # A matcher that failed is of no use any more, and the next output may be another.
            self._matcher, self._consumed = self._beginning.deep_copy(), []
            raise GrammarTooComplex(_in_one_line(problem))
        mask_V = np.unpackbits(bits, bitorder="little")[: self._vocab_tokens]
        return torch.from_numpy(mask_V.astype(np.bool_))


class GrammarCompiler:
    """Compiles grammars for one checkpoint's tokenizer and keeps the newest; any thread may call it."""

    def __init__(
        self,
        checkpoint_dir: Path,
        *,
        vocab_tokens: int,
        eos_token_id: int,
        metrics: Metrics,
        max_kept: int = 64,
        limits: LLParserLimits | None = None,
    ) -> None:
        """Reads nothing yet: the tokenizer is read with the first grammar."""
        self._path = checkpoint_dir / "tokenizer.json"
        self._vocab_tokens = vocab_tokens
        self._eos_token_id = eos_token_id
        self._metrics = metrics
        self._max_kept = max_kept
        self._limits = limits or LLParserLimits(verbose_errors=False)
        self._lock = threading.Lock()
        """Guards what follows; one grammar is compiled at a time."""
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the beginning of an output.

        Raises:
            InvalidRequest: the grammar is none, or the checkpoint has no tokenizer.
        """
        with self._lock:
            matcher = self._kept.get(grammar)
            self._metrics.counter("grammars_total", result="compiled" if matcher is None else "kept").inc()
            if matcher is None:
                matcher = self._compile(grammar)
                self._kept[grammar] = matcher
            self._kept.move_to_end(grammar)
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
            return GrammarMatcher(matcher, field=f"sampling.{grammar.kind}", vocab_tokens=self._vocab_tokens)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        field = f"sampling.{grammar.kind}"
        if self._tokenizer is None:
            if not self._path.is_file():
                message = f"wanted none, because the checkpoint has no {self._path.name}; got one"
                raise InvalidRequest(f"{field}: {message}", field=field)
            self._tokenizer = LLTokenizer(
                _shorten_tokens(self._path.read_text(encoding="utf-8")),
                n_vocab=self._vocab_tokens,
                eos_token=self._eos_token_id,
            )
        try:
            matcher = LLMatcher(self._tokenizer, _rules(grammar), log_level=0, limits=self._limits)
            # The first mask is the dear one, and tells what is too complex: it is made here, not in a step.
            matcher.compute_bitmask()
            problem = matcher.get_error()
        except Exception as error:  # noqa: BLE001  llguidance raises bare Exception; mapped to the field
            problem = str(error)
        if problem:
            message = f"{field}: wanted one that can be compiled; got {_in_one_line(problem)}"
            raise InvalidRequest(message, field=field)
        return matcher


def _rules(grammar: Grammar) -> str:
    """The grammar as llguidance takes it."""
    if grammar.kind == "json_schema":
        options: JsonCompileOptions = {"whitespace_pattern": _WHITE_SPACE}
        return LLMatcher.grammar_from_json_schema(grammar.text, defaults=options)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(any_to_lark(grammar.text))


def _in_one_line(problem: str) -> str:
    """What llguidance says over several lines."""
    return " ".join(problem.split())


def _shorten_tokens(tokenizer_json: str) -> str:
    """The tokenizer with a short name for each token that is too long; no id changes."""
    raw = json.loads(tokenizer_json)
    for token in raw.get("added_tokens", []):
        if len(token["content"].encode()) > _MAX_TOKEN_BYTES:
            token |= {"content": f"<|long_token_{token['id']}|>", "special": True}
    return json.dumps(raw)


def _count_common(one: Sequence[int], two: Sequence[int]) -> int:
    """Length of the common beginning."""
    num_both = min(len(one), len(two))
    return next((idx for idx in range(num_both) if one[idx] != two[idx]), num_both)
