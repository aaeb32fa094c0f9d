#!/usr/bin/env bash
# Several machines: the same line on each, at about the same time. They meet at HEAD, the name of one of them.
#   HEAD=node1 NODES=2 bash recipes/launch/two_nodes.sh recipes/kobart.yaml [section.key=value ...] [--resume auto]
# Code, recipe and data must be the same everywhere, and the run folder on a disk that all share.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
exec torchrun --nnodes "${NODES:-2}" --nproc-per-node "$gpus" --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:?set HEAD to the name of the machine where all meet}:${PORT:-29500}" \
  --rdzv-id "${JOB:-train}" engine/train.py "$@"
