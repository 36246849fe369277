#!/usr/bin/env bash
# One pool of three kinds of expert on real tasks, beside a pool of LoRAs of rank 16 on the same
# tasks: every method on ten unseen tasks. Usage: examples/mixed-pool.sh [FOLDER [LORA-EXPERTS]], where
# LORA-EXPERTS are those of examples/eight-experts.sh if they are there already. Needs ../shared/data
# beside the project and the extra 'retrieval'. Can be interrupted at any moment and started again:
# what is finished is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/mixed-pool}
loras=${2:-$out/loras}
phatgoose=${PHATGOOSE:-phatgoose}
data=../shared/data/train
suites=recipes/suites/t0ho-five.toml,recipes/suites/bbh-three.toml,recipes/suites/bbl-two.toml

mixed() { # TASK [FLAGS]
    local task=$1; shift
    $phatgoose train --recipe recipes/smollm2-mixed-pool.toml "$data/$task.jsonl" \
        --out "$out/experts" --resume "$@"
}

# LoRAs of four ranks, each scaled by 1 (alpha / rank).
mixed ag_news --rank 4 --alpha 4
mixed paws --rank 8 --alpha 8
mixed trec --rank 16 --alpha 16
mixed commonsense_qa --rank 32 --alpha 32
# (IA)³ at the learning rate of its paper (T-Few, Liu et al. 2022).
mixed social_i_qa --peft ia3 --learning-rate 3e-3
mixed qasc --peft ia3 --learning-rate 3e-3
# Bottleneck adapters, one of each placement.
mixed glue_qqp --peft bottleneck --placement houlsby
mixed common_gen --peft bottleneck --placement pfeiffer

[ $# -ge 2 ] || $phatgoose train --recipe recipes/smollm2-eight-experts.toml --out "$loras" --resume

methods=base,random,merged,average-activation,retrieval,phatgoose # arrow is for LoRAs
methods+=,best-individual,oracle
flags=(--suites $suites --limit 100 --methods $methods)
$phatgoose compare "$out/experts" "${flags[@]}" --out "$out/comparison-mixed"
$phatgoose compare "$loras" "${flags[@]}" --out "$out/comparison-loras"
