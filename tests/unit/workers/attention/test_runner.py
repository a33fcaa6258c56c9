"""What a step is for: its calls of experts say so."""

import pytest

from wire import phases
from workers.attention.runner import step_phase
from workers.attention.types import Phase, Sampling, SequenceSpec, SequenceState, Source


def sequence(phase: Phase) -> SequenceState:
    spec = SequenceSpec(
        request_id="r",
        attempt=0,
        token_ids=(1, 2, 3),
        num_prompt_tokens=3,
        max_tokens=4,
        stop_token_ids=frozenset(),
        sampling=Sampling(),
        source=Source.LOCAL,
    )
    return SequenceState(spec, lambda _: None, token_ids=[1, 2, 3], phase=phase)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_decoding", "wanted"),
    [(256, 20, "prefill"), (0, 3, "decode"), (3, 0, "prefill"), (4, 4, "decode"), (5, 4, "prefill")],
)
def test_step_is_for_what_most_of_its_rows_are(
    num_prompt_tokens: int, num_decoding: int, wanted: phases.Phase
) -> None:
    running = [(sequence(Phase.DECODE), 1)] * num_decoding
    if num_prompt_tokens:
        running.append((sequence(Phase.PREFILL), num_prompt_tokens))
    assert step_phase(running) == wanted
