"""A real vLLM on the CPU of this machine, for tests and the demo.

environment.py   installs vLLM into the cache, once
tiny_model.py    builds the model that it serves, once
command.py       the one way in which it is started: command, environment, what a pod must mount
server.py        `EngineServer`: a running engine on loopback
cpu_quota.py     slower engines: a share of a core, enforced by the kernel
"""

from e2e.engine.command import EngineLayout, HostMount, engine_args, engine_env, host_mounts
from e2e.engine.environment import EngineError, engine_environment
from e2e.engine.server import EngineOptions, EngineServer
from e2e.engine.tiny_model import tiny_model

__all__ = [
    "EngineError",
    "EngineLayout",
    "EngineOptions",
    "EngineServer",
    "HostMount",
    "engine_args",
    "engine_env",
    "engine_environment",
    "host_mounts",
    "tiny_model",
]
