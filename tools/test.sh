#!/usr/bin/env bash
# All tests in a prepared .venv. Arguments go to pytest: bash tools/test.sh -k recipe
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_environment
exec "$venv_python" -m pytest -q "$@"
