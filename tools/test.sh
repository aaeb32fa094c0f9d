#!/usr/bin/env bash
# All tests in a prepared .venv; --quick leaves out what is marked slow. Other arguments go to pytest:
# bash tools/test.sh --quick tests/recipe -k base
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_environment
arguments=()
for argument in "$@"; do
  if [[ $argument == --quick ]]; then
    arguments+=(-m "not slow")
  else
    arguments+=("$argument")
  fi
done
exec "$venv_python" -m pytest -q ${arguments[@]+"${arguments[@]}"}
