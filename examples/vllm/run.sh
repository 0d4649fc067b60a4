#!/usr/bin/env bash
# Two vLLM engines, one after the other, share a prefix through the pool: the second loads what the first computed.
#
#   examples/vllm/run.sh [MODEL]
#
# MODEL      what vLLM takes: a repository's name or a directory (default: a small random Llama, built on the spot)
# Needs nothing but Python: the first run makes .venv.
set -euo pipefail
cd "$(dirname "$0")/../.."
tools/prepare-environment

BIN=.venv/bin
VCACHE_RUNTIME_DIR=$(mktemp -d /dev/shm/vcache-example-XXXXXX)
export VCACHE_RUNTIME_DIR
MODEL=${1:-$VCACHE_RUNTIME_DIR/model}

PIDS=()
cleanup() { # last started first: a donor takes its leave of the server
    for ((i = ${#PIDS[@]} - 1; i >= 0; i--)); do
        kill "${PIDS[i]}" 2>/dev/null || true
        wait "${PIDS[i]}" || true
    done
    rm -rf "$VCACHE_RUNTIME_DIR"
}
trap cleanup EXIT

[[ $# -gt 0 ]] || $BIN/python -c 'import sys; from pathlib import Path; from vcache.demo.model import build_model; build_model(Path(sys.argv[1]))' "$MODEL"

$BIN/vcache server & PIDS+=($!)
DEVICES=(cpu:0 cpu:1)
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then DEVICES=(cuda:0); fi
for device in "${DEVICES[@]}"; do
    $BIN/vcache donate --device "$device" --size 256MiB & PIDS+=($!)
done

echo '==> the first engine computes the prompt'
$BIN/python examples/vllm/answer.py "$MODEL" examples/vllm/connector.json
echo '==> the second engine, another process, loads it'
$BIN/python examples/vllm/answer.py "$MODEL" examples/vllm/connector.json
