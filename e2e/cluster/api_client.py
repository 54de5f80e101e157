"""A small client of the API server: JSON over one HTTPS connection with the administrator's certificate.

The cluster's own code uses it where a kubectl process per call would be slow (readiness polls many times a second,
nodes by the thousand) or would need text parsed back. It verifies the server against the cluster's own authority.
One connection, so one thread at a time.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from e2e.cluster.certificates import Authority, KeyPair
from e2e.cluster.state import ClusterError

Json = dict[str, Any]


class ApiError(ClusterError):
    """The API server's refusal: `status` is the HTTP status, the message the server's own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"API server answered {status}: {message}")
        self.status = status


class ApiClient:
    """Calls `https://host:port` as the holder of `identity`; a context manager that closes its connection."""

    def __init__(self, host: str, port: int, authority: Authority, identity: KeyPair) -> None:
        context = ssl.create_default_context(cafile=str(authority.pair.certificate))
        context.load_cert_chain(identity.certificate, identity.key)
        self._connection = http.client.HTTPSConnection(host, port, timeout=10, context=context)

    def request(self, method: str, path: str, body: Json | None = None, content: str = "json") -> str:
        """One call; `content` is the body's media type after `application/`. Returns the answer's text.

        Raises ApiError for a status of 400 and above, OSError or http.client.HTTPException without an answer.
        """
        try:
            encoded = None if body is None else json.dumps(body)
            self._connection.request(method, path, encoded, {"Content-Type": f"application/{content}"})
            answer = self._connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException):
            self._connection.close()  # the next call opens a new one
            raise
        if answer.status >= 400:
            raise ApiError(answer.status, _message(text))
        return text

    def get(self, path: str) -> Json:
        return _object(self.request("GET", path))

    def create(self, path: str, body: Json) -> Json:
        return _object(self.request("POST", path, body))

    def merge(self, path: str, body: Json) -> Json:
        """Patch an object by a JSON merge patch (RFC 7396)."""
        return _object(self.request("PATCH", path, body, "merge-patch+json"))

    def answers(self, path: str) -> bool:
        """Whether the server is there and answers `path` with success."""
        try:
            self.request("GET", path)
        except (OSError, http.client.HTTPException, ApiError):
            return False
        return True

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()


def is_ready(node: Json) -> bool:
    """Whether a Node object says Ready."""
    conditions: list[Json] = node["status"].get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def grant_cluster_role(client: ApiClient, role: str, user: str, rules: Sequence[Json] = ()) -> None:
    """Bind `user` to the cluster role `role`, which is created first where rules are given."""
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    if rules:
        client.create(f"{rbac}/clusterroles", {"metadata": {"name": role}, "rules": list(rules)})
    subject = {"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": user}
    reference = {"kind": "ClusterRole", "apiGroup": "rbac.authorization.k8s.io", "name": role}
    binding = {"metadata": {"name": user}, "subjects": [subject], "roleRef": reference}
    client.create(f"{rbac}/clusterrolebindings", binding)


def _object(text: str) -> Json:
    parsed: Json = json.loads(text)
    return parsed


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()
