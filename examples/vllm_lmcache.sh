#!/usr/bin/env bash
# vLLM over LMCache over this machine's kvstore node: an example to read and to change.
#
#     examples/vllm_lmcache.sh MODEL [options of vllm serve]
#
# What vLLM computes goes to an LMCache server (its L1, in host memory), and from there to the node, which is started when none
# answers. Everything listens on loopback, and all ends together. Needs vllm, lmcache and llm-kvstore in one environment.
# In the environment: KVSTORE_NODE__SOCKET and KVSTORE_NODE__DIRECTORY, of a node elsewhere than by default; LMCACHE_PORT and
# LMCACHE_HTTP_PORT; LMCACHE_OPTIONS, more options of `lmcache server`, such as --l1-size-gb 64. On a CPU they must have
# --supported-transfer-mode engine_driven: without it vLLM waits for ever.
set -euo pipefail

model=${1:?usage: $0 MODEL [options of vllm serve]}
shift
port=${LMCACHE_PORT:-5555} http=${LMCACHE_HTTP_PORT:-8080}
names=${KVSTORE_NODE__DIRECTORY:+$KVSTORE_NODE__DIRECTORY/lmcache-names.db}
read -ra options <<<"${LMCACHE_OPTIONS:-}"

trap 'exit 0' INT TERM
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

# Where revisions or dtypes share a model's name, name them here: "weights" and "dtype", see docs/lmcache.md.
lmcache server --host 127.0.0.1 --port "$port" --http-host 127.0.0.1 --http-port "$http" --eviction-policy LRU \
    --l1-size-gb 4 --l1-init-size-gb 1 "${options[@]}" --l2-adapter '{
      "type": "plugin", "module_path": "connectors.lmcache", "class_name": "KVStoreAdapter",
      "adapter_params": {"socket": "'"${KVSTORE_NODE__SOCKET:-}"'", "names": "'"$names"'"}}' &

# vLLM takes longer to start than the server, and would wait for it.
vllm serve "$model" --kv-transfer-config '{
  "kv_connector": "LMCacheMPConnector", "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
  "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
  "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": '"$port"'}}' "$@" &

wait -n
