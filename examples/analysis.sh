#!/usr/bin/env bash
# The routing of real experts, as in research/earlier/analysis.md: every single expert is scored for
# Oracle, then three routers are analysed on five unseen tasks. Finished scores are kept: run it again after an
# interruption, or with more experts. The report holds texts of ../shared/data: don't publish it.
#   examples/analysis.sh EXPERTS [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
experts=${1:-runs/eight-experts/experts}
out=${2:-runs/analysis}
phatgoose=${PHATGOOSE:-phatgoose}
suite=recipes/suites/analysis-five.toml

$phatgoose compare "$experts" --suites $suite --methods oracle --limit 50 --out "$out/comparison"
$phatgoose analyse "$experts" --suite $suite --limit 50 --router phatgoose --against arrow,average-activation \
  --scores "$out/comparison/comparison.json" --out "$out"
