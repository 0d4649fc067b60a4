#!/usr/bin/env bash
# LMCache over VCache, both modes, with everything started and stopped here:
#   MP mode: vLLM -> LMCacheMPConnector -> lmcache server -> VCacheL2Adapter -> the pool. One engine computes a prompt; LMCache's
#     own memory is emptied; a second engine loads it from the pool and gives the same answer.
#   In-process mode: LMCache's own check of its storage manager, over VCacheBackend and over VCacheAllocatorBackend. (LMCache
#     0.5.6 has no in-process connector for vLLM's CPU backend; on GPUs, serve with
#     --kv-transfer-config "$(cat examples/lmcache/connector-in-process.json)".)
set -euo pipefail
cd "$(dirname "$0")/../.."
tools/prepare-environment
PATH="$PWD/.venv/bin:$PATH"
EXAMPLE=examples/lmcache
WORK=$(mktemp -d)
VCACHE_RUNTIME_DIR=$(mktemp -d /dev/shm/vcl-XXXXXX)
export VCACHE_RUNTIME_DIR LMCACHE_TRACK_USAGE=false LMCACHE_DISABLE_BANNER=1 LMCACHE_LOG_LEVEL=WARNING PYTHONHASHSEED=0 \
    VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
# So that a busy machine is not taken for a server that is away.
export VCACHE_CLIENT__CALL_TIMEOUT=20s VCACHE_CLIENT__CONNECT_TIMEOUT=30s VCACHE_SERVER__LIVENESS_TIMEOUT=60s
PIDS=()
finish() { # last started first: a donor takes its leave of the server
    for ((i = ${#PIDS[@]} - 1; i >= 0; i--)); do
        kill "${PIDS[i]}" 2>/dev/null || true
        wait "${PIDS[i]}" || true
    done
    rm -rf "$WORK" "$VCACHE_RUNTIME_DIR"
}
trap finish EXIT
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
await() { # what, seconds, command...
    local what=$1 left=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((left-- > 0)) || { echo "never came: $what" >&2; tail -n 20 "$WORK"/*.log >&2; exit 1; }
        sleep 1
    done
}
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
in_l2() { curl -sf "$HTTP/status" | python -c 'import json, sys; print(json.load(sys.stdin)["storage_manager"]["l2_adapters"][0]["known_objects"])'; }
has_stored() { [[ $(in_l2) -ge 8 ]]; }

say "The pool: a metadata server and a donor of 256 MiB"
vcache server 2>"$WORK/server.log" & PIDS+=($!)
vcache donate --device cpu:0 --size 256MiB >"$WORK/donor.out" 2>"$WORK/donor.log" & PIDS+=($!)
await "the donation" 120 grep -q donating "$WORK/donor.out"

check_storage_manager() { # configuration file
    LMCACHE_CONFIG_FILE=$EXAMPLE/$1 python -m lmcache.v1.basic_check --mode test_storage_manager --num-keys 8 \
        2>"$WORK/check.log" | tee "$WORK/check.out" | grep -A 9 'Performance Results'
    [[ $(grep -c '8/8' "$WORK/check.out") -ge 4 ]] || { echo "$1 failed LMCache's check" >&2; exit 1; }
}
say "In-process mode: LMCache's check of its storage manager, over VCacheBackend"
check_storage_manager lmcache.yaml
say "The same over VCacheAllocatorBackend, which gives LMCache its memory"
check_storage_manager lmcache-allocator.yaml

say "MP mode: lmcache server with VCacheL2Adapter"
PORT=$(free_port) HTTP_PORT=$(free_port) METRICS_PORT=$(free_port)
HTTP=http://127.0.0.1:$HTTP_PORT
lmcache server --l1-size-gb 0.2 --eviction-policy LRU --port "$PORT" --http-port "$HTTP_PORT" --prometheus-port "$METRICS_PORT" \
    --supported-transfer-mode auto --l2-adapter "$(cat $EXAMPLE/l2-adapter.json)" >"$WORK/lmcache.log" 2>&1 & PIDS+=($!)
sed "s/5555/$PORT/" $EXAMPLE/connector-mp.json >"$WORK/connector.json"
python -c "import sys; from pathlib import Path; from vcache.demo.model import build_model; build_model(Path(sys.argv[1]))" \
    "$WORK/model" 2>"$WORK/model.log"
await "an answer of lmcache server" 180 curl -sf "$HTTP/status"

say "The first vLLM computes a prompt of 2,049 tokens"
python $EXAMPLE/answer.py "$WORK/model" "$WORK/connector.json" 2>"$WORK/first.log" | tee "$WORK/first.out" | tail -n 1
await "the store of 8 chunks in the pool" 60 has_stored
curl -sf -X POST "$HTTP/cache/clear" >/dev/null
say "LMCache's own memory is emptied. The second vLLM loads the prompt from the pool"
python $EXAMPLE/answer.py "$WORK/model" "$WORK/connector.json" 2>"$WORK/second.log" | tee "$WORK/second.out" | tail -n 1
python - "$WORK/first.out" "$WORK/second.out" <<'PYTHON'
import json, sys
first, second = (json.loads(open(path).read().splitlines()[-1]) for path in sys.argv[1:])
assert first["loaded"] == 0 and second["loaded"] == 2048, (first["loaded"], second["loaded"])
assert first["tokens"] == second["tokens"], (first["tokens"], second["tokens"])
print("the same answer, with 2,048 of 2,049 tokens loaded from the pool")
PYTHON
