"""Logging: JSON lines on stderr, each with the role and id of the process."""

import json
import logging
import sys
import time


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, role, id, logger, message."""

    def __init__(self, *, role: str, member_id: str) -> None:
        super().__init__()
        self._who = {"role": role, "id": member_id}

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname,
            **self._who,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(level: str, *, role: str, member_id: str) -> None:
    """Sends the process's log to stderr; replaces what handlers there were."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(role=role, member_id=member_id))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
