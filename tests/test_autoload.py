"""transformers knows rosaq in every process: no import needed, nothing paid, nothing broken."""

import os
import subprocess
import sys

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from rosaq.config import LinearFormat
from rosaq.integrations.transformers import RosaqHfQuantizer, register
from tests.models import save_rosaq


def run(code, **env):
    """Stdout and stderr of `code` in a fresh process that has rosaq installed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


LOAD = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({checkpoint!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def test_a_process_that_never_imports_rosaq_loads_a_checkpoint(tmp_path):
    checkpoint = str(save_rosaq(tmp_path, default=LinearFormat(3, 32)))
    assert "RosaqLinear" in run(LOAD.format(checkpoint=checkpoint))


def test_autoload_can_be_turned_off(tmp_path):
    checkpoint = str(save_rosaq(tmp_path, default=LinearFormat(3, 32)))
    load = LOAD.format(checkpoint=checkpoint)
    assert "RosaqLinear" not in run(load, ROSAQ_AUTOLOAD="0")
    assert "RosaqLinear" in run(f"import rosaq\n{load}", ROSAQ_AUTOLOAD="0")


def test_importing_torch_and_transformers_loads_nothing_of_rosaq():
    code = "import torch, sys, transformers.quantizers.auto; print(*sys.modules)"
    assert [name for name in run(code).split() if name.startswith(("rosaq", "_rosaq"))] == ["_rosaq_autoload"]


def test_a_broken_rosaq_breaks_nothing_but_its_own_checkpoints(tmp_path):
    checkpoint = str(save_rosaq(tmp_path, default=LinearFormat(3, 32)))
    code = f"""
import sys, torch
sys.modules["rosaq._C"] = None  # as after a failed build
from transformers import AutoModelForCausalLM, AutoConfig
AutoConfig.from_pretrained({checkpoint!r})
try:
    AutoModelForCausalLM.from_pretrained({checkpoint!r})
except ImportError as error:
    print(error)
"""
    assert "rosaq._C (the compiled kernels) cannot be loaded: " in run(code)


def test_registering_again_is_harmless():
    register()
    register()
    assert AUTO_QUANTIZER_MAPPING["rosaq"] is RosaqHfQuantizer


ORDERS = {
    "torch only": "import torch; import transformers",
    "rosaq first": "import rosaq; import transformers",
    "transformers first": "import transformers; transformers.AutoModelForCausalLM; import rosaq",
    "rosaq twice": "import rosaq, importlib; importlib.reload(rosaq); import transformers",
    "looked for before": "import torch, importlib.util as u; u.find_spec('transformers.quantizers.auto')",
}


@pytest.mark.parametrize("order", ORDERS)
def test_any_import_order_registers_once(order):
    code = f"""{ORDERS[order]}
import sys
assert 'rosaq.pipeline' not in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as mapping, AUTO_QUANTIZATION_CONFIG_MAPPING as configs
import transformers.quantizers.auto as auto
assert 'rosaq' not in type(auto.__loader__).__module__, auto.__loader__
assert not any('rosaq' in type(finder).__module__ for finder in sys.meta_path)
from rosaq.config import CheckpointConfig, LinearFormat
configs['rosaq'].from_dict(CheckpointConfig(LinearFormat()).to_dict())
assert mapping['rosaq'].__name__ == 'RosaqHfQuantizer', mapping
assert configs['rosaq'].__name__ == 'RosaqConfig', configs
"""
    run(code)


def test_import_rosaq_is_light():
    loaded = run("import rosaq, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))").split()
    assert not {"transformers", "tokenizers", "typer", "rich", "safetensors"} & set(loaded)
