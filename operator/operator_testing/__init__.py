"""What the operator is tested with: a cluster that lives in memory.

Not part of the distribution. A package beside `tests`, so that it has a name of its own on the import path.
"""
