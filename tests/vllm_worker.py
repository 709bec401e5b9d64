"""One run of the real vLLM engine for tests/test_vllm.py: greedy tokens and their log probabilities, as JSON."""

import json
import sys
from pathlib import Path


def main(checkpoint: str, out: str, tensor_parallel_size: int, compiled: bool) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(
        checkpoint,
        dtype="float32",
        enforce_eager=not compiled,
        tensor_parallel_size=tensor_parallel_size,
        max_model_len=64,
        max_num_seqs=4,
        skip_tokenizer_init=True,
    )
    prompts = [list(range(5, 25)), [7, 3, 9]]
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True, detokenize=False)
    answers = []
    for answer in engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling):
        best = answer.outputs[0]
        logprobs = [step[token].logprob for token, step in zip(best.token_ids, best.logprobs, strict=True)]
        answers.append({"tokens": list(best.token_ids), "logprobs": logprobs})
    # By its importable name: the engine sends it to its workers.
    from tests.vllm_worker import count_launches as count

    launches = engine.apply_model(count)
    Path(out).write_text(json.dumps({"prompts": prompts, "answers": answers, "launches": launches}))


def count_launches(model: object) -> dict[str, int]:
    """{vLLM's layer: launches it takes} on one rank."""
    from rosaq.integrations.vllm_linear import FusedLinear

    modules = model.named_modules()  # type: ignore[attr-defined]
    return {name: len(module.launches) for name, module in modules if isinstance(module, FusedLinear)}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "compiled")
