"""transformers' tensor parallelism: two processes compute what one does, or say why they cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rosaq.config import LinearFormat
from rosaq.pipeline import quantize
from tests.families import save_family, tiny_family
from tests.models import SMALL, save_rosaq, tiny_llama
from tests.tolerances import assert_same_function

WORKER = Path(__file__).parent / "parallel_worker.py"
ROTATED = LinearFormat(4, 32, num_salient=3, salient="basis", rotation_blocks=1, rotation_size=32)


def run_ranks(checkpoint, out, port, **options):
    """Run two ranks on the CPU; returns what each has answered."""
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env["MASTER_PORT"] = str(port)
    env["PYTHONPATH"] = str(WORKER.parent.parent)
    command = [sys.executable, str(WORKER), str(checkpoint), str(out), json.dumps(options)]
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    return [json.loads((out / f"answer-{rank}.json").read_text()) for rank in range(2)]


@torch.no_grad()
def test_two_ranks_compute_what_one_does(tmp_path, free_port):
    # bias on every linear; salient channels, a basis and rotations on the sites that are cut along "in"
    checkpoint = save_rosaq(
        tmp_path / "model",
        tiny_llama(attention_bias=True, mlp_bias=True),
        default=LinearFormat(3, 32, num_salient=4),
        modules={"mlp.down_proj": ROTATED, "layers.1.self_attn.o_proj": LinearFormat(4, -1, symmetric=True)},
    )
    answers = run_ranks(checkpoint, tmp_path, free_port)
    want = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(torch.arange(24).view(2, 12)).logits
    for rank, answer in enumerate(answers):
        assert answer["held"] == [64, 64]
        assert answer["in_features"] == 128
        assert answer["packed"]
        assert "got a model cut between ranks" in answer["error"]
        assert_same_function(torch.load(tmp_path / f"logits-{rank}.pt"), want)


@torch.no_grad()
def test_two_ranks_share_every_expert(tmp_path, free_port):
    source = save_family(tmp_path / "dense", tiny_family("mixtral"))
    quantize(source, tmp_path / "model", recipe="rtn", **SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    want = model(torch.arange(24).view(2, 12)).logits
    for rank, answer in enumerate(run_ranks(tmp_path / "model", tmp_path, free_port, linear="mlp.experts.3.w2")):
        assert answer["held"] == [64, 64]
        assert answer["in_features"] == 128
        assert_same_function(torch.load(tmp_path / f"logits-{rank}.pt"), want)


def test_size_that_does_not_divide_is_refused(tmp_path, free_port):
    fmt = LinearFormat(3, 64)
    checkpoint = save_rosaq(tmp_path / "model", default=fmt)
    for answer in run_ranks(checkpoint, tmp_path, free_port):
        assert "tensor parallel size: got 2, need one of [1]: in_features 64" in answer["error"]


def test_style_that_is_not_ours_is_refused(tmp_path, free_port):
    checkpoint = save_rosaq(tmp_path / "model", default=LinearFormat(3, 32, num_salient=4))
    plan = {"model.layers.*.mlp.up_proj": "colwise"}
    for answer in run_ranks(checkpoint, tmp_path, free_port, distributed={"tp_plan": plan}):
        assert "up_proj: got a parallel style that is not rosaq's" in answer["error"]
