"""What is asked, when, and what became of it."""

from dataclasses import dataclass
from typing import Literal

Arrivals = Literal["poisson", "gamma", "constant"]
"""What the gaps between two requests are drawn from."""


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """One request of a load."""

    at_s: float
    """Seconds after the beginning at which it is due; not used in a closed loop."""
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request; moments are seconds after the beginning of the load."""

    due_s: float
    """When it should have been sent; in a closed loop, when it was."""
    sent_s: float
    ended_s: float
    token_s: tuple[float, ...] = ()
    """When each new token came; those of one message came together."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of the prompt, those that were not computed again."""
    is_refused: bool = False
    """For lack of capacity, before any work."""
    retry_after_s: float = 0.0
    """When a refused request should be tried again; 0 = the refusal does not say."""
    error: str = ""
    """Why there is no whole answer; empty when there is."""

    @property
    def is_done(self) -> bool:
        """Whether the answer is whole."""
        return not self.error and bool(self.token_s)

    @property
    def ttft_s(self) -> float:
        """From when it was due to its first token: a load generator that is late hides nothing."""
        return self.token_s[0] - self.due_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Between tokens that follow each other."""
        return tuple(b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False))

    @property
    def mean_gap_s(self) -> float:
        """Of a single token, 0."""
        return (self.token_s[-1] - self.token_s[0]) / max(len(self.token_s) - 1, 1)


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """What an answer must keep to count as good; 0 = no limit."""

    ttft_ms: float = 0.0
    itl_ms: float = 0.0
    """Mean of the request's own gaps between tokens."""

    def are_met(self, outcome: Outcome) -> bool:
        """Whether the answer is whole and came in time."""
        if not outcome.is_done:
            return False
        is_first_in_time = not self.ttft_ms or outcome.ttft_s * 1e3 <= self.ttft_ms
        return is_first_in_time and (not self.itl_ms or outcome.mean_gap_s * 1e3 <= self.itl_ms)
