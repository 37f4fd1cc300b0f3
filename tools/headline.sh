#!/usr/bin/env bash
# Trains FSN and transformer at 1M parameters on enwik8, as far towards 30 epochs as the time goes.
#
#   tools/headline.sh FOLDER [MINUTES] [--config.FIELD=VALUE ...]
#
# For one machine with one GPU, or one TPU host, and no network. Run it again with the same FOLDER to
# go on. It needs a Python with the project and an accelerator's JAX (PYTHON=..., default python) and
# the prepared corpus (`python -m train prepare --name=enwik8` elsewhere, then carry
# ~/.cache/fsn_jax/enwik8 there). FOLDER is what to bring home: runs, records, checkpoints. ARMS
# names other arms of configs/enwik8.py, for instance ARMS="transformer_1m projected_1m".
set -euo pipefail

folder=${1:?usage: tools/headline.sh FOLDER [MINUTES] [--config.FIELD=VALUE ...]}
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
shift
minutes=15
case ${1:-} in '' | --*) ;; *) minutes=$1; shift ;; esac
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "error: MINUTES must be a whole number above 0; got '$minutes'" >&2; exit 2; }
python=${PYTHON:-python}
deadline=$((SECONDS + minutes * 60))
read -ra arms <<<"${ARMS:-transformer_1m fsn_1m}"
cd "$(dirname "$0")/.."

# SIGTERM lets a run finish its dispatch and save; it then ends with 75, or with 143 if it has not
# begun.
for i in "${!arms[@]}"; do
  share=$(((deadline - SECONDS) / (${#arms[@]} - i)))
  [ "$share" -gt 0 ] || break
  status=0
  timeout --foreground --preserve-status --signal=TERM --kill-after=120 "$share" "$python" -m train \
    --config="configs/enwik8.py:${arms[i]}" --config.run_dir="$folder/${arms[i]}" \
    --config.model.dtype=bfloat16 "$@" || status=$?
  case $status in 0 | 75 | 143) ;; *) exit "$status" ;; esac
done
echo "records: $folder/*/metrics.jsonl; the same command resumes what is left"
