"""Calibration on two processes (gloo): the codes of one process, one checkpoint, refusals."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from rosaq.pipeline import quantize
from rosaq.specs import CalibrationSpec
from tests.models import TEXT, save_dense, tiny_llama

SPEC = CalibrationSpec(num_sequences=16, sequence_length=48, batch_size=2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_llama())


def torchrun(*arguments):
    """`torchrun -m rosaq ...` on two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rosaq"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, env=environment)


def request(dense, output, text, *more):
    spec = ["--num-sequences", "16", "--sequence-length", "48", "--batch-size", "2"]
    return torchrun(
        "quantize", str(dense), "-o", str(output), "--calibration", str(text), "--group-size", "32", *spec, *more
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT[0])
    return path


@pytest.mark.parametrize("recipe", ["rosaq-gptq", "gptq"])
def test_two_ranks_give_the_codes_of_one_process(recipe, dense, text, tmp_path):
    done = request(dense, tmp_path / "two", text, "--recipe", recipe, "--preset", "fast", "--salient", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compare it with the original") == 1
    one = {"recipe": recipe, "preset": "fast", "salient": 2, "group_size": 32, "spec": SPEC}
    quantize(dense, tmp_path / "one", calibration=TEXT, **one)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith(("qweight", "zeros", "salient_index")):
            assert torch.equal(ours[name], theirs[name]), name
        else:
            assert torch.allclose(ours[name].float(), theirs[name].float(), rtol=2e-3, atol=1e-6), name
    reports = [json.loads((tmp_path / name / "rosaq_layers.json").read_text())["blocks"] for name in ("two", "one")]
    for mine, other in zip(*reports, strict=True):
        if mine["importance"] is not None:
            assert mine["importance"]["effective_share"] == pytest.approx(other["importance"]["effective_share"])


def test_tuning_on_two_ranks_lowers_the_divergence_and_resumes_are_refused_on_one(dense, text, tmp_path):
    done = request(dense, tmp_path / "out", text, "--salient", "2")
    assert done.returncode == 0, done.stderr
    before, after = json.loads((tmp_path / "out" / "rosaq_layers.json").read_text())["divergence"]
    assert 0 < after < before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_more_processes_than_batches_are_refused(dense, text, tmp_path):
    done = request(dense, tmp_path / "out", text, "--preset", "fast", "--batch-size", "16")
    assert done.returncode != 0
    assert "num_sequences: got 16 in 1 batches of 16 for 2 processes, need at least one batch each" in done.stderr
    assert list(tmp_path.iterdir()) == []
