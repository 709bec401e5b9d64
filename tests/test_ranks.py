"""Calibration on two processes (gloo): the codes of one process, one checkpoint, refusals."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from rosaq.pipeline import quantize
from rosaq.pipeline.workspace import Workspace
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


def reports(*directories):
    return [json.loads((directory / "rosaq_layers.json").read_text()) for directory in directories]


def test_two_ranks_give_the_codes_of_one_process(dense, text, tmp_path):
    done = request(dense, tmp_path / "two", text, "--salient", "2", "--preset", "fast", "--head-bits", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compare it with the original") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    alone = {"salient": 2, "group_size": 32, "preset": "fast", "head_bits": 4}
    quantize(dense, tmp_path / "one", calibration=TEXT, spec=SPEC, **alone)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert "lm_head.qweight" in ours
    for name in ours:
        if name.endswith(("qweight", "zeros", "salient_index", "rotation")):
            assert torch.equal(ours[name], theirs[name]), name
        else:
            assert torch.allclose(ours[name].float(), theirs[name].float(), rtol=2e-3, atol=1e-6), name
    mine, other = reports(tmp_path / "two", tmp_path / "one")
    for block, same in zip(mine["blocks"], other["blocks"], strict=True):
        assert block["importance"]["effective_share"] == pytest.approx(same["importance"]["effective_share"])


def test_two_ranks_tune_together(dense, text, tmp_path):
    done = request(dense, tmp_path / "out", text, "--salient", "2", "--preset", "best")
    assert done.returncode == 0, done.stderr
    (report,) = reports(tmp_path / "out")
    assert report["divergence"][1] < report["divergence"][0]
    assert all(after < before for before, after in (block["tuned"] for block in report["blocks"]))


def test_more_processes_than_batches_are_refused(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("rosaq.pipeline.request.num_ranks", lambda: 9)
    with pytest.raises(ValueError, match="num_sequences: got 16 in 8 batches of 2 for 9 processes, need at least one"):
        quantize(dense, tmp_path / "out", calibration=TEXT, group_size=32, salient=2, spec=SPEC)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_removed_while_another_rank_may_still_read(tmp_path, monkeypatch):
    work = Workspace(tmp_path / "out", {}, torch.device("cpu"), force=False, resume=False)
    work.save("step", {"x": torch.ones(2)}, {})
    (work.final_directory() / "config.json").write_text("{}")
    seen = []
    monkeypatch.setattr("rosaq.pipeline.workspace.wait_for_all", lambda: seen.append(work.load("step") is not None))
    work.commit()
    assert seen == [True, False], "the ranks meet before the workspace goes, and after"
