"""What bits of a row do not depend on in native kernels: the rows beside it, threads, the run."""

import pytest
import torch

from tests.unit.model.implementations import NATIVE, named_kernels
from tests.unit.model.kernels.operations import NUM_ROWS, OPERATIONS

WINDOWS = (slice(0, 1), slice(299, 300), slice(5, 37), slice(40, 57), slice(100, 300))
"""A row alone, a batch of 32, a few, and hundreds; `slice(0, NUM_ROWS)` is what they are compared with."""


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", NATIVE)
def test_bits_of_a_row_do_not_depend_on_others_threads_or_run(
    name: str, operation: str, num_threads: int
) -> None:
    run = OPERATIONS[operation]
    whole = run(named_kernels(name), slice(0, NUM_ROWS))
    kernels = named_kernels(name, num_threads=num_threads)
    differing = [window for window in WINDOWS if not torch.equal(run(kernels, window), whole[window])]
    assert differing == []
    assert torch.equal(run(kernels, slice(0, NUM_ROWS)), whole)


@pytest.mark.parametrize("name", NATIVE)
def test_selection_does_not_depend_on_others_or_threads(name: str) -> None:
    """Few levels, so that ties are everywhere."""
    scores = torch.randint(0, 20, (40, 300), generator=torch.Generator().manual_seed(1)).float()
    whole = named_kernels(name).select_positions(scores, first_position=260, num_selected=100)
    two = named_kernels(name, num_threads=2)
    assert torch.equal(two.select_positions(scores, first_position=260, num_selected=100), whole)
    alone = [
        two.select_positions(scores[i : i + 1], first_position=260 + i, num_selected=100) for i in range(40)
    ]
    assert torch.equal(torch.cat(alone), whole)
