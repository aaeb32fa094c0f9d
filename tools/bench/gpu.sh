#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in one call; see gpu.py. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
[[ -x $python ]] || python=python3
exec "${PYTHON:-$python}" tools/bench/gpu.py "$@"
