# Sourced by quickstart.sh and test.sh: makes .venv and installs into it, once; works offline from the second time on.
# Afterwards $venv_python is the interpreter to use. Needs bash and Python >= 3.10; PYTHON=... chooses one.

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.13 python3.10 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python >= 3.10 with venv found; install one, or name it: PYTHON=/path/to/python bash $0" >&2
  return 1
}

# What is installed depends on these files and on the interpreter; the stamp is their hash.
stamp_of() {
  "$1" -c 'import hashlib, sys
digest = hashlib.sha256(sys.version.encode())
for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
    digest.update(open(name, "rb").read())
print(digest.hexdigest())'
}

prepare_environment() {
  local python
  venv_python=$PWD/.venv/bin/python
  if ! "$venv_python" -c '' >/dev/null 2>&1; then
    python=$(find_python)
    echo "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
  fi
  local stamp_file=.venv/installed
  local stamp
  stamp=$(stamp_of "$venv_python")
  if [[ -f $stamp_file && $(<"$stamp_file") == "$stamp" ]]; then
    return
  fi
  echo "installing the pinned dependencies into .venv (the first time only)"
  # torch goes first and alone, so that a local wheel of it (CPU or CUDA) settles what the rest resolves against.
  "$venv_python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
  "$venv_python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
  echo "$stamp" >"$stamp_file"
}

# The run that ended last, by the table that every run adds its row to.
newest_run() {
  "$venv_python" -c 'import csv, os
with open("experiments/results.csv", encoding="utf-8-sig", newline="") as table:
    *_, newest = csv.DictReader(table)
print(os.path.relpath(os.path.dirname(newest["final_model_path"])))'
}
