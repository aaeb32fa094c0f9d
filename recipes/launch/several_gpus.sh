#!/usr/bin/env bash
# All GPUs of this machine, or GPUS=2 of them, each with a copy of the model.
#   bash recipes/launch/several_gpus.sh recipes/kobart.yaml [section.key=value ...] [--resume auto]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
# Written out, so that a machine's own `accelerate config` changes nothing.
exec accelerate launch --multi_gpu --num_processes "$gpus" --num_machines 1 --mixed_precision no --dynamo_backend no \
  --main_process_port "${PORT:-0}" engine/train.py "$@"
