"""A whole checkpoint on a real GPU: the logits of the CPU, decoding in a captured graph and in a compiled step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from rosaq import _C, RosaqLinear
from rosaq.config import LinearFormat
from rosaq.integrations.transformers_decoding import compiled_step
from tests.models import save_rosaq
from tests.tolerances import assert_as_good_as

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and _C.build_info()["cuda"]),
        reason="needs a CUDA device, a torch that sees it, and a rosaq built with nvcc",
    ),
]
FORMATS = {
    "int3-salient": {"default": LinearFormat(3, 32, num_salient=4)},
    "mixed": {
        "default": LinearFormat(3, 32),
        "modules": {"mlp.down_proj": LinearFormat(4, 32, rotation_blocks=1, rotation_size=32)},
    },
}
INPUT_IDS = torch.arange(24).view(2, 12)
NEW_TOKENS = 8


@pytest.fixture(params=FORMATS, name="checkpoint")
def _checkpoint(request, tmp_path):  # type: ignore[no-untyped-def]
    return save_rosaq(tmp_path / "model", **FORMATS[request.param])


def load(checkpoint: Any, device: str, dtype: torch.dtype = torch.float16) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map=device).eval()


def greedy(model: Any, **how: Any) -> Any:
    ids = INPUT_IDS.to(model.device)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, **how
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_are_as_good_as_on_the_cpu(checkpoint: Any, dtype: torch.dtype) -> None:
    model = load(checkpoint, "cuda", dtype)
    assert all(m.packed.is_cuda for m in model.modules() if isinstance(m, RosaqLinear))
    exact = load(checkpoint, "cpu", torch.float32).dequantize(torch.float64).to(torch.float64)
    want = exact(INPUT_IDS).logits
    plain = exact.to(dtype).cuda()(INPUT_IDS.cuda()).logits.cpu()
    assert_as_good_as(model(INPUT_IDS.cuda()).logits.cpu(), plain, want)


@torch.no_grad()
def test_a_captured_step_decodes_what_an_eager_one_does(checkpoint: Any) -> None:
    model = load(checkpoint, "cuda")
    want = greedy(model).cpu()
    cache = StaticCache(config=model.config, max_cache_len=INPUT_IDS.shape[1] + NEW_TOKENS + 1)
    token = model(INPUT_IDS.cuda(), past_key_values=cache).logits[:, -1:].argmax(-1)
    lengths = [layer.cumulative_length.clone() for layer in cache.layers]

    def step() -> torch.Tensor:
        return model(token, past_key_values=cache).logits[:, -1:].argmax(-1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token.copy_(step())
    for layer, length in zip(cache.layers, lengths, strict=True):  # the warm-up moved on by a token
        layer.cumulative_length.copy_(length)
    made = [token.cpu().clone()]
    for _ in range(NEW_TOKENS - 1):
        graph.replay()
        made.append(token.cpu().clone())
    assert torch.equal(torch.cat(made, 1), want[:, INPUT_IDS.shape[1] :])


@torch.no_grad()
def test_a_compiled_step_is_as_good_as_an_eager_one(checkpoint: Any) -> None:
    """Every step's logits, for the tokens chosen before it: where two tokens are nearly level, rounding decides."""
    model = load(checkpoint, "cuda", torch.float16)
    made = greedy(model, output_logits=True, return_dict_in_generate=True, **compiled_step(model))
    got, chosen = torch.stack(made.logits, 1).half().cpu(), made.sequences.cpu()
    exact = load(checkpoint, "cpu", torch.float32).dequantize(torch.float64).to(torch.float64)
    want = exact(chosen[:, :-1]).logits[:, -NEW_TOKENS:]
    plain = exact.half().cuda()(chosen[:, :-1].cuda()).logits[:, -NEW_TOKENS:].cpu()
    assert_as_good_as(got, plain, want)
    assert torch.equal(got.argmax(-1), chosen[:, -NEW_TOKENS:])
