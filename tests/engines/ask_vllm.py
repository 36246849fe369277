"""Run by the tests, one process for each engine: what vLLM answers to prompts of token ids.

    python ask_vllm.py JOB.json ANSWERS.json

A job has the `base`, settings of `LLM` in `llm`, and `rounds`: lists of prompts that are asked
together, one round after the other. An answer has the greedy tokens, their log-probabilities, how
many of the prompt's tokens came from the prefix cache, and the log-probabilities of the prompt's
own tokens where the job asks for them.
"""

import json
import sys
from pathlib import Path


def main(job_file: str, answers_file: str) -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    settings = {"dtype": "float32", "enforce_eager": True, "seed": 0, **job.get("llm", {})}
    llm = LLM(job["base"], **settings)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=job["tokens"],
        logprobs=1,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0 if job.get("reads") else None,
    )
    answers = []
    for prompts in job["rounds"]:
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        answers.append(
            [answer_of(found) for found in llm.generate(asked, sampling, use_tqdm=False)]
        )
    Path(answers_file).write_text(json.dumps(answers))


def answer_of(found) -> dict:
    tokens = list(found.outputs[0].token_ids)
    answer = {
        "tokens": tokens,
        "logprobs": [
            each[token].logprob
            for each, token in zip(found.outputs[0].logprobs, tokens, strict=True)
        ],
        "cached": found.num_cached_tokens,
    }
    if found.prompt_logprobs is not None:
        ids = found.prompt_token_ids
        answer["prompt"] = [
            each[token].logprob
            for each, token in zip(found.prompt_logprobs[1:], ids[1:], strict=True)
        ]
    return answer


if __name__ == "__main__":
    main(*sys.argv[1:])
