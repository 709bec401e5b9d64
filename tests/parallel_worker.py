"""One rank of tests/test_transformers_parallel.py: loads its part of a checkpoint, says what it computes."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


@torch.no_grad()
def main(checkpoint: str, out: str, request: str) -> None:
    options = json.loads(request)
    rank = int(os.environ["RANK"])
    answer = {}
    try:
        config = DistributedConfig(tp_size=2, **options.get("distributed", {}))
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, distributed_config=config)
        logits = model(torch.arange(24).view(2, 12)).logits
        torch.save(logits, f"{out}/logits-{rank}.pt")
        down = model.get_submodule(f"model.layers.0.{options.get('linear', 'mlp.down_proj')}")
        answer = {"held": list(down.held), "in_features": down.in_features, "packed": down.packed is not None}
        model.save_pretrained(f"{out}/saved-{rank}")
    except ValueError as error:
        answer["error"] = str(error)
    Path(f"{out}/answer-{rank}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
