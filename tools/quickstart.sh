#!/usr/bin/env bash
# From nothing to Korean summaries: sets up .venv, trains recipes/quickstart.yaml, predicts its test split, reports.
# Arguments go to training: bash tools/quickstart.sh training.num_train_epochs=2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_environment

# Everything needed is here by now; the hub is not asked.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# One process, whatever `accelerate config` may have left on this machine.
"$PWD/.venv/bin/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  engine/train.py recipes/quickstart.yaml "$@"

run=$(newest_run)
"$venv_python" engine/predict.py "$run" --input recipes/quickstart/test.csv --output "$run/test_summaries.csv"
"$venv_python" tools/quickstart_report.py "$run"

echo
echo "run folder:  $run"
echo "summaries:   $run/test_summaries.csv"
echo "TensorBoard: .venv/bin/tensorboard --logdir experiments --host localhost"
