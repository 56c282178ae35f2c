#!/bin/sh
# serve.sh PORT MODEL [OPTION...]: serve a model with the engine that this commit names in the file IMAGE.
set -eu
port=$1
model=$2
shift 2
# --init passes the signal on that ends the server; --rm leaves no container.
exec docker run --rm --init --gpus all --ipc host --network host \
  --volume "${HF_HOME:-$HOME/.cache/huggingface}:/root/.cache/huggingface" \
  "$(cat "$(dirname "$0")/IMAGE")" \
  --model "$model" --served-model-name target --host 127.0.0.1 --port "$port" \
  --dtype float16 --max-model-len 4096 --no-enable-prefix-caching "$@"
