"""The cluster's own certificate authority, and the identities it hands out.

Each cluster makes a fresh authority with the `openssl` command (3.0 or later: one call makes and signs a
certificate), so that kubeconfigs can name it instead of skipping verification. Components sign in with client
certificates under the user and group names that Kubernetes' built-in roles are bound to; nobody shares an identity.
Keys are P-256: as strong as needed and made in milliseconds.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster.processes import clean_environment
from e2e.cluster.state import ClusterError

_OPENSSL_CONFIGURATION = """\
[req]
distinguished_name = subject
prompt = no
[subject]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, digitalSignature
subjectKeyIdentifier = hash
[client]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = clientAuth
[server]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = serverAuth
subjectAltName = {alternative_names}
"""


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority in `directory`; `create` makes it, the constructor finds it again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pair = KeyPair(directory / "ca.crt", directory / "ca.key")

    @classmethod
    def create(cls, directory: Path) -> Authority:
        """Raises ClusterError where openssl is missing or older than 3.0."""
        if shutil.which("openssl") is None:
            raise ClusterError("openssl is not on PATH: install the openssl package (3.0 or later)")
        directory.mkdir(mode=0o700)
        authority = cls(directory)
        authority._certificate("ca", "/CN=llmfleet local cluster", "authority", (), sign=False)
        return authority

    def client(self, user: str, groups: Iterable[str] = ()) -> KeyPair:
        """An identity: the common name is the user, each organisation a group."""
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        return self._certificate(user.replace(":", "-"), subject, "client", (), sign=True)

    def server(self, name: str, alternative_names: Iterable[str]) -> KeyPair:
        """A serving certificate for names written as openssl wants them: `DNS:...` or `IP:...`."""
        return self._certificate(f"serving-{name}", f"/CN={name}", "server", alternative_names, sign=True)

    def signing_key(self, name: str) -> None:
        """Make a bare key pair, `<name>.key` and `<name>.pub` (for service-account tokens)."""
        key, public = str(self.directory / f"{name}.key"), str(self.directory / f"{name}.pub")
        _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key)
        _openssl("pkey", "-in", key, "-pubout", "-out", public)

    def _certificate(
        self, name: str, subject: str, kind: str, alternative_names: Iterable[str], *, sign: bool
    ) -> KeyPair:
        pair = KeyPair(self.directory / f"{name}.crt", self.directory / f"{name}.key")
        configuration = self.directory / f"{name}.cnf"
        names = ", ".join(alternative_names) or "DNS:unused"
        configuration.write_text(_OPENSSL_CONFIGURATION.format(alternative_names=names))
        signer = ["-CA", str(self.pair.certificate), "-CAkey", str(self.pair.key)] if sign else []
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "365", "-config", str(configuration), "-extensions", kind, "-subj", subject),
            *signer,
            *("-out", str(pair.certificate), "-keyout", str(pair.key)),
        )
        configuration.unlink()
        return pair


def write_kubeconfig(path: Path, server: str, authority: Authority, user: str, credentials: KeyPair | str) -> Path:
    """Write a kubeconfig that signs in to `server` with a client certificate, or with a bearer token (str).

    Everything is inline, so the file can be copied anywhere. It is YAML by being JSON. Only its owner may read it.
    """
    if isinstance(credentials, str):
        identity: dict[str, Any] = {"token": credentials}
    else:
        identity = {
            "client-certificate-data": _inline(credentials.certificate),
            "client-key-data": _inline(credentials.key),
        }
    cluster = {"server": server, "certificate-authority-data": _inline(authority.pair.certificate)}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "llmfleet", "cluster": cluster}],
        "users": [{"name": user, "user": identity}],
        "contexts": [{"name": "llmfleet", "context": {"cluster": "llmfleet", "user": user}}],
        "current-context": "llmfleet",
    }
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def _inline(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, env=clean_environment())
    if done.returncode != 0:
        raise ClusterError(f"openssl {arguments[0]} failed (version 3.0 or later is needed): {done.stderr.strip()}")
