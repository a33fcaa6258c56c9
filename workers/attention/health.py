"""Whether an attention worker can make a token: what is known of it, and the verdict. Pure."""

from dataclasses import dataclass

from wire.errors import MorayError

_MOST_FAILED_PROBES = 3
"""Probes in a row that fail by the worker's own fault before it asks to be replaced."""


@dataclass(frozen=True, kw_only=True)
class HealthRules:
    """When a worker looks after itself, and when it gives itself up."""

    probe_s: float
    """Seconds without a new token after which it makes one for itself; 0 = never."""
    stuck_s: float
    """Seconds that a step may take before the worker counts as stuck."""
    hopeless_s: float
    """Seconds after which a step never ends: longer than any wait for expert workers."""


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What is known now; the defaults are those of a healthy worker."""

    is_leaving: bool = False
    is_engine_alive: bool = True
    has_table: bool = True
    has_experts: bool = True
    """At least one expert worker can be reached."""
    step_s: float = 0.0
    """Seconds since the engine last was between two steps."""
    probe_error: MorayError | None = None
    """Why the last probe made no token."""
    num_failed_probes: int = 0
    """In a row."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the worker says of itself."""

    trouble: str = ""
    """Why it can take no requests; "" = it can."""
    needs_restart: bool = False
    """Only another process mends it."""


def judge(signs: Signs, rules: HealthRules) -> Verdict:
    """What follows from the signs; the first thing that keeps a worker from making tokens is named.

    Worked example: stuck_s 20, hopeless_s 80. A step of 30 s makes the worker stuck: it may wait for expert
    workers, and be well again. At 81 s nothing that it waits for can come any more.

    Args:
        signs: what is known now.
        rules: the limits.
    """
    if not signs.is_engine_alive:
        return Verdict(trouble="its engine has ended", needs_restart=True)
    if signs.is_leaving:
        return Verdict(trouble="it is leaving")
    if not signs.has_table:
        return Verdict(trouble="it has no routing table")
    if signs.step_s > rules.stuck_s:
        trouble = f"a step has not ended for more than {rules.stuck_s:g} s"
        return Verdict(trouble=trouble, needs_restart=signs.step_s > rules.hopeless_s)
    if not signs.has_experts:
        return Verdict(trouble="no expert worker can be reached")
    if signs.probe_error is not None:
        error = signs.probe_error
        is_own_fault = not error.is_retryable
        return Verdict(
            trouble=f"it cannot make a token: {type(error).__name__}: {error.message}",
            needs_restart=is_own_fault and signs.num_failed_probes >= _MOST_FAILED_PROBES,
        )
    return Verdict()
