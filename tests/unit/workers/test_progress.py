"""Progress in logs: each tenth once, the end always, whatever the number."""

import logging

import pytest

from workers.progress import log_progress


@pytest.mark.parametrize(("num_all", "num_lines"), [(1, 1), (3, 3), (10, 10), (40, 10), (1537, 10)])
def test_progress_logs_at_most_ten_lines_and_the_end(
    caplog: pytest.LogCaptureFixture, num_all: int, num_lines: int
) -> None:
    caplog.set_level(logging.INFO)
    on_progress = log_progress(logging.getLogger("test"), "experts of expert-0")
    for num_done in range(1, num_all + 1):
        on_progress(num_done, num_all)
    assert len(caplog.messages) == num_lines
    assert caplog.messages[-1] == f"experts of expert-0: {num_all} of {num_all} loaded"
