"""The README's Python is run as it stands; only its paths are replaced."""

import json
import re
from pathlib import Path

import pytest
import torch

import rosaq
from tests.models import save_dense, tiny_llama

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_has_its_four_examples():
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("number", range(4))
def test_readme_example_runs(number, tmp_path):
    code = BLOCKS[number]
    if "path/to/model" in code:
        save_dense(tmp_path / "model", tiny_llama())
        (tmp_path / "text.jsonl").write_text(json.dumps({"text": " ".join(map(str, range(400)))}) + "\n")
        code = code.replace("path/to/", f"{tmp_path}/")
    names: dict[str, object] = {}
    exec(compile(code, f"README.md example {number}", "exec"), names)
    if "y" in names:
        assert names["y"].shape[-1] == 512
        assert torch.isfinite(names["y"]).all()
    else:
        assert (tmp_path / "out" / "config.json").is_file()
        assert rosaq.verify(tmp_path / "out").is_sound
