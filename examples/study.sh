#!/usr/bin/env bash
# The study of docs/study.md: train the pools, compare all methods, draw the figures. About ten hours
# of two cores; stop it whenever you like and start it again, what is finished is kept.
#   examples/study.sh STEP     STEP: data, rate, pool-a, pool-b, references, compare-a, compare-b
# Everything lands in runs/study. Needs ../shared/data beside the project and the extra 'retrieval'.
# ENGINE='--engine ray --workers 2' examples/study.sh STEP trains and scores by two processes.
set -euo pipefail
cd "$(dirname "$0")/.."
step=${1:?name a step: data, rate, pool-a, pool-b, references, compare-a or compare-b}
out=runs/study
phatgoose=${PHATGOOSE:-phatgoose}
read -ra engine <<< "${ENGINE:-}"
data=$out/data/train
a=recipes/study-pool-a.toml
suite() { local list; list=$(printf ",recipes/suites/study-%s.toml" "$@"); echo "${list:1}"; }

case $step in
data)  # copies without the records (a dozen or two) that are broken across lines
  for part in train eval; do
    mkdir -p "$out/data/$part"
    for file in ../shared/data/$part/*.jsonl; do
      grep -x '{.*}' "$file" > "$out/data/$part/${file##*/}"
    done
  done ;;
rate)  # the learning rate, on held-in validation of three tasks
  for rate in 1e-3 2e-3 4e-3; do
    $phatgoose train $data/rotten_tomatoes.jsonl $data/commonsense_qa.jsonl $data/common_gen.jsonl \
      --recipe $a --learning-rate $rate --gate-steps 1 --no-means --no-embeddings \
      --out "$out/rate-$rate" --resume "${engine[@]}"
  done ;;
pool-a) $phatgoose train --recipe $a --out "$out/pool-a" --resume "${engine[@]}" ;;
pool-b) $phatgoose train --recipe recipes/study-pool-b.toml --out "$out/pool-b" --resume "${engine[@]}" ;;
references)
  $phatgoose train --recipe $a --multitask multitask --steps 256 --eval-every 64 --no-means \
    --no-embeddings --out "$out/multitask" --resume "${engine[@]}"
  $phatgoose train --recipe $a --joint --no-means --no-embeddings --out "$out/joint" --resume "${engine[@]}" ;;
compare-a)
  references=()
  for name in multitask joint; do
    if [ -d "$out/$name" ]; then references+=(--reference "$name=$out/$name"); fi
  done
  $phatgoose compare "$out/pool-a" --suites "$(suite cross-a t0ho)" --limit 100 --seed 0 \
    "${references[@]}" --out "$out/comparison-a" "${engine[@]}"
  $phatgoose compare "$out/pool-a" --suites "$(suite bbh bbl)" --limit 50 --seed 0 \
    "${references[@]}" --out "$out/comparison-a-bigbench" "${engine[@]}" ;;
compare-b)
  methods=base,random,retrieval,average-activation,arrow,merged,uniform-top-k,phatgoose
  $phatgoose compare "$out/pool-a" "$out/pool-b" --suites "$(suite cross-a cross-b)" --limit 100 \
    --methods $methods --seed 0 --out "$out/comparison-b" "${engine[@]}"
  $phatgoose compare "$out/pool-a" "$out/pool-b" --suites "$(suite bbh bbl)" --limit 50 \
    --methods $methods --seed 0 --out "$out/comparison-b-bigbench" "${engine[@]}" ;;
*) echo "no such step: $step" >&2; exit 2 ;;
esac
