"""Every file in examples/ is run as it stands, in a process of its own (the one for vLLM: tests/test_vllm.py)."""

import os
import subprocess
import sys
from pathlib import Path

import rosaq
from tests.models import save_dense, tiny_llama

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments, stdin=""):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here_or_with_vllm():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        *("call_the_op.py", "replace_one_linear.py", "quantise_and_chat.py", "serve_on_two_gpus.py")
    }


def test_call_the_op():
    assert float(run("call_the_op.py").rpartition(":")[2]) < 1e-3


def test_replace_one_linear():
    output = run("replace_one_linear.py")
    assert "bits=3" in output
    assert float(output.rpartition(":")[2]) < 0.25


def test_quantise_and_chat(tmp_path):
    # Built-in text: its windows of 512 tokens fit the tiny model's positions.
    dense = save_dense(tmp_path / "dense", tiny_llama(max_position_embeddings=1024))
    small = ["--target-bits", "4.85", "--num-sequences", "1", "--max-new-tokens", "3"]
    output = run("quantise_and_chat.py", dense, tmp_path / "out", *small, stdin="Hello\nAnd again\n")
    assert "bits per weight" in output
    assert rosaq.verify(tmp_path / "out").is_sound
    again = run("quantise_and_chat.py", dense, tmp_path / "out", *small, stdin="Hello\n")
    assert "bits per weight" not in again
