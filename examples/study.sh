#!/usr/bin/env bash
# The study of docs/study.md: train the pools, compare all routers, draw the figures. Many hours of
# two cores; stop it whenever you like and start it again, what is finished is kept.
#   examples/study.sh STEP
#     data, rate                        what is needed before
#     eight SEED                        the small pool, seeds 0 and 1, and its suite
#     pool-a10, pool-a, pool-b          training
#     held-in                           each expert on its own task, beside the base and the routed pool
#     development, confirmation         CROSS with ten experts of A: the half on which routers are
#                                       chosen, and the other
#     others                            CROSS-B, T0HO, BBH and BBL
#     pool-sizes                        4, 8 and 16 experts of pool A, three draws, and pools A and B
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
b=recipes/study-pool-b.toml
others=base,random,retrieval,average-activation,arrow,merged,uniform-top-k,phatgoose,phatgoose-input
others+=,spectr,logo,centroid,glider
ours=discriminant,discriminant-phatgoose,phatgoose-evidence
a10=(rotten_tomatoes trec ag_news qasc xsum amazon_polarity cos_e hotpot_qa_closed_book sciq common_gen)
suite() { local list; list=$(printf ",recipes/suites/study-%s.toml" "$@"); echo "${list:1}"; }
compare() {  # OUT LIMIT SUITES METHODS POOL… and whatever else compare takes
  local to=$1 limit=$2 suites=$3 rows=$4
  shift 4
  $phatgoose compare "$@" --suites "$suites" --limit "$limit" --seed 0 --methods "$rows" \
    --out "$out/$to" "${engine[@]}"
}
draw() {  # SEED SIZE POOL: the names of so many experts
  python -c 'import os, random, sys
seed, size, pool = sys.argv[1:]
print(*sorted(random.Random(int(seed)).sample(sorted(os.listdir(pool)), int(size))))' "$@"
}

case $step in
data)  # worded anew, with the question kept; BIG-bench as it is
  python ../shared/data/wordings.py $out/data --max-words 120 --check
  cp ../shared/data/eval/bb*.jsonl $out/data/eval/ ;;
rate)  # the learning rate, on held-in validation of three tasks; 2.5e-4 if the lowest is the best
  for rate in ${RATES:-5e-4 1e-3}; do
    $phatgoose train $data/rotten_tomatoes.jsonl $data/commonsense_qa.jsonl $data/common_gen.jsonl \
      --recipe $a --learning-rate $rate --gate-steps 1 --no-means --no-readings --no-embeddings \
      --out "$out/rate-$rate" --resume "${engine[@]}"
  done ;;
eight)
  seed=${2:?name a seed}
  $phatgoose train --recipe recipes/study-eight.toml --seed "$seed" --out "$out/eight-$seed" \
    --resume "${engine[@]}"
  compare "eight-$seed-scores" 100 "$(suite eight)" $others,$ours,oracle,best-individual \
    "$out/eight-$seed" ;;
pool-a10)
  # shellcheck disable=SC2046
  $phatgoose train $(printf "$data/%s.jsonl " "${a10[@]}") --recipe $a --out "$out/pool-a" --resume "${engine[@]}" ;;
pool-a) $phatgoose train --recipe $a --out "$out/pool-a" --resume "${engine[@]}" ;;
pool-b) $phatgoose train --recipe $b --out "$out/pool-b" --resume "${engine[@]}" ;;
held-in)
  python examples/study_held_in.py recipes/suites/study-held-in.toml "$out/held-in.jsonl" 100 \
    phatgoose,$ours "$out/pool-a" ;;
development | confirmation)
  compare $step 100 "$(suite cross-$step)" $others,$ours,oracle,best-individual \
    "${a10[@]/#/$out/pool-a/}" ;;
others)
  compare others 100 "$(suite t0ho)" $others,$ours "$out/pool-a"
  compare others 50 "$(suite bbh bbl)" $others,$ours "$out/pool-a"
  compare others 100 "$(suite cross-b cross-confirmation)" $others,$ours "$out/pool-a" "$out/pool-b" ;;
pool-sizes)
  rows=merged,arrow,phatgoose,retrieval,$ours
  for size in 4 8 16; do
    for seed in 1 2 3; do
      experts=$(draw $seed $size "$out/pool-a")
      # shellcheck disable=SC2046
      compare pool-sizes 100 "$(suite cross-confirmation)" $rows \
        $(printf "$out/pool-a/%s " $experts)
    done
  done
  compare pool-sizes 100 "$(suite cross-confirmation)" $rows "$out/pool-a"
  compare pool-sizes 100 "$(suite cross-confirmation)" $rows "$out/pool-a" "$out/pool-b" ;;
*) echo "no such step: $step" >&2; exit 2 ;;
esac
