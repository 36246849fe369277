#!/usr/bin/env bash
# The study of research/study/study.md: train the pools, compare all routers, draw the figures. Many hours of
# two cores; stop it whenever you like and start it again, what is finished is kept.
#   research/study/study.sh STEP
#     data, rate                        what is needed before
#     eight SEED                        the small pool, seeds 0 and 1, and its suite
#     eight-original SEED               that pool on the same datasets, all in one wording
#     pool-a10, pool-b15, pool-rest     training: A10 is ten experts of A, B23 is A10 with thirteen of
#                                       B, the rest what else of A and B passes
#     pool-a, pool-b                    training: all tasks of A, and of B
#     held-in                           each expert on its own task, beside the base, and B23 routed
#     own-choices                       whether prompts go to the expert of their own task
#     taken-apart                       where PHATGOOSE loses what experts know: its choices replaced
#     margins                           how sure Joint Discriminant is of its choices (after others)
#     together                          all datasets that no expert of B23 knows (after others)
#     development, confirmation         CROSS with A10: the half on which routers are chosen, and the
#                                       other
#     b23                               the confirmation half and CROSS-B with B23
#     others                            T0HO, BBH and BBL with B23
#     pool-sizes                        4, 8 and 16 experts of B23, three draws, and A10 (after b23)
#     largest                           all experts, B23 and the rest (after b23)
#     figures                           scores against the size of the pool (after largest)
# Everything lands in runs/study. Needs ../shared/data beside the project and the extra 'retrieval'.
# ENGINE='--engine ray --workers 2' research/study/study.sh STEP trains and scores by two processes.
set -euo pipefail
cd "$(dirname "$0")/../.."
step=${1:?name a step, see the head of this file}
out=runs/study
phatgoose=${PHATGOOSE:-phatgoose}
read -ra engine <<< "${ENGINE:-}"
data=$out/data/train
a=research/study/recipes/pool-a.toml
b=research/study/recipes/pool-b.toml
others=base,random,retrieval,average-activation,arrow,merged,uniform-top-k,phatgoose
others+=,spectr,logo,centroid,glider
ours=discriminant,joint-discriminant,discriminant-phatgoose
choice=research/study/recipes/choice.toml
shortlist=research/study/recipes/shortlist.toml
a10=(rotten_tomatoes trec ag_news qasc xsum amazon_polarity cos_e hotpot_qa_closed_book sciq common_gen)
b13=(tomqa glue_mnli essential_terms mctaco_answer asdiv tweet_emotion blimp subj question_typing)
b13+=(clinc150_intent query_wellformedness evalution odd_man_out)
failed=(creak multirc_answerable)  # no better than the base on their own tasks
rest_a=(dbpedia_14 yelp_review_full imdb cosmos_qa ropes quoref)
rest_b=(lambada glucose gsm8k_cot cosmosqa_answer_gen personachat pubmed_qa)
b23=("${a10[@]/#/$out/pool-a/}" "${b13[@]/#/$out/pool-b/}")
rest=("${rest_a[@]/#/$out/pool-a/}" "${rest_b[@]/#/$out/pool-b/}")
suite() { local list; list=$(printf ",research/study/suites/%s.toml" "$@"); echo "${list:1}"; }
compare() {  # OUT LIMIT SUITES METHODS POOL… and whatever else compare takes
  local to=$1 limit=$2 suites=$3 rows=$4
  shift 4
  $phatgoose compare "$@" --suites "$suites" --limit "$limit" --seed 0 --methods "$rows" \
    --out "$out/$to" "${engine[@]}"
}
with_choice() {  # as compare; then what was chosen, Retrieval of as many, Joint Discriminant of one
  compare "$@"
  local to=$1 limit=$2 suites=$3
  shift 4
  compare "$to-choice" "$limit" "$suites" \
    "discriminant:place=end,shrinkage=1,temperature=0.2,retrieval" "$@" --k 3
  compare "$to-choice" "$limit" "$suites" \
    discriminant-phatgoose:place=end,shrinkage=1,shortlist=4,prior=0 "$@"
  compare "$to-one" "$limit" "$suites" joint-discriminant "$@" --k 1
}
draw() {  # SEED SIZE EXPERT…: so many of the experts
  python -c 'import random, sys
seed, size, *experts = sys.argv[1:]
print(*random.Random(int(seed)).sample(sorted(experts), int(size)), sep="\n")' "$@"
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
  $phatgoose train --recipe research/study/recipes/eight.toml --seed "$seed" --out "$out/eight-$seed" \
    --resume "${engine[@]}"
  compare "eight-$seed-scores" 100 "$(suite eight)" $others,$ours,oracle,best-individual \
    "$out/eight-$seed" ;;
eight-original)
  seed=${2:?name a seed}
  compare "eight-$seed-original" 100 "$(suite eight-original)" $others,$ours,oracle,best-individual \
    "$out/eight-$seed" ;;
pool-a10)
  # shellcheck disable=SC2046
  $phatgoose train $(printf "$data/%s.jsonl " "${a10[@]}") --recipe $a --out "$out/pool-a" --resume "${engine[@]}" ;;
pool-b15)
  # shellcheck disable=SC2046
  $phatgoose train $(printf "$data/%s.jsonl " "${b13[@]}" "${failed[@]}") --recipe $b --out "$out/pool-b" --resume "${engine[@]}" ;;
pool-rest)
  # shellcheck disable=SC2046
  $phatgoose train $(printf "$data/%s.jsonl " "${rest_a[@]}") --recipe $a --out "$out/pool-a" --resume "${engine[@]}"
  # shellcheck disable=SC2046
  $phatgoose train $(printf "$data/%s.jsonl " "${rest_b[@]}") --recipe $b --out "$out/pool-b" --resume "${engine[@]}" ;;
pool-a) $phatgoose train --recipe $a --out "$out/pool-a" --resume "${engine[@]}" ;;
pool-b) $phatgoose train --recipe $b --out "$out/pool-b" --resume "${engine[@]}" ;;
held-in)
  held_in=(python research/study/held_in.py research/study/suites/held-in.toml)
  "${held_in[@]}" "$out/held-in.jsonl" 100 "" "${b23[@]}" "${failed[@]/#/$out/pool-b/}" "${rest[@]}"
  rows=phatgoose,phatgoose?k=1,phatgoose:affinity=calibrated
  rows+=,average-activation,arrow,spectr,logo,logo?k=3,merged,retrieval
  rows+=,discriminant,joint-discriminant,joint-discriminant?k=1,$choice,$shortlist
  rows+=,discriminant:temperature=0.2?k=3,discriminant:place=end,shrinkage=1
  "${held_in[@]}" "$out/held-in-routed.jsonl" 40 "$rows" "${b23[@]}" ;;
own-choices)
  end=discriminant:place=end
  rows=discriminant,$end,discriminant:shrinkage=1,$end,shrinkage=1,joint-discriminant,retrieval
  python research/study/own_choices.py research/study/suites/held-in.toml 20 "$rows" \
    "${b23[@]}" ;;
taken-apart)
  python research/study/taken_apart.py research/study/suites/held-in.toml "$out/taken-apart.jsonl" 40 \
    "${b23[@]}" ;;
development) compare $step 100 "$(suite cross-development)" $others,$ours,oracle,best-individual \
    "${a10[@]/#/$out/pool-a/}" ;;
confirmation) with_choice $step 100 "$(suite cross-confirmation)" \
    $others,$ours,oracle,best-individual "${a10[@]/#/$out/pool-a/}" ;;
b23) with_choice b23 100 "$(suite cross-confirmation cross-b)" $others,$ours,oracle,best-individual \
    "${b23[@]}" ;;
others)
  rows=base,retrieval,average-activation,arrow,merged,phatgoose,discriminant,joint-discriminant
  with_choice t0ho 100 "$(suite t0ho)" $rows "${b23[@]}"
  with_choice bigbench 50 "$(suite bbh bbl)" $rows "${b23[@]}" ;;
margins)
  suites=$(suite held-in)
  python research/study/margins.py "$suites=40" joint-discriminant phatgoose "" "${b23[@]}"
  hundred=$(suite cross-development cross-confirmation cross-b t0ho) fifty=$(suite bbh bbl)
  python research/study/margins.py "${hundred//,/=100,}=100,${fifty//,/=50,}=50" \
    joint-discriminant phatgoose "$(ls $out/{b23,t0ho,bigbench}{,-one}/results.jsonl | paste -sd,)" \
    "${b23[@]}" ;;
together)
  # shellcheck disable=SC2046
  python research/study/report.py cells $out/together.jsonl $(ls $out/{b23,t0ho,bigbench}{,-choice,-one}/results.jsonl)
  python research/study/report.py together $out/together.jsonl $out/together.md
  python research/study/report.py whole research/study/unseen.jsonl.xz $out/together.jsonl ;;
pool-sizes)  # single experts' answers are those of b23
  rows=merged,arrow,phatgoose,retrieval,discriminant,joint-discriminant,oracle
  for size in 4 8 16; do
    for seed in 1 2 3; do
      mapfile -t experts < <(draw $seed $size "${b23[@]}")
      with_choice b23 100 "$(suite cross-confirmation)" $rows "${experts[@]}"
    done
  done
  with_choice b23 100 "$(suite cross-confirmation)" $rows "${a10[@]/#/$out/pool-a/}" ;;
largest)  # leave out of rest_a and rest_b who fails the check of held-in
  rows=base,average-activation,arrow,merged,phatgoose,retrieval,discriminant,joint-discriminant,oracle
  mkdir -p $out/largest  # where single experts' answers are known already
  [[ -e $out/largest/results.jsonl ]] || cp $out/b23/results.jsonl $out/largest/
  compare largest 100 "$(suite cross-confirmation cross-b)" $rows "${b23[@]}" "${rest[@]}" ;;
figures)  # A10 is no draw
  python research/study/report.py cells $out/sizes.jsonl $out/{b23,largest,b23-choice}/results.jsonl
  python research/study/report.py sizes $out/sizes.jsonl research/study/sizes.png 10 ;;
*) echo "no such step: $step" >&2; exit 2 ;;
esac
