"""Streams that move: what was told to a client, who owns its stream, and how it leaves an engine.

told      what a client has got of each field, and the cut of a leg that repeats it (pure)
owner     one client's stream as RFC 2's owner
controls  control connections to engines, and their token journals
resume    a stream whose engine died
drains    the streams of an engine that leaves
"""
