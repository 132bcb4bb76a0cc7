"""Runs in the interpreter that has vLLM, as a script: loads the model once, then does each round when told.

It imports nothing of hf_paged. One JSON object a line comes in on stdin, one a line goes out on the stdout
that the process was started with; all that vLLM prints goes to stderr.
"""

import json
import os
import sys
import time


def answer(llm, sampling_params, order: dict) -> dict:
    """One round: tokens of each request, seconds, and the times to tokens that vLLM reports."""
    prompts = [{"prompt_token_ids": ids} for ids in order["prompts"]]
    params = [
        sampling_params(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in order["lengths"]
    ]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    ttft, tpot = [], []
    for output, count in zip(outputs, order["lengths"]):  # noqa: B905 - may run on any Python
        times = output.metrics
        ttft.append(times.first_token_latency)
        tpot.append((times.last_token_ts - times.first_token_ts) / (count - 1) if count > 1 else None)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return {"tokens": tokens, "seconds": seconds, "ttft": ttft, "tpot": tpot}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints must not mix with the replies

    def reply(value: dict) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    settings = json.loads(sys.argv[1])
    try:
        import vllm
    except ImportError as error:
        reply({"missing": str(error)})
        return
    llm = vllm.LLM(
        settings["model"],
        dtype=settings["dtype"],
        max_model_len=settings["max_model_len"],
        enable_prefix_caching=False,
        disable_log_stats=False,  # the times to first token come with them
        seed=0,
        speculative_config=settings["speculation"],
    )
    reply({"ready": vllm.__version__})
    for line in sys.stdin:
        reply(answer(llm, vllm.SamplingParams, json.loads(line)))


if __name__ == "__main__":
    main()
