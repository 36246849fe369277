#!/bin/bash
# What protocol-2.md trains and scores: one process at a time, all of it resumable. In a folder with
# phatgoose of commit 6aa0f67a installed in venv/ (its routers: logo has left since), data/ by render_tasks.py, and this folder's copy as research/:
#   setsid nohup nice -n 19 bash research/run.sh [STAGE …] >> log/run.log 2>&1 < /dev/null &
# Without stages all of them in order. Again after an end or an interruption: it goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TQDM_DISABLE=1 PATH=$PWD/venv/bin:$PATH
exec 9> lock && flock 9 # waits for whoever runs already
six="evalution qasc question_typing odd_man_out sciq common_gen"
eight="$six tweet_emotion trec"
twelve="$eight blimp hotpot_qa_closed_book query_wellformedness clinc150_intent"
others="creak rotten_tomatoes commonsense_qa subj multirc_answerable mctaco_answer asdiv"
others="$others outcome_extraction glue_qqp social_i_qa glue_mnli cos_e tomqa essential_terms"
recipe="--recipe research/pool-12.toml --resume"
pools=phatgoose,phatgoose?k=1,uniform-top-k,average-activation,arrow,spectr,seqr,merged,logo,random
pools=$pools,discriminant,discriminant:per_block=1,discriminant-phatgoose
embedding=joint-discriminant,retrieval,centroid,centroid?k=1,glider
three=phatgoose,phatgoose?k=1,discriminant # of the switch

files() { for task in $1; do echo "data/train/$task.jsonl"; done; }

# A third base: bases.py has written bases/qwen2.5-coder-0.5b.
qwen() {
    phatgoose train $(files "$1") $recipe --base bases/qwen2.5-coder-0.5b --out runs/qwen/pool
}
qwen-six() { qwen "$six"; }
qwen-twelve() { qwen "$twelve"; }
qwen-scores() {
    for expert in runs/qwen/pool/*/; do
        [ -e "$expert/embeddings.safetensors" ] ||
            phatgoose stats "$expert" --task "data/train/$(basename "$expert").jsonl" \
                --no-means --no-readings --embeddings --statistics-examples 256 || return
    done
    n=$(ls -d runs/qwen/pool/*/ | wc -l) # a larger pool is scored anew
    python research/readers.py runs/qwen/pool data/own-new "runs/qwen/readers-$n.json" --limit 8 &&
        python research/study/held_in.py data/own-new.toml "runs/qwen/held_in-$n.jsonl" 30 \
            "$pools,$embedding" runs/qwen/pool
}

# The switch: the same commands, causal and under the mask, on bases adapted by so many STEPS.
under() { [ "$1" = causal ] && echo "$2" || echo "python research/prefix_lm.py $3"; }
adapt() { # STEPS ROWS, at most, of a task
    for mask in causal prefix; do
        base=bases/smollm2-$mask-$1
        $(under $mask "phatgoose train" train) $(files "$others") $recipe --base smollm2 \
            --multitask adapt --mixture-most "$2" --rank 64 --alpha 64 --steps "$1" \
            --eval-every 128 --eval-examples 96 --gate-steps 1 --no-means --no-readings \
            --statistics-examples 1 --out "runs/switch/$mask-$1-adapted" || return
        [ -e "$base/config.json" ] ||
            python research/prefix_lm.py merge "runs/switch/$mask-$1-adapted/adapt" "$base" || return
        echo "losses of the adapted base, $mask, $1 steps" # on the same rows under both masks
        python research/prefix_lm.py losses "$base" $(files "$eight")
    done
}
switch() { # STEPS SEED
    for mask in causal prefix; do
        out=runs/switch/$mask-$1-$2
        $(under $mask "phatgoose train" train) $(files "$eight") $recipe --seed "$2" \
            --base "bases/smollm2-$mask-$1" --out "$out" || return
        $(under $mask "python research/readers.py" research/readers.py) "$out" data/own-new \
            "$out-readers.json" --limit 8 || return
        $(under $mask "python research/study/held_in.py" research/study/held_in.py) \
            data/own-new.toml "$out-held_in.jsonl" 40 "$three" "$out" ||
            return
    done
}
adapt-512() { adapt 512 300; }
switch-512-0() { switch 512 0; }
adapt-2048() { adapt 2048 1200; }
switch-2048-0() { switch 2048 0; }
adapt-1024() { adapt 1024 600; }
switch-1024-1() { switch 1024 1; }

[ $# -gt 0 ] || set -- qwen-six adapt-512 switch-512-0 qwen-twelve qwen-scores \
    adapt-2048 switch-2048-0 adapt-1024 switch-1024-1
for stage; do
    echo "$(date '+%F %T') $stage begins"
    "$stage" && echo "$(date '+%F %T') $stage is done" || echo "$(date '+%F %T') $stage FAILED"
done
