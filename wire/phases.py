"""The two phases of a request: prefill computes its prompt, decode one new token after another."""

from typing import Literal

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
