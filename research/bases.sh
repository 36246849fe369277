#!/bin/bash
# Twelve experts on another base and what its routers keep of them in new wordings, all resumable:
#   research/bases.sh gemma-3-270m [ROWS]
# Results are in runs/research/BASE. Hours of two cores; ROWS of each task (30 in research/decoders.md).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TQDM_DISABLE=1
base=$1 rows=${2:-30} data=runs/research/data out=runs/research/$1
routers=phatgoose,average-activation,arrow,merged,discriminant,discriminant:per_block=1,joint-discriminant,retrieval,centroid
[ -e $data/own-new.toml ] || python research/render_tasks.py $data
python research/bases.py "$base" "$out/base"
phatgoose train --recipe research/pool-12.toml --base "$out/base" --out "$out/pool" --resume
for expert in "$out"/pool/*/; do
    [ -e "$expert/embeddings.safetensors" ] ||
        phatgoose stats "$expert" --task $data/train/"$(basename "$expert")".jsonl \
            --no-means --no-readings --embeddings --statistics-examples 256
done
python research/readers.py "$out/pool" $data/own-new "$out/readers.json" --limit 8
cd research/study
python held_in.py ../../$data/own-new.toml "../../$out/held_in.jsonl" "$rows" $routers "../../$out/pool"
