"""What the gateway is tested and benchmarked with: a misbehaving engine, a data plane in front of it, tables.

Not part of the distribution. A package beside `tests`, so that it has a name of its own on the import path.
"""
