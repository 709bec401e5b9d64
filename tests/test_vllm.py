"""The real vLLM engine (its CPU build, `make test-vllm`): it answers what transformers does, on one rank and on two."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rosaq.config import LinearFormat
from rosaq.pipeline import quantize
from tests.models import SMALL, save_dense, save_rosaq, tiny_llama, vandalise
from tests.tolerances import LOGPROB

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]

WORKER = Path(__file__).parent / "vllm_worker.py"
ROTATED = LinearFormat(4, 32, num_salient=3, salient="basis", rotation_blocks=1, rotation_size=32)
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "attention_bias": True,
}  # fmt: skip
CPU_ENGINE = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(name="checkpoint", scope="module")
def _checkpoint(tmp_path_factory):
    """Mixed widths: in layer 1, v_proj has 4 bits beside 3-bit q and k."""
    directory = save_rosaq(
        tmp_path_factory.mktemp("models") / "model",
        tiny_llama(**SIZES),
        default=LinearFormat(3, 32, num_salient=4),
        modules={"mlp.down_proj": ROTATED, "layers.1.self_attn.v_proj": LinearFormat(4, 32, num_salient=4)},
    )
    share_directions(directory)
    return directory


def share_directions(directory):
    """Give q, k and v, and gate and up, one salient set, as the pipeline does."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith("salient_index")]:
            for other, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
                if f".{other}." in name:
                    tensors[name] = tensors[name.replace(other, first)].clone()

    vandalise(directory, change)


def engine_env(num_ranks):
    env = {**os.environ, **CPU_ENGINE, "PYTHONPATH": str(WORKER.parent.parent)}
    env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the worker sends a function to count launches with
    if num_ranks == 1:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process starts in half the time
    else:
        # One core per rank, which must exist; without this the engine asks the machine's NUMA layout.
        cores = sorted(os.sched_getaffinity(0))
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(num_ranks))
    return env


def run_engine(checkpoint, out, num_ranks, mode="eager"):
    command = [sys.executable, str(WORKER), str(checkpoint), str(out), str(num_ranks), mode]
    return subprocess.run(command, env=engine_env(num_ranks), capture_output=True, text=True, timeout=600, check=False)


@torch.no_grad()
def assert_answers_are_those_of_transformers(checkpoint, result):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, answer in zip(result["prompts"], result["answers"], strict=True):
        tokens = answer["tokens"]
        logprobs = model(torch.tensor([prompt + tokens])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        assert logprobs.argmax(-1).tolist() == tokens
        want = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (want - torch.tensor(answer["logprobs"])).abs().max() <= LOGPROB


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_engine_answers_what_transformers_does(checkpoint, tmp_path, num_ranks, mode):
    done = run_engine(checkpoint, tmp_path / "answer.json", num_ranks, mode)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "answer.json").read_text())
    assert_answers_are_those_of_transformers(checkpoint, result)
    assert len(result["launches"]) == num_ranks
    for launches in result["launches"]:
        assert len(launches) == 8
        apart = {name: number for name, number in launches.items() if number != 1}
        assert apart == {"model.layers.1.self_attn.qkv_proj.rosaq": 2}


def test_missing_tensor_stops_the_engine(checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(checkpoint), str(damaged)], check=True)
    vandalise(damaged, lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.scales"))
    done = run_engine(damaged, tmp_path / "answer.json", 1)
    assert done.returncode != 0
    assert "model.layers.0.self_attn.k_proj.scales: got no such tensor" in done.stderr + done.stdout


def test_a_quantised_head_stops_the_engine(tmp_path):
    source = save_dense(tmp_path / "dense", tiny_llama(**SIZES))
    quantize(source, tmp_path / "model", recipe="rtn", head_bits=4, **SMALL)
    done = run_engine(tmp_path / "model", tmp_path / "answer.json", 1)
    assert done.returncode != 0
    assert "lm_head: got a quantised output head, need one in 16 bits for vLLM" in done.stderr + done.stdout


def test_number_of_ranks_that_does_not_divide_stops_the_engine(tmp_path):
    checkpoint = save_rosaq(tmp_path / "model", tiny_llama(**SIZES), default=LinearFormat(3, 128))
    done = run_engine(checkpoint, tmp_path / "answer.json", 2)
    assert done.returncode != 0
    assert "o_proj: tensor parallel size: got 2, need one of [1]" in done.stderr + done.stdout


@pytest.fixture(name="vllm_command")
def _vllm_command(tmp_path, monkeypatch):
    """`vllm serve DIR` on the PATH: that of the CPU build looks for metadata of a package named vllm, and fails."""
    script = tmp_path / "bin" / "vllm"
    script.parent.mkdir()
    server = f"{sys.executable} -m vllm.entrypoints.openai.api_server"
    script.write_text(f'#!/bin/sh\nmodel=$2\nshift 2\nexec {server} --model "$model" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    return str(script)


ARGUMENTS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]


def test_server_answers_an_openai_client(checkpoint, free_port, tmp_path, vllm_command):
    openai = pytest.importorskip("openai")
    url, log = f"http://127.0.0.1:{free_port}", tmp_path / "server.log"
    command = [vllm_command, "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(free_port), *ARGUMENTS]
    with log.open("w") as output:
        server = subprocess.Popen(command, env=engine_env(1), stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(server, f"{url}/health", log)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        request = {"model": str(checkpoint), "prompt": "The fox", "max_tokens": 6, "temperature": 0}
        whole = client.completions.create(**request).choices[0].text
        streamed = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
        assert len(streamed) > 1
        assert "".join(streamed) == whole
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.usefixtures("vllm_command")
def test_example_serves_on_two_ranks(checkpoint):
    example = WORKER.parent.parent / "examples" / "serve_on_two_gpus.py"
    command = [sys.executable, str(example), str(checkpoint), "The fox", *ARGUMENTS]
    done = subprocess.run(command, env=engine_env(2), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "200 OK" in done.stdout + done.stderr


def wait_until_healthy(server, url, log, seconds=300):
    for _ in range(seconds):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])
