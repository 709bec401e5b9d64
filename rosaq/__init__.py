"""rosaq: INT3/INT4 language models with 16-bit salient directions.

`import rosaq` loads the operators (`torch.ops.rosaq.*`) and teaches transformers to read rosaq checkpoints; calibration
and quantisation are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from _rosaq_autoload import install
from rosaq import ops as ops
from rosaq.ops import set_cpu_precision as set_cpu_precision

if TYPE_CHECKING:
    from rosaq.checkpoint import read_config as read_config
    from rosaq.config import LinearFormat as LinearFormat
    from rosaq.conversion import convert as convert
    from rosaq.evaluation import evaluate as evaluate
    from rosaq.integrations.transformers import RosaqConfig as RosaqConfig
    from rosaq.integrations.transformers_decoding import compiled_step as compiled_step
    from rosaq.linear import RosaqLinear as RosaqLinear
    from rosaq.pipeline.quantize import quantize as quantize
    from rosaq.specs import CalibrationSpec as CalibrationSpec
    from rosaq.specs import QuantSpec as QuantSpec
    from rosaq.verification import verify as verify

__version__ = "0.1.0"

_LAZY = {
    "CalibrationSpec": "rosaq.specs",
    "LinearFormat": "rosaq.config",
    "QuantSpec": "rosaq.specs",
    "RosaqConfig": "rosaq.integrations.transformers",
    "RosaqLinear": "rosaq.linear",
    "compiled_step": "rosaq.integrations.transformers_decoding",
    "convert": "rosaq.conversion",
    "evaluate": "rosaq.evaluation",
    "quantize": "rosaq.pipeline",
    "read_config": "rosaq.checkpoint",
    "verify": "rosaq.verification",
}
__all__ = ["__version__", "ops", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rosaq' has no attribute {name!r}, need one of {sorted(_LAZY)}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


install()
