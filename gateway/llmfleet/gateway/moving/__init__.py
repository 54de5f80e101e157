"""Streams that move: what was told to a client, who owns its stream, and how it leaves an engine.

recorder  what passes to a client, kept at next to no cost
told      what a client has got of each field, and the cut of a leg that repeats it (pure)
owner     one client's stream as RFC 2's owner
journal   the tokens that an engine has made for this gateway's streams
moves     all requests by engine, and the ways to engines' plug-ins
carry     one migration
drains    the streams of an engine that leaves
rebalance streams that lose less time elsewhere
resume    a stream whose engine died
"""
