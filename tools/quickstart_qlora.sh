#!/usr/bin/env bash
# QLoRA from nothing, on a CPU: trains a tiny Llama in full, 4-bit QLoRA on top of it, predicts from the adapter folder
# alone, merges the adapter, predicts with the merged model, and reports. Arguments go to both trainings:
# bash tools/quickstart_qlora.sh training.num_train_epochs=2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
prepare_environment

# Everything needed is here by now; the hub is not asked.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
test_file=recipes/quickstart/test.csv

# One process, whatever `accelerate config` may have left on this machine.
train() {
  "$PWD/.venv/bin/accelerate" launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    engine/train.py "$@"
}

predict() { "$venv_python" engine/predict.py "$1" --input "$test_file" --output "$2" runtime.num_threads=1; }

train recipes/quickstart_llama.yaml "$@"
base=$(newest_run)
train recipes/quickstart_qlora.yaml "$@" "model.name_or_path=$base/final_model"
run=$(newest_run)

# Away from its run, the adapter folder has to know everything by itself: base, 4-bit settings, prompt, lengths.
mkdir "$run/elsewhere"
cp -R "$run/final_model" "$run/elsewhere/adapter"
predict "$run/elsewhere/adapter" "$run/test_adapter.csv"

# Without this record of the 4-bit settings it is an adapter like any other, and loads on the base as it was trained.
cp -R "$run/final_model" "$run/elsewhere/adapter_unquantised"
rm "$run/elsewhere/adapter_unquantised/base_model.json"
predict "$run/elsewhere/adapter_unquantised" "$run/test_adapter_unquantised.csv"

"$venv_python" tools/merge_adapter.py "$run/final_model" "$run/merged"
predict "$run/merged" "$run/test_merged.csv"

echo
"$venv_python" tools/quickstart_qlora_report.py "$base" "$run" \
  --predictions "the merged model" "$run/test_merged.csv" \
  --predictions "the adapter on the base as trained" "$run/test_adapter_unquantised.csv" \
  --predictions "the adapter on the 4-bit base" "$run/test_adapter.csv"
echo "Merging leaves the rounding to 4 bits behind: what differs in the last line is that, not the merge."

echo
echo "base:        $base"
echo "adapter:     $run/final_model"
echo "merged:      $run/merged"
echo "TensorBoard: .venv/bin/tensorboard --logdir experiments --host localhost"
