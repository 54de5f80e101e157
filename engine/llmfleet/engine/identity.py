"""What this engine is and what it made of a request, for others to compare: fingerprint and prompt digest.

In flow vLLM's configuration, the files of the model and the layout of the KV cache in memory. Weights are not hashed
as a whole, which would take minutes: of each file its size and a few samples are, so that two fine-tuned versions of
one model differ.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.v1.request import Request

from llmfleet.api.fingerprint import Fingerprint
from llmfleet.engine.rank import Arithmetic, RankDescription

_SAMPLES = 16
_SAMPLE_BYTES = 64 * 1024
_HASHED_WHOLE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_SAMPLED = (".safetensors", ".bin", ".pt", ".gguf")


def fingerprint(scheduler: Any, rank: RankDescription) -> Fingerprint:
    """Of a vLLM whose KV cache is allocated; all its ranks are alike."""
    config = scheduler.vllm_config
    model, cache = config.model_config, config.cache_config
    return Fingerprint(
        vllm_version=vllm.__version__,
        model=model.served_model_name if isinstance(model.served_model_name, str) else model.model,
        model_hash=model_hash(model.model, model.revision),
        dtype=str(model.dtype),
        kv_dtype=str(cache.cache_dtype),
        block_size=scheduler.block_size,
        layout=rank.arithmetic.layout,
        attention_backend=rank.arithmetic.attention_backend,
        instruction_set=rank.arithmetic.instruction_set,
        tp=config.parallel_config.tensor_parallel_size,
        quantization=model.quantization or "",
    )


def model_hash(model: str, revision: str | None) -> str:
    """Of a model's directory, or of its name and revision where vLLM fetched it by name."""
    directory = Path(model)
    if not directory.is_dir():
        return f"{model}@{revision or 'main'}"
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.name in _HASHED_WHOLE or path.name.endswith(".index.json"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        elif path.suffix in _SAMPLED:
            digest.update(path.name.encode() + b"\0" + _sample(path))
    return digest.hexdigest()


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    samples = [str(size).encode()]
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            samples.append(file.read(_SAMPLE_BYTES))
    return b"".join(samples)


def arithmetic(runner: Any) -> Arithmetic:
    """Of a model runner whose KV cache is allocated: shape and strides of a block in memory, and what computes it."""
    caches = runner.kv_caches
    backends = {group.backend.get_name() for groups in runner.attn_groups for group in groups}
    return Arithmetic(
        layout=f"{len(caches)} x {tuple(caches[0].shape[1:])} stride {tuple(caches[0].stride()[1:])}",
        attention_backend=",".join(sorted(backends)),
        instruction_set=_instruction_set(runner.device),
    )


def _instruction_set(device: torch.device) -> str:
    """What kernels are chosen by."""
    if device.type != "cpu":
        return "sm{}{}".format(*torch.cuda.get_device_capability(device))
    amx = torch.cpu._is_amx_tile_supported()
    return f"{torch.backends.cpu.get_cpu_capability()}{' AMX' if amx else ''}"


def prompt_digest(request: Request) -> str:
    """Of the prompt's tokens: engines that tokenize the same text otherwise must not continue each other."""
    ids = request.prompt_token_ids or []
    return hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()
