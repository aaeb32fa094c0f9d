#!/usr/bin/env bash
# One GPU, or the CPU where there is none: no launcher is needed.
#   bash recipes/launch/one_gpu.sh recipes/kobart.yaml [section.key=value ...] [--resume auto]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec python engine/train.py "$@"
