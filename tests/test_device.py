"""Where a run computes: every tensor on the device it was told, the bits of the CPU there, refusals before any work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rosaq.calibrate import BlockModel
from rosaq.cli import main
from rosaq.config import LinearFormat
from rosaq.devices import choose_device
from rosaq.evaluation import load_subject
from rosaq.pipeline import quantize
from tests.families import save_family, tiny_family
from tests.models import SMALL, save_dense, save_rosaq, tiny_llama

ROOT = Path(__file__).parent.parent
SPEC = {"num_sequences": 6, "sequence_length": 48, "batch_size": 4}
CASES = {
    "rtn": {"recipe": "rtn", "group_size": 32},
    "rosaq": {"recipe": "rosaq", "group_size": 32, "salient": 4},
    "layer": {"recipe": "rosaq-layer", "group_size": 32, "salient": 4},
    "quarot": {"recipe": "quarot", "group_size": 32, "importance": "chunks"},
    # Adam's first steps have one size, however small the gradient: larger ones grow the last bits of sums until a scale
    # falls on the other float16 neighbour
    "tuned": {"recipe": "rosaq-gptq", "group_size": 32, "salient": 2, "preset": "best", "model_rates": 1},
    "budget": {"recipe": "rosaq-gptq", "target_bits": 4.2, "head_bits": 4, "preset": "fast"},
    "mixture": {"recipe": "rosaq-gptq", "group_size": 32, "salient": 2, "preset": "fast"},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_llama())


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """(directory of outputs, what the worker told). One process for all: the imitated device is registered for good."""
    root = tmp_path_factory.mktemp("made")
    mixture = save_family(root / "mixtral", tiny_family("mixtral"))
    models = {"mixture": str(mixture)}
    cases = {name: {"model": models.get(name, str(dense)), "spec": SPEC, **case} for name, case in CASES.items()}
    (root / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.imitated_worker", str(root / "cases.json"), str(root)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return root, json.loads((root / "told.json").read_text())


def is_same(name, here, there):
    """A few salient weights may differ by less than float16 holds of the largest: what is left of a column beside its
    codes can be small, and what was tuned before that was taken off was not."""
    if name.endswith("salient_weight"):
        off = (here.float() - there.float()).abs()
        return bool(off.max() <= 2**-11 * there.float().abs().max()) and int(off.count_nonzero()) <= 2
    return torch.equal(here, there)


@pytest.mark.parametrize("case", CASES)
def test_another_device_ends_with_the_tensors_of_the_cpu(case, made):
    root, told = made
    here, there = (load_file(root / f"{case}-{place}" / "model.safetensors") for place in ("imitated", "cpu"))
    assert here.keys() == there.keys()
    assert [name for name in here if not is_same(name, here[name], there[name])] == []
    assert told[case]["device"] == "imitated:0"


def test_the_work_was_done_on_the_device(made):
    _, told = made
    assert "aten::amax" in told["rtn"]["ops"]
    wanted = {
        "aten::_linalg_eigh",
        "aten::linalg_cholesky_ex",
        "aten::addmm_",
        "aten::mm",
        "aten::bmm",
    }
    assert wanted <= {*told["tuned"]["ops"]}


def test_the_imitated_device_refuses_what_a_gpu_would(made):
    _, told = made
    assert told["refused"].keys() == {"mixed", "inplace", "generator", "numpy"}
    assert "same device" in told["refused"]["mixed"]
    assert "generator" in told["refused"]["generator"]


@pytest.fixture(name="two_gpus")
def _two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.usefixtures("two_gpus")
def test_a_name_means_one_device():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)


@pytest.mark.usefixtures("two_gpus")
def test_every_process_takes_a_gpu_of_its_own(monkeypatch):
    for name, value in {"is_initialized": True, "get_world_size": 4, "get_rank": 2}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device: got 'cuda', which is GPU 2 here, need 'cuda:N' with N below 2"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="device: got 'cuda:1' for 4 processes, need 'cuda'"):
        choose_device("cuda:1")


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:-1", "CUDA", "", "cpu:0"])
def test_an_unknown_device_is_refused_before_any_work(name, tmp_path):
    with pytest.raises(ValueError, match=f"device: got '{name}', need 'cpu', 'cuda' or 'cuda:N'"):
        quantize(tmp_path / "no-such-model", tmp_path / "out", device=name, **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="device: got 'cuda:2', which is GPU 2 here, need 'cuda:N' with N below 2"):
        quantize(tmp_path / "no-such-model", tmp_path / "out", device="cuda:2", **SMALL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: got 'cuda', need a GPU: torch .* or device 'cpu'"):
        quantize(tmp_path / "no-such-model", tmp_path / "out", device="cuda", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_commands_refuse_a_device_too(dense, tmp_path, capsys):
    quantize_command = ["quantize", str(dense), "-o", str(tmp_path / "out")]
    for command in (quantize_command, ["eval", str(dense)], ["generate", str(dense), "text"]):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--device", "tpu"])
        assert "device: got 'tpu', need" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("two_gpus")
def test_a_quantised_model_is_refused_on_a_gpu_without_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr("rosaq.ops._C", SimpleNamespace(build_info=lambda: {"cuda": False}))
    checkpoint = save_rosaq(tmp_path, default=LinearFormat(3, 32))
    with pytest.raises(ValueError, match="device: got cuda, but rosaq was built without CUDA"):
        load_subject(checkpoint, device="cuda:0")


@pytest.mark.usefixtures("two_gpus")
def test_float32_is_refused_for_a_quantised_model_on_a_gpu(tmp_path):
    checkpoint = save_rosaq(tmp_path, default=LinearFormat(3, 32))
    with pytest.raises(
        ValueError, match="dtype: got float32 for a quantised model on cuda:0, need float16 or bfloat16"
    ):
        load_subject(checkpoint, "float32", device="cuda:0")


def test_a_run_goes_on_only_on_the_kind_of_device_it_began_on(dense, tmp_path):
    def stop(event):
        if event.stage == "blocks":
            raise KeyboardInterrupt

    request = {"recipe": "gptq", **SMALL}
    with pytest.raises(KeyboardInterrupt):
        quantize(dense, tmp_path / "out", progress=stop, **request)
    path = tmp_path / ".out.partial" / "request.json"
    begun = json.loads(path.read_text())
    assert begun["device"] == "cpu"
    path.write_text(json.dumps(begun | {"device": "cuda"}))
    with pytest.raises(ValueError, match="resume: got another request .*{'device': 'cpu'}, need {'device': 'cuda'}"):
        quantize(dense, tmp_path / "out", resume=True, **request)


def test_bfloat16_products_need_instructions_of_the_gpu(dense, monkeypatch):
    model = BlockModel(dense)
    model.device = torch.device("cuda", 0)
    for capability, has in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert model.in_bf16().is_bf16 is has
