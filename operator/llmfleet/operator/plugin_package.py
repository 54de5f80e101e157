"""The plug-in as engine pods get it: our own Python, in one archive, in one ConfigMap per namespace.

    installed packages (api, migration, engine) --build_package--> PluginPackage --config_map--> ConfigMap, immutable
                                                                                                      │ mounted
    python -m llmfleet.engine.launch  ◄── PYTHONPATH=/llmfleet/plug-in.zip ◄──────────────────────────┘

Python imports from an archive by itself, so neither an image nor a registry stands between an operator and its engines,
and the plug-in is always the one whose arguments the operator writes. It is pure Python; what else it needs (Pydantic,
numpy, the Prometheus client) vLLM needs too. A ConfigMap holds 1 MiB; the archive is a seventh of that.

The name has a hash of the archive: another version of the operator makes another ConfigMap, and pods that were rendered
before keep theirs. It belongs to a few of the services that use it (`provide.MOST_OWNERS`), and goes with the last.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import zipfile
from pathlib import Path
from typing import Any

from llmfleet.api import API_VERSION, LLMService
from llmfleet.api.meta import LABEL_COMPONENT
from llmfleet.operator.model import Manifest, PluginPackage

COMPONENT_PLUGIN = "engine-plug-in"
ARCHIVE_KEY = "plug-in.zip"
PACKAGES = ("llmfleet.api", "llmfleet.migration", "llmfleet.engine")
MOST_BYTES = 768 * 1024
"""Of the archive: what a ConfigMap may hold, less what base64 and the envelope take."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


def build_package() -> PluginPackage:
    """The archive of the packages as they are installed here, the same bytes for the same files. Raises OSError."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        # Python finds a namespace package in an archive only where the folder has an entry of its own.
        archive.writestr(_entry("llmfleet/"), b"")
        for package in PACKAGES:
            folder = _folder(package)
            archive.writestr(_entry(f"{package.replace('.', '/')}/"), b"")
            for file in sorted(folder.rglob("*.py")):
                name = f"{package.replace('.', '/')}/{file.relative_to(folder).as_posix()}"
                archive.writestr(_entry(name), file.read_bytes())
    content = target.getvalue()
    if len(content) > MOST_BYTES:
        raise OSError(f"the plug-in's archive has {len(content)} bytes; a ConfigMap takes {MOST_BYTES}")
    return PluginPackage(f"llmfleet-engine-{hashlib.sha256(content).hexdigest()[:16]}", content)


def config_map(package: PluginPackage, service: LLMService) -> Manifest:
    """The ConfigMap in the service's namespace, with the service among its owners."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": package.name,
            "namespace": service.metadata.namespace,
            "labels": {LABEL_COMPONENT: COMPONENT_PLUGIN},
            "ownerReferences": [shared_owner(service)],
        },
        "immutable": True,
        "binaryData": {ARCHIVE_KEY: base64.b64encode(package.archive).decode()},
    }


def shared_owner(service: LLMService) -> dict[str, Any]:
    """One of several: none of them controls what they share."""
    name, uid = service.metadata.name, service.metadata.uid
    return {"apiVersion": API_VERSION, "kind": LLMService.KIND, "name": name, "uid": uid}


def _folder(package: str) -> Path:
    """Where a package is installed. It is not imported: the engine's needs vLLM."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {package} is not installed beside the operator")
    return Path(spec.submodule_search_locations[0])


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (0o40755 if name.endswith("/") else 0o100644) << 16
    return entry
