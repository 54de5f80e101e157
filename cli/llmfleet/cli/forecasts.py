"""`llmfleet plan --forecast`: what demand is expected to come, from a file.

In flow the inputs of a plan and a `Forecast` as JSON or YAML; out flow the inputs with it. A forecast that says
something of a service that is not planned, or has other buckets than its profile, is refused: nothing is left out
silently.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from llmfleet.api import Forecast
from llmfleet.cli.refused import RefusedError, shown
from llmfleet.placement import PlanInputs


def with_forecast(inputs: PlanInputs, path: Path | None) -> PlanInputs:
    """The inputs with the forecast of a file, unchanged without one. Raises RefusedError, with path and value."""
    if path is None:
        return inputs
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        forecast = Forecast.model_validate(content, extra="forbid")
        return PlanInputs.model_validate({**dict(inputs), "forecast": {one.key: one for one in forecast.services}})
    except OSError as error:
        raise RefusedError(f"--forecast {path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RefusedError(f"--forecast {path}: not YAML or JSON: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        if first["type"] == "value_error":
            raise RefusedError(f"--forecast {path}: {where + ': ' if where else ''}{message}") from error
        raise RefusedError(f"--forecast {path}: {where or 'the file'} is {shown(first['input'])}: {message}") from error
