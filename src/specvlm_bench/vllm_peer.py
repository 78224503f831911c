"""Plain decoding by vLLM of a language model of given shapes: `python vllm_peer.py REQUEST.json ANSWER.json`.

A process of its own, which gives its GPU memory back when it ends and may be another interpreter's: it imports nothing
of specvlm. Weights are vLLM's dummies and prompts are token ids: what is timed does not depend on either. The vision
tower is not run. The prefill is left out of a token's time by the difference between two lengths of answer.

The request: {model, dtype, prompts: [tokens, ...], num_tokens, repeats}.
The answer: {version, prompts: [{prompt_tokens, first_s: [...], all_s: [...]}, ...]}.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

_FIRST_TOKEN = 2000  # prompts are ordinary tokens, a stretch of ids repeated
_STRETCH = 1000


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Load the model and time every prompt length."""
    vllm = importlib.import_module("vllm")
    longest = max(request["prompts"]) + request["num_tokens"]
    model = vllm.LLM(
        model=request["model"],
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=request["dtype"],
        max_model_len=longest + 16,
        max_num_seqs=8,
        enable_prefix_caching=False,  # every request pays for its own prefill
        seed=0,
    )

    def seconds(prompt_tokens: int, num_tokens: int) -> float:
        ids = [_FIRST_TOKEN + place % _STRETCH for place in range(prompt_tokens)]
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        model.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        return time.perf_counter() - begin

    answers = []
    for prompt_tokens in request["prompts"]:
        seconds(prompt_tokens, request["num_tokens"])
        rounds = [(seconds(prompt_tokens, 1), seconds(prompt_tokens, request["num_tokens"]))
                  for _ in range(request["repeats"])]  # fmt: skip
        first, whole = zip(*rounds, strict=True)
        answers.append({"prompt_tokens": prompt_tokens, "first_s": first, "all_s": whole})
    return {"version": vllm.__version__, "prompts": answers}


if __name__ == "__main__":
    request_file, answer_file = map(Path, sys.argv[1:])
    found = run(json.loads(request_file.read_text(encoding="utf-8")))
    answer_file.write_text(json.dumps(found), encoding="utf-8")
