"""The sequences that an attention worker holds, what it is asked for, and what it tells about them."""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from wire.errors import MorayError
from wire.frames import Array
from workers.attention.cold_pages import Fetch
from workers.attention.draft_record import DraftRecord
from workers.attention.grammar import GrammarMatcher
from workers.attention.hidden_rows import HiddenRows

Key = tuple[str, int]
"""(request id, attempt): a replay of a request is another sequence."""


class Finish(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    """No pages yet."""
    RECEIVING = "receiving"
    """Has pages; a prefill worker is filling them."""
    PREFILL = "prefill"
    """Has pages; some of its tokens are not computed yet."""
    DECODE = "decode"
    """One new token a step."""


class Source(enum.Enum):
    """Who computes the prompt, and what follows it."""

    LOCAL = "local"
    """Prefill and decode here."""
    REMOTE = "remote"
    """Pages come from a prefill worker; decode here."""
    PREFILL_ONLY = "prefill_only"
    """Prefill here for another worker: pages and the first token are all that is wanted."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 = greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 = all."""
    min_p: float = 0.0
    """Least share of the most probable token's probability; 0 = all."""
    seed: int = 0
    repetition_penalty: float = 1.0
    """1 = none."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    min_tokens: int = 0
    """New tokens before which none may end the sequence."""
    logprobs: int | None = None
    """Most probable tokens to tell of beside each new one; None = tell nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt."""

    @property
    def is_adjusted(self) -> bool:
        """Whether any of it changes logits before a token is chosen."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or bool(self.logit_bias)
            or self.min_tokens > 0
        )


@dataclass(frozen=True, kw_only=True)
class SequenceSpec:
    """A request as an attention worker sees it."""

    request_id: str
    attempt: int
    token_ids: tuple[int, ...]
    """The prompt, and after a replay the tokens that were generated before it."""
    num_prompt_tokens: int
    """Tokens of the client's own prompt: position 0 of sampling is behind them."""
    max_tokens: int
    """New tokens at most."""
    stop_token_ids: frozenset[int]
    sampling: Sampling
    source: Source
    first_wanted_row: int = 0
    """PREFILL_ONLY: the other worker has the rows before this one."""
    matcher: GrammarMatcher | None = field(default=None, compare=False)
    """Says which tokens may follow; None = all. Belongs to the engine thread."""
    priority: int = 0
    """Higher goes first."""
    tenant: str = ""
    """Who pays: tenants of one priority get the same share of the worker."""
    deadline_ms: int = 0
    """Milliseconds that its client had left for it when it was sent; 0 = no deadline."""

    @property
    def key(self) -> Key:
        """Identity in a worker."""
        return (self.request_id, self.attempt)

    @property
    def needs_prompt_rows(self) -> bool:
        """Whether every row of the prompt must be computed here, though cache rows of it are at hand."""
        return self.sampling.prompt_logprobs is not None

    @property
    def takes_first_token(self) -> bool:
        """Whether the first new token is the prefill worker's; else its row is computed here once more."""
        return self.source is Source.REMOTE and self.sampling.logprobs is None and self.matcher is None

    @property
    def is_adjusted(self) -> bool:
        """Whether anything changes logits before a token is chosen."""
        return self.matcher is not None or self.sampling.is_adjusted

    @property
    def is_plain(self) -> bool:
        """Whether each token is the largest logit, and that is all there is to tell."""
        sampling = self.sampling
        return sampling.temperature == 0.0 and sampling.logprobs is None and not self.is_adjusted

    @property
    def num_reserved_tokens(self) -> int:
        """Cache rows that it may need; the last new token is never fed back."""
        if self.source is Source.PREFILL_ONLY:
            return len(self.token_ids)
        return len(self.token_ids) + self.max_tokens - 1


@dataclass(frozen=True)
class Admitted:
    """The sequence has its pages."""

    num_cached_tokens: int = 0
    """Leading tokens whose rows are there already."""


@dataclass(frozen=True)
class CacheRows:
    """Finished cache rows of one layer, for another worker."""

    layer_idx: int
    first_token_idx: int
    rows_TB: Array
    """(T, B) as the cache stores them: W float32 values, or uint8 of a compact form."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, by the model's own logits."""

    logprob: float
    """Of the token that stands there."""
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the most probable ones, best first."""


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """What comes out of one row of logits."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    """None = not asked for."""
    problem: str = ""
    """Why there is no token; "" = there is one."""


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the next tokens of the prompt; the first are of token 1."""

    rows: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class RowsUnwanted:
    """The sequence gave up the pages that its rows were to come to: they are computed here instead."""


@dataclass(frozen=True)
class NewToken:
    """One more token; `finish` is set on the last."""

    token_id: int
    finish: Finish | None
    num_cached_tokens: int = 0
    """With the first token: leading tokens of the prompt that were taken from pages of earlier requests."""
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Failed:
    """The sequence is over, unfinished."""

    error: MorayError


Event = Admitted | CacheRows | RowsUnwanted | PromptLogprobs | NewToken | Failed
Sink = Callable[[Event], None]
"""Called by the engine thread; must not block."""


@dataclass
class SequenceState:
    """A sequence in the engine; the engine thread is the only one that reads or writes it."""

    spec: SequenceSpec
    sink: Sink
    phase: Phase = Phase.WAITING
    deadline_s: float = math.inf
    """On the monotonic clock."""
    patience_s: float = math.inf
    """When it is refused if it still waits, on the same clock."""
    was_admitted: bool = False
    was_preempted: bool = False
    """It gave its pages up once; what is not cached of them it computes here, whoever did so first."""
    num_expected_tokens: int = 0
    """While WAITING: leading tokens that were cached when it came."""
    fetch: Fetch | None = None
    """While WAITING: cold pages on their way to it."""
    token_ids: list[int] = field(default_factory=list)
    """Every token so far, the new ones included."""
    num_cached_tokens: int = 0
    """Leading tokens whose cache rows are computed."""
    pages: tuple[int, ...] = ()
    page_hashes: list[bytes] = field(default_factory=list)
    """Of its first full pages (wire/prefix.py), as many as were asked for."""
    num_published_pages: int = 0
    """Leading pages that others may share."""
    num_reused_tokens: int = 0
    """Tokens whose cache rows were taken from others."""
    num_prompt_logprobs: int = 0
    """Tokens of the prompt whose log-probabilities were told."""
    hidden_rows: HiddenRows = field(default_factory=HiddenRows)
    """What the MTP layer has not run over yet; empty where nothing is drafted."""
    draft_record: DraftRecord = field(default_factory=DraftRecord)
    """How its drafts did."""

    @property
    def is_fetching(self) -> bool:
        """Whether it waits for pages from files, and for nothing else."""
        return self.fetch is not None and not self.fetch.is_done

    @property
    def is_remote(self) -> bool:
        """Whether another worker computes its prompt."""
        return self.spec.source is Source.REMOTE and not self.was_preempted

    def give_up_pages(self) -> None:
        """Back to the queue, with every token and without a row."""
        self.phase = Phase.WAITING
        self.was_preempted = True
        self.patience_s = math.inf
        self.pages = ()
        self.num_cached_tokens = self.num_published_pages = 0
        self.hidden_rows = HiddenRows()

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated by this attempt."""
        return len(self.token_ids) - len(self.spec.token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose cache rows are still to be computed."""
        return len(self.token_ids) - self.num_cached_tokens
