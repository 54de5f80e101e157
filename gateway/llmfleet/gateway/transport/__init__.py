"""Moving bytes between clients and engines: asyncio protocols on uvloop, HTTP parsed by httptools on both sides.

    server      a client's connection      exchange    one request: engines, deadlines, retries
    upstream    engines' connections       answer      one answer on its way: held back, relayed, broken off
    sse         looking at a stream without getting in its way
    plane       what requests share        dataplane   the narrow interface to the rest of the gateway
    tls         certificates of the listener
    http, body, errors, limits             heads and framing, request bodies, OpenAI-shaped errors, bounds

The structure and the numbers behind it were measured: a read from an engine becomes one write to the client, a token
costs no task, no timer and no JSON, and most of what is left is the kernel's.
"""

from llmfleet.gateway.transport.dataplane import AsyncioDataPlane, DataPlane, listening_socket
from llmfleet.gateway.transport.limits import Limits
from llmfleet.gateway.transport.tls import Certificate, TlsError

__all__ = ["AsyncioDataPlane", "Certificate", "DataPlane", "Limits", "TlsError", "listening_socket"]
