"""Progress of loading, for logs."""

import logging

from model.weights import OnProgress


def log_progress(log: logging.Logger, what: str) -> OnProgress:
    """Logs every tenth of a load.

    Example: 40 experts are logged when 4, 8, 12, ... are loaded.
    """

    def on_progress(num_done: int, num_all: int) -> None:
        if num_done * 10 // num_all > (num_done - 1) * 10 // num_all:
            log.info("%s: %d of %d loaded", what, num_done, num_all)

    return on_progress
