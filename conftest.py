"""Gives every component's tests the local cluster's fixtures (`control_plane`, `node_cluster`, `namespace`).

`e2e` is not part of the distribution, so nothing else puts the checkout on the import path for bare `pytest`.

Property tests draw the same examples every time, so that a commit fails and not a throw of dice; `make test-full`
draws others (`--hypothesis-profile=explore`). No example has a deadline: on a busy machine it is a test of the machine.
"""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

pytest_plugins = ["e2e.cluster.pytest_plugin"]

settings.register_profile("repeat", derandomize=True, deadline=None)
settings.register_profile("explore", print_blob=True, deadline=None)
settings.load_profile("repeat")
