"""rosaq verify: a sound checkpoint passes every check, and each kind of damage fails the one that is for it."""

import json
import re

import pytest
import torch

import rosaq
from rosaq.checkpoint import HASHES_FILE, write_hashes
from rosaq.config import LinearFormat
from rosaq.verification import verify
from tests.models import SMALL, change_config, save_dense, save_rosaq, vandalise

ROTATED = LinearFormat(4, 32, num_salient=3, salient="basis", rotation_blocks=1, rotation_size=32)
Q_PROJ = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(name="checkpoint")
def _checkpoint(tmp_path):
    return save_rosaq(
        tmp_path / "model", default=LinearFormat(3, 32, num_salient=4), modules={"mlp.down_proj": ROTATED}
    )


def failures(directory, **options):
    """{check: detail} of what failed."""
    return {check.name: check.detail for check in verify(directory, **options).checks if check.status == "failed"}


def test_sound_checkpoint_passes(checkpoint):
    verdict = verify(checkpoint, sample=14)
    status = {check.name: check.status for check in verdict.checks}
    assert verdict.is_sound
    assert status.pop("hashes") == "unknown"
    assert set(status.values()) == {"ok"}
    assert set(status) == {"config", "files", "tensors", "model", "tensor parallel", "numbers", "results"}


@pytest.mark.parametrize(
    ("recipe", "symmetric"), [("rtn", False), ("rtn", True), ("rosaq", False), ("rosaq-gptq", False), ("gptq", True)]
)
def test_what_rosaq_writes_is_sound_and_hashed(tmp_path, recipe, symmetric):
    dense = save_dense(tmp_path / "dense")
    rosaq.quantize(dense, tmp_path / "out", recipe=recipe, bits=3, symmetric=symmetric, **SMALL)
    verdict = verify(tmp_path / "out", sample=14)
    assert {check.status for check in verdict.checks} == {"ok"}, verdict.checks
    assert rosaq.read_config(tmp_path / "out").tp_sizes == (1, 2)


def test_progress_and_json(checkpoint):
    seen = []
    verdict = verify(checkpoint, sample=0, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (14, 14)
    assert json.loads(json.dumps(verdict.to_dict()))["is_sound"]
    assert "results" not in {check.name for check in verdict.checks}


@pytest.mark.parametrize(
    ("change", "check", "detail"),
    [
        (lambda t: t[f"{Q_PROJ}.scales"].fill_(torch.nan), "numbers", "q_proj.scales: got 128 NaN or Inf"),
        (lambda t: t[f"{Q_PROJ}.scales"].neg_(), "numbers", "scales: got -.* need no negative step"),
        (
            lambda t: t[f"{Q_PROJ}.salient_index"].fill_(3),
            "numbers",
            "salient_index: got 1 different channels from 3 to 3, need 4",
        ),
        (lambda t: t[f"{Q_PROJ}.zeros"].add_(1), "numbers", "got 4 salient columns whose codes are not the zero point"),
        (lambda t: t[f"{DOWN}.zeros"].fill_(16), "numbers", "down_proj.zeros: got a zero point of 16, need at most 15"),
        (lambda t: t[f"{DOWN}.rotation"].mul_(1.1), "numbers", "rotation: got R Rᵀ off the identity by 0.21"),
        (lambda t: t["model.norm.weight"].fill_(torch.inf), "numbers", "model.norm.weight: got NaN or Inf"),
        (lambda t: t.pop("model.norm.weight"), "model", "model.norm.weight: got no such tensor, need it"),
        (lambda t: t.update(extra=torch.zeros(1)), "model", "extra: got a tensor the model has no place for"),
        (lambda t: t.pop(f"{Q_PROJ}.scales"), "tensors", "q_proj.scales: got no such tensor"),
        (
            lambda t: t.update({f"{Q_PROJ}.scales": torch.tensor(1.0)}),
            "tensors",
            r"q_proj.scales: got shape \[\], need two dimensions",
        ),
    ],
)
def test_damaged_tensors_fail(checkpoint, change, check, detail):
    vandalise(checkpoint, change)
    found = failures(checkpoint)
    assert list(found) == [check]
    assert re.search(detail, found[check]), found


@pytest.mark.parametrize(
    ("change", "check", "detail"),
    [
        (lambda v: v["quantization_config"].update(version=3), "config", "version: got 3"),
        (lambda v: v["quantization_config"].update(bits=4), "tensors", "got codes of 3 bits, need 4 by config.json"),
        (
            lambda v: v["quantization_config"].update(tp_sizes=[1, 2, 4]),
            "tensor parallel",
            "[1, 2, 4], need [1, 2]",
        ),
        (lambda v: v.update(hidden_size=128), "model", "got [64, 64], need [64, 128]"),
        (lambda v: v.update(num_hidden_layers=3), "model", "model.layers.2"),
        (lambda v: v.pop("model_type"), "model", "got no model_type"),
        (lambda v: v.update(hidden_size="64"), "model", "hidden_size"),
        (lambda v: v.update(model_type="none"), "model", "none"),
    ],
)
def test_config_that_claims_something_else_fails(checkpoint, change, check, detail):
    change_config(checkpoint, change)
    found = failures(checkpoint)
    assert check in found
    assert detail in found[check], found


@pytest.mark.parametrize(
    ("key", "value", "need"),
    [
        ("modules_to_not_convert", None, "a list of str"),
        ("modules", [], "a format for each name"),
        ("modules", {"mlp": 3}, "a format for each name"),
        ("tp_sizes", "1", "a list of int"),
        ("recipe", None, "str"),
        ("group_size", "32", "int"),
        ("group_size", None, "int"),
        ("num_salient", None, "int"),
        ("sym", 1, "bool"),
    ],
)
def test_config_of_other_types_fails(checkpoint, key, value, need):
    change_config(checkpoint, lambda values: values["quantization_config"].update({key: value}))
    assert failures(checkpoint) == {"config": f"quantization_config.{key}: got {value!r}, need {need}"}


def test_files_that_changed_since_they_were_hashed_fail(checkpoint):
    write_hashes(checkpoint)
    assert verify(checkpoint).is_sound
    vandalise(checkpoint, lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert "model.safetensors: got other bytes" in failures(checkpoint)["hashes"]
    (checkpoint / HASHES_FILE).write_text("../x\n")
    assert "line 1: got '../x', need a SHA-256" in failures(checkpoint)["hashes"]


def test_truncated_and_pickled_files_fail(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "bytes, need" in failures(checkpoint)["tensors"]
    path.rename(checkpoint / "pytorch_model.bin")
    assert "only pickled weights" in failures(checkpoint)["tensors"]


def test_wrong_kernel_results_fail(checkpoint, monkeypatch):
    forward = rosaq.RosaqLinear.forward
    monkeypatch.setattr(rosaq.RosaqLinear, "forward", lambda self, x: forward(self, x) * 1.001)
    assert "worst relative error 1.0e-03" in failures(checkpoint)["results"]


def test_results_that_are_no_number_fail(checkpoint, monkeypatch):
    """Of one linear, so that finite errors come after it."""
    forward, seen = rosaq.RosaqLinear.forward, []

    def broken(self, x):
        seen.append(self)
        return forward(self, x) * (float("nan") if len(seen) == 1 else 1)

    monkeypatch.setattr(rosaq.RosaqLinear, "forward", broken)
    assert "worst relative error nan" in failures(checkpoint)["results"]
    assert len(seen) > 1


def test_what_the_process_computes_with_is_no_fault_of_the_checkpoint(checkpoint):
    rosaq.set_cpu_precision("int8")
    try:
        assert verify(checkpoint, sample=14).is_sound
        assert rosaq.ops.cpu_precision() == "int8"
    finally:
        rosaq.set_cpu_precision("exact")


def test_bad_requests_are_refused(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match="directory: got .*none.*, need a model directory or a hub name"):
        verify(tmp_path / "none")
    with pytest.raises(ValueError, match="sample: got -1"):
        verify(checkpoint, sample=-1)


def test_a_model_without_a_parallel_plan_is_not_called_unsound(tmp_path, monkeypatch):
    checkpoint = save_rosaq(tmp_path, default=LinearFormat(3, 32))
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["tp_sizes"] = [1, 2]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert verify(checkpoint).is_sound
    monkeypatch.setattr("rosaq.integrations.transformers_model.ModelShape.rank_counts", lambda *_: ())
    verdict = verify(checkpoint)
    assert verdict.is_sound
    (check,) = [check for check in verdict.checks if check.name == "tensor parallel"]
    assert check.status == "unknown"
