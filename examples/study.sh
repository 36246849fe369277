#!/usr/bin/env bash
# The study of docs/study.md: train the pools, compare all methods, draw the figures. About ten hours
# of two cores; stop it whenever you like and start it again, what is finished is kept.
#   examples/study.sh STEP
#     data, rate                        what is needed before
#     pool-a, pool-b, references        training
#     cross, t0ho, bbl, bbh             every method over pool A; singles too: SINGLES=1
#     changes, confirm, pool-sizes      changes to PHATGOOSE, on the development half of CROSS
#     gate-steps                        gates of 25, 100 and 400 steps, in a pool of eight
#     held-in                           pool A on its own tasks
#     cross-b, bigbench-b               pool B beside pool A
#     analysis, report                  where tokens go; cells, tables and figures of docs/study
# Everything lands in runs/study. Needs ../shared/data beside the project and the extra 'retrieval'.
# ENGINE='--engine ray --workers 2' examples/study.sh STEP trains and scores by two processes.
set -euo pipefail
cd "$(dirname "$0")/.."
step=${1:?name a step, see the head of this file}
out=runs/study
phatgoose=${PHATGOOSE:-phatgoose}
read -ra engine <<< "${ENGINE:-}"
data=$out/data/train
a=recipes/study-pool-a.toml
derived=,best-individual,oracle
zero_shot=base,random,retrieval,average-activation,arrow,merged,uniform-top-k,phatgoose,phatgoose-input
methods=$zero_shot${SINGLES:+$derived}
confirmation=recipes/suites/study-cross-a-confirmation.toml
development=recipes/suites/study-cross-a-development.toml
suite() { local list; list=$(printf ",recipes/suites/study-%s.toml" "$@"); echo "${list:1}"; }
compare() {  # OUT LIMIT SUITES METHODS POOL… and whatever else compare takes; cut as in pool A's time
  local to=$1 limit=$2 suites=$3 rows=$4
  shift 4
  $phatgoose compare "$@" --suites "$suites" --limit "$limit" --seed 0 --methods "$rows" \
    --truncation right --out "$out/$to" "${engine[@]}"
}
draw() {  # SEED SIZE POOL: the names of so many experts
  python -c 'import os, random, sys
seed, size, pool = sys.argv[1:]
print(*sorted(random.Random(int(seed)).sample(sorted(os.listdir(pool)), int(size))))' "$@"
}
references() {
  local name
  for name in multitask joint; do
    if [ -d "$out/$name" ]; then echo "--reference $name=$out/$name"; fi
  done
}

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
  $phatgoose train --recipe $a --joint --no-means --no-embeddings --out "$out/joint" --resume \
    "${engine[@]}" ;;
cross) compare cross 100 "$(suite cross-a)" $methods "$out/pool-a" $(references) ;;
t0ho) compare t0ho 100 "$(suite t0ho)" $methods "$out/pool-a" $(references) ;;
bbl | bbh) compare $step 50 "$(suite $step)" $methods "$out/pool-a" $(references) ;;
changes)
  compare changes 100 $development phatgoose,phatgoose-input,retrieval "$out/pool-a"
  for affinity in raw trimmed centred; do
    compare changes 100 $development phatgoose "$out/pool-a" --affinity $affinity
  done
  for temperature in 0.25 0.5 2; do
    compare changes 100 $development phatgoose "$out/pool-a" --router-temperature $temperature
  done
  for k in 1 4 8; do
    compare changes 100 $development phatgoose "$out/pool-a" --k $k
  done ;;
confirm)  # what won, on the half that nothing was chosen on
  compare confirm 100 $confirmation phatgoose,phatgoose-input,retrieval "$out/pool-a" ;;
pool-sizes)
  rows=phatgoose,retrieval
  compare pool-sizes 100 $development $rows "$out/pool-a"
  for size in 4 8 16; do
    for seed in 1 2 3; do
      experts=$(draw $seed $size "$out/pool-a")
      compare pool-sizes 100 $development $rows $(printf "$out/pool-a/%s " $experts)
    done
  done ;;
gate-steps)  # in a pool of eight, for time
  eight=(rotten_tomatoes imdb commonsense_qa dream hotpot_qa_closed_book samsum ag_news common_gen)
  for steps in ${STEPS:-25 100 400}; do
    for name in "${eight[@]}"; do
      $phatgoose gate "$out/pool-a/$name" --task "$data/$name.jsonl" --recipe $a \
        --gate-steps $steps --batch-size 2 --no-embeddings --out "$out/gates-$steps/$name" --resume
    done
    compare gate-steps-$steps 100 $development phatgoose,phatgoose-input "$out/gates-$steps"
    python examples/study_offsets.py "$out/gates-$steps" recipes/suites/study-cross-a.toml \
      "$out/gates-$steps.png" "$out/gates-$steps.json"
  done ;;
held-in)
  python examples/study_held_in.py "$out/pool-a" recipes/suites/study-held-in.toml \
    "$out/held-in.jsonl" 50 ;;
cross-b) compare cross-b 100 "$(suite cross-a cross-b)" $zero_shot "$out/pool-a" "$out/pool-b" ;;
bigbench-b) compare bigbench-b 50 "$(suite bbh bbl)" $zero_shot "$out/pool-a" "$out/pool-b" ;;
analysis)  # the report quotes texts of ../shared/data: don't publish it
  $phatgoose analyse "$out/pool-a" --suite recipes/suites/study-cross-a.toml --limit 100 \
    --against phatgoose-input,average-activation --scores "$out/cross/comparison.json" \
    --truncation right --out "$out/analysis"
  # Figure 3 of the paper for the two datasets where PHATGOOSE comes nearest to Oracle
  $phatgoose analyse "$out/pool-a" --task $data/sst5.jsonl --task $data/sentiment140.jsonl \
    --limit 100 --no-score --examples 0 --scores "$out/cross/comparison.json" \
    --truncation right --out "$out/heat-maps" ;;
report)
  mkdir -p docs/study
  told() { python examples/study_report.py "$1" "docs/study/$2.jsonl" "docs/study/$2.$3"; }
  for name in cross t0ho bbl bbh changes confirm pool-sizes gate-steps cross-b bigbench-b; do
    found=()
    if [ -f "$out/$name/results.jsonl" ]; then found=("$out/$name/results.jsonl"); fi
    for steps in 25 100 400; do  # cells of pools that differ by their gates alone
      results=$out/$name-$steps/results.jsonl
      if [ -f "$results" ]; then found+=("$steps gate steps=$results"); fi
    done
    if [ ${#found[@]} = 0 ]; then continue; fi
    python examples/study_report.py cells "docs/study/$name.jsonl" "${found[@]}"
    case $name in
      cross | t0ho | bbl | bbh | cross-b | bigbench-b) cp "$out/$name/comparison.md" docs/study/$name.md ;;
      *) told variants $name md ;;
    esac
    if [ $name = pool-sizes ]; then told sizes $name png; else told figure $name png; fi
  done
  if [ -d "$out/analysis" ]; then
    python examples/study_report.py analysis "$out/analysis/analysis.json" docs/study/analysis.json
    for router in phatgoose phatgoose-input; do
      cp "$out/analysis/figures/datasets-$router.png" docs/study/routing-$router.png
    done
    cp "$out/heat-maps/figures/layers-phatgoose.png" docs/study/heat-maps.png
  fi ;;
*) echo "no such step: $step" >&2; exit 2 ;;
esac
