"""Two real vLLM engines in one process, stepped by hand. Runs inside the engine environment, which has no pytest.

    python -m e2e.migration.stepped MODEL DTYPE SCENARIO...     one line of JSON each: {"scenario", "wrong": [...]}

With the scheduler's thread in the test's hands every order of steps and messages can be had at will; data channels and
control ports are real sockets and threads. After each scenario both engines must have all their blocks back.
`engine/tests/test_two_engines.py` runs all of them.
"""

import os

# Before torch is loaded: without, threads of one engine wait for each other on one core.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
