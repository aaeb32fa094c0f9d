#!/usr/bin/env bash
# All tests in a prepared .venv; --quick leaves out what is marked slow. Other arguments go to pytest:
# bash tools/test.sh --quick tests/recipe -k base. Two tests run at once; -n 0 runs them one by one, as a debugger needs it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_environment
arguments=(-n 2 --dist worksteal)
for argument in "$@"; do
  if [[ $argument == --quick ]]; then
    arguments+=(-m "not slow")
  else
    arguments+=("$argument")
  fi
done
exec "$venv_python" -m pytest -q "${arguments[@]}"
