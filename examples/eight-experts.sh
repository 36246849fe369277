#!/usr/bin/env bash
# Eight experts on real tasks, every method, ten unseen tasks: the numbers of research/earlier/eight-experts.md.
# Usage: examples/eight-experts.sh [FOLDER]. Needs ../shared/data beside the project and the extra
# 'retrieval'. Can be interrupted at any moment and started again: what is finished is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/eight-experts}
recipe=recipes/smollm2-eight-experts.toml
suites=recipes/suites/t0ho-five.toml,recipes/suites/bbh-three.toml,recipes/suites/bbl-two.toml

phatgoose train --recipe $recipe --out "$out/experts" --resume
# One expert on the mixture of all eight tasks, and the eight again with gates trained jointly.
phatgoose train --recipe $recipe --multitask multitask --steps 160 --eval-every 80 \
    --no-means --no-embeddings --out "$out/multitask" --resume
phatgoose train --recipe $recipe --joint --no-means --no-embeddings --out "$out/joint" --resume
phatgoose compare "$out/experts" --suites $suites --limit 100 \
    --reference multitask="$out/multitask" --reference joint="$out/joint" --out "$out/comparison"
