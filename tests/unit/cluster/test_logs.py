"""Logs: one JSON object a line, each with the role and id of its process."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.logs import JsonFormatter, configure_logging

FORMATTER = JsonFormatter(role="expert", member_id="expert-0")


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back as it was afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def record(message: str, *args: object, **more: Any) -> logging.LogRecord:
    fields = {"name": "workers.expert", "levelno": logging.WARNING, "levelname": "WARNING", **more}
    made = logging.makeLogRecord({"msg": message, "args": args, **fields})
    made.created, made.msecs = 1_700_000_000.25, 250.0
    return made


def test_line_says_who_when_what_and_how_bad() -> None:
    assert json.loads(FORMATTER.format(record("slot %d of %s", 3, "expert-0"))) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "WARNING",
        "role": "expert",
        "id": "expert-0",
        "logger": "workers.expert",
        "message": "slot 3 of expert-0",
    }


@pytest.mark.parametrize("message", ["two\nlines", 'a "quote" and \\', "\r\n\t\x00", "déjà vu 你好"])
def test_any_message_is_one_line(message: str) -> None:
    line = FORMATTER.format(record("%s", message))
    assert "\n" not in line
    assert "\r" not in line
    assert json.loads(line)["message"] == message


def test_text_is_readable_in_the_line() -> None:
    assert "你好" in FORMATTER.format(record("你好"))


def test_exception_is_in_the_same_line() -> None:
    try:
        raise ValueError("bad\nslot")
    except ValueError as error:
        line = FORMATTER.format(record("failed", exc_info=(type(error), error, error.__traceback__)))
    assert "\n" not in line
    told = json.loads(line)
    assert told["message"] == "failed"
    assert told["exception"].startswith("Traceback (most recent call last):")
    assert told["exception"].endswith("ValueError: bad\nslot")


def test_process_logs_lines_of_its_level_to_stderr(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("INFO", role="router", member_id="router-0")
    logger = logging.getLogger("router.front")
    logger.debug("quiet")
    logger.info("ready on %d", 50051)
    out, err = capsys.readouterr()
    (told,) = [json.loads(line) for line in err.splitlines()]
    assert (told["role"], told["id"], told["level"], told["message"]) == (
        "router",
        "router-0",
        "INFO",
        "ready on 50051",
    )
    assert out == ""


def test_handlers_of_before_are_replaced(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        configure_logging("WARNING", role="router", member_id="router-0")
    logging.getLogger("x").warning("once")
    assert len(capsys.readouterr().err.splitlines()) == 1
