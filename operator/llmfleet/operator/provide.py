"""What pods with the plug-in mount: the service's peer key and the plug-in itself, made where they are not there.

    ProvideMigration --> POST Secret      a new random key; one that is there stays, and is not looked at
                     --> POST ConfigMap   the plug-in; one that is there must be the same, and gets one more owner

The operator may create Secrets and not read them. The key is made here, goes into the one request, and is kept nowhere:
not in an annotation, a log line or a status. Nothing rotates it but the deletion of the Secret.

What the API server does not allow is `NotProvidedError`: the service's engines then start without the plug-in.
"""

from __future__ import annotations

import base64
import logging
import secrets

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
_REFUSALS = (400, 403, 422)
_EXISTS = 409


class NotProvidedError(Exception):
    """The API server refuses what pods with the plug-in need."""


async def provide(client: AsyncClient, service: LLMService, secret: str, package: PluginPackage) -> None:
    """Both, where they are not there. Raises NotProvidedError, and lightkube.ApiError for what may pass."""
    namespace = service.metadata.namespace or ""
    try:
        await _provide_key(client, service, secret)
        await _provide_plug_in(client, service, package)
    except ApiError as error:
        if error.status.code in _REFUSALS:
            what = f"{namespace}/{secret} or ConfigMap {namespace}/{package.name}"
            raise NotProvidedError(f"Secret {what} was refused by the API server: {error.status.message}") from None
        raise


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


async def _provide_plug_in(client: AsyncClient, service: LLMService, package: PluginPackage) -> None:
    manifest = config_map(package, service)
    namespace = service.metadata.namespace
    about = {"kind": "ConfigMap", "object": f"{namespace}/{package.name}"}
    try:
        await client.create(CONFIG_MAPS.from_dict(manifest), field_manager=FIELD_MANAGER)
    except ApiError as error:
        if error.status.code != _EXISTS:
            raise
    else:
        log.info("created", extra=about)
        return
    live = await client.get(CONFIG_MAPS, package.name, namespace=namespace)
    if live.get("binaryData") != manifest["binaryData"]:
        raise NotProvidedError(
            f"ConfigMap {namespace}/{package.name} has other content than the plug-in of this operator; delete it"
        )
    owners = live["metadata"].get("ownerReferences") or ()
    if all(owner.get("uid") != service.metadata.uid for owner in owners):
        # Merged by uid, so that services which come at the same time do not take each other out.
        patch = {"metadata": {"ownerReferences": [shared_owner(service)]}}
        await client.patch(
            CONFIG_MAPS, package.name, patch, namespace=namespace, patch_type=PatchType.STRATEGIC,
            field_manager=FIELD_MANAGER,
        )  # fmt: skip
        log.info("has one more owner", extra={**about, "service": service.key})
