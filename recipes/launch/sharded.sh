#!/usr/bin/env bash
# All GPUs of this machine, the model spread over them by FSDP2: for models of which no copy fits one GPU.
#   bash recipes/launch/sharded.sh recipes/kobart.yaml [section.key=value ...] [--resume auto]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/several_gpus.sh" "$@" distributed.strategy=fsdp
