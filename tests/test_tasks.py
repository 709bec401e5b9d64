"""Downstream tasks through lm-eval: a task of our own, offline, against likelihoods computed here; refusals."""

import importlib.util
import json

import pytest
import torch

from rosaq.evaluation import run_tasks
from tests.models import byte_level_tokenizer, save_dense, tiny_llama

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'rosaq[tasks]'"
)
QUESTIONS = [
    {"question": "The sky is", "choices": ["blue", "a very long stick", "x"], "answer": 0},
    {"question": "Two and two are", "choices": ["four", "five", "many of them"], "answer": 1},
    {"question": "Grass", "choices": ["z", "yes and no", "is green"], "answer": 2},
    {"question": "One more", "choices": ["word", "of these", "for the road"], "answer": 0},
]
TASK = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata: {{version: 7}}
"""


@pytest.fixture
def task_path(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "colours.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "colours.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    return folder


def expected_accuracy(model, per_byte):
    """The share of questions whose right choice the model finds likeliest, by one forward pass per choice."""
    tokenizer, right = byte_level_tokenizer(), 0
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            prompt, answer = (tokenizer(part)["input_ids"] for part in (question["question"], f" {choice}"))
            with torch.inference_mode():
                log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            rows = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            score = sum(float(log_p[row, token]) for row, token in zip(rows, answer, strict=True))
            scores.append(score / len(choice) if per_byte else score)
        right += scores.index(max(scores)) == question["answer"]
    return right / len(QUESTIONS)


@needs_lm_eval
def test_accuracy_is_that_of_the_likelihoods(tmp_path, task_path):
    directory = save_dense(tmp_path / "dense")
    (result,) = run_tasks(directory, ["colours"], include_path=task_path)
    model = tiny_llama().half().float()
    assert (result.task, result.samples, result.limit, result.version) == ("colours", 4, None, "7")
    assert result.metrics["acc"] == expected_accuracy(model, per_byte=False)
    assert result.metrics["acc_norm"] == expected_accuracy(model, per_byte=True)
    assert result.to_dict()["model"] == str(directory)


@needs_lm_eval
def test_likelihoods_are_summed_in_float32(task_path):
    """In bfloat16 a sum of some hundred nats is rounded to whole ones, and choices tie."""
    model, seen = tiny_llama().bfloat16(), []
    softmax = torch.nn.functional.log_softmax

    def watched(x, **how):
        seen.append(how["dtype"])
        return softmax(x, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "log_softmax", watched)
        run_tasks(model, ["colours"], include_path=task_path, tokenizer=byte_level_tokenizer())
    assert set(seen) == {torch.float32}


@needs_lm_eval
def test_limit_takes_the_first_questions(task_path):
    (result,) = run_tasks(tiny_llama(), ["colours"], include_path=task_path, limit=2, tokenizer=byte_level_tokenizer())
    assert (result.samples, result.limit) == (2, 2)


@needs_lm_eval
def test_unknown_tasks_are_named(task_path):
    with pytest.raises(ValueError, match=r"tasks: got \['no_such_task'\], need names that lm-eval \d"):
        run_tasks(tiny_llama(), ["colours", "no_such_task"], include_path=task_path)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"tasks: got no lm_eval package, need: pip install 'rosaq\[tasks\]'"):
        run_tasks(tiny_llama(), ["piqa"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, r"tasks: got \[\], need a list of names"),
        ({"tasks": "piqa"}, "tasks: got 'piqa', need a list of names"),
        ({"limit": 0}, "limit: got 0, need at least 1"),
        ({"batch_size": 0}, "batch_size: got 0, need at least 1"),
        ({"include_path": "no/such/folder"}, "include_path: got 'no/such/folder', need a directory"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_tasks(tiny_llama(), **({"tasks": ["piqa"]} | changes))
