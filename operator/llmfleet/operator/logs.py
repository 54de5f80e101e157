"""Structured logs: one JSON object per line for machines, or one plain line for people.

Code logs a fixed sentence and passes what varies as `extra` fields, so that `msg` can be grouped and the fields be
searched: `log.info("applied", extra={"service": key, "kind": "Deployment"})`. Secrets do not reach a log: no
request headers, no tokens and no environment of pods are ever logged, and the HTTP libraries, which log addresses
and headers at their own levels, are held at WARNING.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Literal

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_NOISY = ("aiohttp", "asyncio", "httpcore", "httpcore2", "httpx", "httpx2", "kopf")


def configure(log_format: Literal["json", "console"], level: str) -> None:
    """Sends the root logger to stderr in the given format, replacing whatever handlers there were."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    handler.addFilter(_not_every_attempt)
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))


def _not_every_attempt(record: logging.LogRecord) -> bool:
    """kopf logs each attempt of each watch during an outage; the third says it, and then every hundredth."""
    attempt = re.match(r"Request attempt #(\d+) failed; will retry", record.getMessage())
    return attempt is None or int(attempt[1]) == 3 or int(attempt[1]) % 100 == 0


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """`{"time": ..., "level": ..., "logger": ..., "msg": ..., <fields>}`, and `error` with the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """`12:00:00.000 INFO  applied  service=default/chat kind=Deployment`."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        line = f"{_timestamp(record)[11:-1]} {record.levelname:<7} {record.getMessage()}"
        line = f"{line}  {fields}" if fields else line
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
