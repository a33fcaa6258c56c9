"""How the drafts of one sequence did lately, and how many of a step's drafts it gets by that. Pure.

A batch mixes texts: code that repeats itself beside a poem. The policy (workers/attention/speculation.py)
says how many tokens a step drafts at most; a sequence whose drafts rarely stand gets fewer, or rests.

    chance 0.6, 3 drafts: 3, for 0.6 ** 3 = 0.22 of the third ones stand    0.4: 2    0.3: 1    0.05: none
"""

from dataclasses import dataclass

_LEAST_CHANCE = 0.1
"""Of a draft to stand; below it a draft pays only where it is nearly free, and then it gains little."""
_MEMORY = 0.95
"""What a draft still counts for when the next one came: about the last twenty count."""
_REST_STEPS = 32
"""Steps without a draft until the next try."""


@dataclass
class DraftRecord:
    """Drafts of one sequence, the older counting less; it begins with a guess that weighs two drafts."""

    num_drafted: float = 2.0
    """Those whose predecessors stood."""
    num_accepted: float = 1.2
    num_rests: int = 0
    """Steps since it had a draft."""

    @property
    def chance(self) -> float:
        """That its next draft stands."""
        return self.num_accepted / self.num_drafted

    def plan_drafts(self, most: int) -> int:
        """How many tokens to draft for it in a step that drafts at most so many a sequence."""
        num_drafts, chance = 0, self.chance
        while num_drafts < most and chance >= _LEAST_CHANCE:
            num_drafts += 1
            chance *= self.chance
        is_try = num_drafts == 0 and self.num_rests >= _REST_STEPS
        return min(most, 1) if is_try else num_drafts

    def on_step(self, num_drafts: int, num_accepted: int) -> None:
        """A step drafted so many of its tokens, and the first few of them stood."""
        if num_drafts == 0:
            self.num_rests += 1
            return
        for idx in range(min(num_drafts, num_accepted + 1)):
            self.num_drafted = self.num_drafted * _MEMORY + 1
            self.num_accepted = self.num_accepted * _MEMORY + (idx < num_accepted)
        # A try that stood is followed by another at once.
        self.num_rests = _REST_STEPS if num_accepted else 0
