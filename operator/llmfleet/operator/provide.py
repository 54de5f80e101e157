"""What pods with the plug-in mount: the service's peer key and the plug-in itself, made where they are not there.

    ProvideMigration --> POST Secret      a new random key; one that is there stays, and is not looked at
                     --> POST ConfigMap   the plug-in; one that is there must be the same, and may get one more owner

The operator may create Secrets and not read them. The key is made here, goes into the one request, and is kept nowhere:
not in an annotation, a log line or a status. Nothing rotates it but the deletion of the Secret.

What the API server does not allow is `NotProvidedError`: the service's engines then start without the plug-in.
"""

from __future__ import annotations

import base64
import logging
import secrets
import time
from collections.abc import Callable
from typing import TypeAlias

from lightkube import ApiError, AsyncClient
from lightkube.types import PatchType

from llmfleet.api import LLMService
from llmfleet.api.meta import LABEL_COMPONENT, LABEL_SERVICE, PEER_KEY
from llmfleet.operator.kinds import CONFIG_MAPS, SECRETS
from llmfleet.operator.model import FIELD_MANAGER, Manifest, PluginPackage
from llmfleet.operator.plugin_package import config_map, shared_owner
from llmfleet.operator.render import owner_reference

log = logging.getLogger(__name__)

KEY_BYTES = 32
COMPONENT_PEER_KEY = "peer-key"
THERE_FOR_S = 300.0
"""How long a namespace is taken to have the plug-in, once it was seen there."""
MOST_OWNERS = 8
"""Of the plug-in. Each is a line of metadata, which the API server merges anew for every further one: with a
thousand it was busy for five minutes. Should all eight go at once, the plug-in goes with them, and the next one that
asks for it makes it again; pods that run keep theirs."""
_Place: TypeAlias = tuple[str, str]
"""(namespace, name) of the plug-in's ConfigMap."""
_REFUSALS = (400, 403, 422)
_EXISTS = 409


class NotProvidedError(Exception):
    """The API server refuses what pods with the plug-in need."""


class Provider:
    """Makes them. A namespace that was seen to have the plug-in is not sent it again for each of its services."""

    def __init__(self, client: AsyncClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._there_until_s: dict[_Place, float] = {}
        self._owners: dict[_Place, set[str]] = {}
        """By place of the plug-in, uids of the services that are among its owners."""

    async def provide(self, service: LLMService, secret: str, package: PluginPackage) -> None:
        """Both, where they are not there. Raises NotProvidedError, and lightkube.ApiError for what may pass."""
        place = service.metadata.namespace or "", package.name
        try:
            await _provide_key(self._client, service, secret)
            if self._there_until_s.get(place, 0.0) <= self._clock():
                self._owners[place] = await _provide_plug_in(self._client, service, package)
                self._there_until_s[place] = self._clock() + THERE_FOR_S
            owners = self._owners[place]
            if service.metadata.uid not in owners and len(owners) < MOST_OWNERS:
                await self._own(service, place)
        except ApiError as error:
            if error.status.code in _REFUSALS:
                what = f"Secret {place[0]}/{secret} or ConfigMap {place[0]}/{package.name}"
                raise NotProvidedError(f"{what} was refused by the API server: {error.status.message}") from None
            raise

    async def _own(self, service: LLMService, place: _Place) -> None:
        # Merged by uid, so that services which come at the same time do not take each other out.
        patch = {"metadata": {"ownerReferences": [shared_owner(service)]}}
        try:
            await self._client.patch(
                CONFIG_MAPS, place[1], patch, namespace=place[0], patch_type=PatchType.STRATEGIC,
                field_manager=FIELD_MANAGER,
            )  # fmt: skip
        except ApiError:
            self._there_until_s.pop(place, None)  # perhaps it is gone: the next try looks
            raise
        self._owners[place].add(service.metadata.uid)


def peer_key_manifest(service: LLMService, secret: str) -> Manifest:
    """A Secret with a new key. It is not to be logged."""
    key = secrets.token_hex(KEY_BYTES)
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": secret,
            "namespace": service.metadata.namespace,
            "labels": {LABEL_COMPONENT: COMPONENT_PEER_KEY, LABEL_SERVICE: service.metadata.name},
            "ownerReferences": [owner_reference(service)],
        },
        "type": "Opaque",
        "immutable": True,
        "data": {PEER_KEY: base64.b64encode(key.encode()).decode()},
    }


async def _provide_key(client: AsyncClient, service: LLMService, secret: str) -> None:
    try:
        await client.create(SECRETS.from_dict(peer_key_manifest(service, secret)), field_manager=FIELD_MANAGER)
    except ApiError as error:
        if error.status.code != _EXISTS:
            raise
    else:
        log.info("made a peer key", extra={"kind": "Secret", "object": f"{service.metadata.namespace}/{secret}"})


async def _provide_plug_in(client: AsyncClient, service: LLMService, package: PluginPackage) -> set[str]:
    """The uids of its owners."""
    manifest = config_map(package, service)
    namespace = service.metadata.namespace
    try:
        await client.create(CONFIG_MAPS.from_dict(manifest), field_manager=FIELD_MANAGER)
    except ApiError as error:
        if error.status.code != _EXISTS:
            raise
    else:
        log.info("created", extra={"kind": "ConfigMap", "object": f"{namespace}/{package.name}"})
        return {service.metadata.uid}
    live = await client.get(CONFIG_MAPS, package.name, namespace=namespace)
    if live.get("binaryData") != manifest["binaryData"]:
        raise NotProvidedError(
            f"ConfigMap {namespace}/{package.name} has other content than the plug-in of this operator; delete it"
        )
    return {owner["uid"] for owner in live["metadata"].get("ownerReferences") or ()}
