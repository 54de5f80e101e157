"""`llmfleet profile`: what a running engine does under load, as an entry of a ModelProfile.

    settings.py     what to measure
    engine.py       one request against an OpenAI-compatible engine, with the times of its tokens
    prompts.py      random prompts of an exact number of tokens
    load.py         a closed loop at one concurrency: what finishes inside a window
    statistics.py   a window as a measured point
    measure.py      all points of the grid
    document.py     the measurement as YAML, alone or merged into a ModelProfile
    fitting.py      `llmfleet profile --buckets-from`: the buckets that suit a trace
    configured.py   how the engine has to be started for a variant, and whether it was
    importing.py    `llmfleet profile import`: results of other tools in place of a measurement of ours

A number in a ModelProfile decides how many engines are bought, so nothing that is measured here is estimated: every
point is seen to run, every request has the sizes that it is counted under, and one failed request ends the measurement.
"""

from llmfleet.cli.profiling.configured import start_command
from llmfleet.cli.profiling.document import (
    buckets_of,
    configuration_of,
    measurement_yaml,
    merge_measurement,
    model_of,
)
from llmfleet.cli.profiling.measure import profile_engine
from llmfleet.cli.profiling.settings import ProfileSettings

__all__ = [
    "ProfileSettings",
    "buckets_of",
    "configuration_of",
    "measurement_yaml",
    "merge_measurement",
    "model_of",
    "profile_engine",
    "start_command",
]
