"""Live migration between two real engines, as a client sees it.

answer.py       what a response says, in fields that only grow; the splice of two legs
leg.py          one engine's response to the client's request
owner.py        the owner of a client's stream
compare.py      whether two clients got the same
pair.py         two vLLMs with the plug-in, each on a core of its own
rig.py          clients of both, and a coordinator between them
cases.py        requests that use all that has to survive
faults.py       what goes wrong, at a chosen moment
fake_engine.py  an engine that breaks at a chosen byte, for the owner's own tests
protocol_engine.py, protocol_client.py  the protocol's state machines as engine and owner, for tests of what is between
"""
