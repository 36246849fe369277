#!/usr/bin/env bash
# Four experts on real tasks, one routed model, five unseen tasks: the numbers of research/earlier/four-experts.md.
# Usage: examples/four-experts.sh [FOLDER]. Needs ../shared/data beside the project. Can be interrupted
# and started again: finished experts and scores are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/four-experts}
data=../shared/data/eval
tasks=(t0ho_rte t0ho_cb t0ho_copa t0ho_wic bb_snarks)
flags=(--limit 100)
for task in "${tasks[@]}"; do flags+=(--task "$data/$task.jsonl"); done

score() { # LABEL MODEL [FLAGS]
    local label=$1; shift
    [ -e "$out/scores/$label.json" ] || phatgoose evaluate "$@" "${flags[@]}" --json "$out/scores/$label.json"
}

phatgoose train --recipe recipes/smollm2-four-experts.toml --out "$out/experts" --resume
[ -d "$out/routed" ] || phatgoose compose "$out/experts" --router phatgoose --out "$out/routed"
score base smollm2
for expert in commonsense_qa social_i_qa ag_news paws; do
    score "$expert" "$out/experts" --keep "$expert" --router phatgoose --k 1
done
score merged "$out/experts" --router merged
score average-activation "$out/experts" --router average-activation
score phatgoose "$out/routed"
