"""How log lines look, in all of the server's processes: text, or one JSON object each for machines."""

import logging
from datetime import UTC, datetime
from typing import Literal

import orjson
from bentoml.exceptions import BentoMLException
from pydantic import ValidationError

TEXT = logging.Formatter("%(asctime)s [%(levelname)s] [%(name)s] %(message)s", "%Y-%m-%dT%H:%M:%S%z")
"""BentoML's own appends a trace to every line, though nobody keeps it."""


class JsonLines(logging.Formatter):
    """A line is one JSON object; what a record brings as `fields` stands beside its time, level and logger."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name}
        line |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def is_ours(record: logging.LogRecord) -> bool:
    """Whether a record says more than the request's own line: BentoML writes the stack, and in it what was sent, of
    every request to its typed route that its caller got wrong."""
    error = record.exc_info[1] if record.exc_info else None
    is_callers = isinstance(error, BentoMLException) and error.error_code < 500
    return not (record.name.startswith("bentoml") and (is_callers or isinstance(error, ValidationError)))


def set_up_logs(form: Literal["text", "json"]) -> None:
    """Change the handlers that BentoML has made in this process."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(is_ours)
        handler.setFormatter(JsonLines() if form == "json" else TEXT)
