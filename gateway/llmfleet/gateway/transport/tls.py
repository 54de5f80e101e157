"""TLS to clients: a certificate chain and its key from files, read again when they change.

In flow two paths; out flows one `SSLContext` for the listener, which lasts as long as the gateway. Whoever renews a
certificate (cert-manager through the kubelet, certbot) replaces the files. New connections then get the new one, open
connections keep theirs. Files that cannot be used, such as a certificate beside the key of the one before, leave the
last pair that could be in force.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

log = logging.getLogger("llmfleet.gateway")

RENEW_EVERY_S = 10.0
"""How often the files are looked at."""
HANDSHAKE_S = 10.0
"""How long a client may take to its handshake."""
SHUTDOWN_S = 5.0
"""How long a client may take to say that it has read the end."""


class TlsError(ValueError):
    """The files are no certificate and key that belong together; the message names them."""


class Certificate:
    """A certificate chain and its key, PEM. Raises TlsError."""

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain = chain
        self._key = key
        self._seen = self._state()
        self._current = _context(chain, key)
        self.context = _context(chain, key)
        """For the listener; it hands each connection to the context of the newest pair."""
        self.context.sni_callback = self._use_current

    def _use_current(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current

    def renew(self) -> bool:
        """Reads the files if they have changed; whether another pair is in force now. Raises TlsError."""
        state = self._state()
        if state == self._seen:
            return False
        self._current = _context(self._chain, self._key)
        self._seen = state
        return True

    async def watch(self, every_s: float = RENEW_EVERY_S) -> None:
        """Renews for as long as it runs."""
        said = ""
        while True:
            await asyncio.sleep(every_s)
            try:
                if self.renew():
                    log.info("new connections get the certificate that %s holds now", self._chain)
                said = ""
            except TlsError as error:
                # Once per defect: it may last until somebody comes.
                if said != str(error):
                    log.error("the last certificate stays in force: %s", error)
                said = str(error)

    def _state(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(_identity(path) for path in (self._chain, self._key))


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _context(chain: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(chain, key, password=_no_password)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        wanted = "tls-cert and tls-key must be a PEM certificate chain and its unencrypted key"
        raise TlsError(f"{wanted}, got {chain} and {key}: {reason}") from None
    return context


def _no_password() -> str:
    """Else OpenSSL would ask on the terminal."""
    raise ValueError("the key is encrypted")
