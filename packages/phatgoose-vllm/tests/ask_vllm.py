"""Run by the tests, one process for each engine: what vLLM answers to prompts of token ids.

    python ask_vllm.py JOB.json ANSWERS.json

A job has the `base`, settings of `LLM` in `llm`, and `rounds`: lists of prompts that are asked
together, one round after the other. An answer has the greedy tokens, their log-probabilities, and
how many of the prompt's tokens came from the prefix cache.
"""

import json
import sys
from pathlib import Path


def main(job_file, answers_file):
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    llm = LLM(job["base"], dtype="float32", seed=0, skip_tokenizer_init=True, **job["llm"])
    fixed = {"temperature": 0, "logprobs": 1, "ignore_eos": True, "detokenize": False}
    sampling, rounds = SamplingParams(max_tokens=job["tokens"], **fixed), []
    for prompts in job["rounds"]:
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        rounds.append([answer_of(each) for each in llm.generate(asked, sampling, use_tqdm=False)])
    Path(answers_file).write_text(json.dumps(rounds))


def answer_of(reply):
    tokens = list(reply.outputs[0].token_ids)
    scored = zip(reply.outputs[0].logprobs, tokens, strict=True)
    return tokens, [each[token].logprob for each, token in scored], reply.num_cached_tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
