"""Gives every component's tests the local cluster's fixtures (`control_plane`, `node_cluster`, `namespace`).

`e2e` is not part of the distribution, so nothing else puts the checkout on the import path for bare `pytest`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

pytest_plugins = ["e2e.cluster.pytest_plugin"]
