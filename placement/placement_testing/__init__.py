"""Fleets and judges for the tests of placement; not part of the distribution."""
