"""Container images without a registry or a build tool: a scratch image is a tar file of a tar file.

The archive has the layout of `docker save`, which containerd imports. With equal input it is equal byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_scratch_image(
    target: Path, references: Sequence[str], files: Mapping[str, Path], entrypoint: Sequence[str]
) -> Path:
    """Write an image archive that holds only `files` (absolute path in the image -> executable on this machine),
    under every name in `references` (such as `localhost/pause:1`)."""
    layer = _tar({name.lstrip("/"): source.read_bytes() for name, source in files.items()})
    machine = platform.machine()
    configuration = {
        "architecture": _ARCHITECTURES.get(machine, machine),
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint)},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": list(references), "Layers": ["layer.tar"]}]
    contents = {
        "layer.tar": layer,
        "config.json": json.dumps(configuration).encode(),
        "manifest.json": json.dumps(manifest).encode(),
    }
    target.write_bytes(_tar(contents))
    return target


def _tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            entry.mode = 0o755
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
