"""Live migration of running requests: the protocol of RFC 2 as pure state machines.

    source        the engine that a request leaves
    destination   the engine that it comes to
    stream        whoever holds the client's stream
    coordinator   what is asked of whom, in which order, and what follows

Each is a function from a state and an event to the next state and effects, which whoever owns the sockets, the
scheduler or the KV cache carries out. They hold no clock and no connection, so that every order of events can be
tried (`tests/test_every_order.py`).
"""
