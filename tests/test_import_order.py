"""Who may import whom: run time never imports the offline half, and data flows one way (DESIGN.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rosaq
from rosaq.config import LinearFormat
from tests.models import save_rosaq

PACKAGE = Path(rosaq.__file__).parent
SHARED = {"config", "devices", "specs", "layout"}
RUN_TIME = {
    "reference",
    "ops",
    "fakes",
    "sharding",
    "soundness",
    "input_gradient",
    "linear",
    "siblings",
    "experts",
    "checkpoint",
    "integrations",
}
OFFLINE = {"models", "rotation", "calibrate", "quantizers", "tuning", "pipeline", "recipes"}
BESIDE = {
    "text",
    "verification",
    "conversion",
    "evaluation",
    "report",
    "doctor",
    "demo",
    "__main__",
    "cli",
}

# part: the parts it may import. "rosaq" is the package itself.
MAY_IMPORT = {
    "rosaq": {"ops"},
    "config": set(),
    "devices": set(),
    "specs": {"config"},
    "layout": {"config"},
    "reference": {"config", "layout"},
    "ops": {"config", "_C", "fakes"},
    "fakes": {"config", "_C"},
    "sharding": {"config"},
    "soundness": set(),
    "input_gradient": set(),
    "linear": {"config", "specs", "input_gradient", "layout", "ops", "sharding", "soundness"},
    "siblings": {"ops", "linear"},
    "experts": set(),
    "checkpoint": {"config", "layout"},
    "integrations": {"config", "specs", "linear", "siblings", "experts", "checkpoint", "sharding", "soundness"},
    "models": {"config"},
    "rotation": {"config", "models"},
    "calibrate": {"config", "devices", "specs", "layout", "experts", "models"},
    "quantizers": {"config", "specs", "layout", "rotation", "ops"},
    "tuning": {"config", "specs", "layout", "rotation", "calibrate"},
    "recipes": {"config", "specs"},
    "pipeline": {
        "rosaq",  # its version, for resuming
        "config",
        "devices",
        "specs",
        "layout",
        "models",
        "rotation",
        "calibrate",
        "quantizers",
        "tuning",
        "recipes",
        "checkpoint",
        "experts",
        "sharding",
        "text",
    },
    "text": set(),
    "verification": {
        "config",
        "ops",
        "layout",
        "reference",
        "checkpoint",
        "linear",
        "sharding",
        "soundness",
        "integrations",
    },
    "conversion": {"config", "ops", "linear", "experts", "checkpoint", "integrations"},
    "evaluation": {"config", "devices", "ops", "checkpoint", "integrations", "linear", "text"},
    "report": {"config", "checkpoint"},
    "doctor": {"_C", "ops", "report"},
    "demo": {"rosaq", "config", "specs", "evaluation", "report"},
    "__main__": {"cli"},
    "cli": {
        "rosaq",
        "config",
        "specs",
        "recipes",
        "checkpoint",
        "doctor",
        "demo",
        "evaluation",
        "report",
        "text",
    },
}
# (part, imported part): inside a function, where the halves meet on purpose.
LAZY_EXCEPTIONS = {("linear", "quantizers"), ("integrations", "quantizers")}


def part_of(path):
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "rosaq" if first == "__init__" else first


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(node, nested=False):
    """(imported part, inside a function or a branch) for every import of rosaq below `node`."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        inner = nested or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.If))
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide who is imported"
            names = [f"{child.module}.{alias.name}" for alias in child.names]
        else:
            yield from imports_of(child, inner)
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "rosaq":
                yield (rest[0] if rest else "rosaq"), inner


def all_imports():
    for path in sorted(PACKAGE.rglob("*.py")):
        for imported, nested in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            yield path, part_of(path), imported, nested


def test_every_part_is_in_the_table():
    parts = {part_of(path) for path in PACKAGE.rglob("*.py")}
    assert parts <= set(MAY_IMPORT)
    assert set(MAY_IMPORT) == {"rosaq"} | SHARED | RUN_TIME | OFFLINE | BESIDE


def test_the_table_itself_keeps_run_time_free_of_the_offline_half():
    for part in {"rosaq"} | SHARED | RUN_TIME:
        assert not MAY_IMPORT[part] & (OFFLINE | BESIDE), part


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_stay_within_the_table(part):
    for path, importer, imported, nested in all_imports():
        if importer == part and imported != part and imported not in MAY_IMPORT[part]:
            is_excepted = nested and (part, imported) in LAZY_EXCEPTIONS
            assert is_excepted, f"{path.relative_to(PACKAGE)} imports rosaq.{imported}"


def test_every_exception_of_the_table_is_used():
    used = {(importer, imported) for _, importer, imported, nested in all_imports() if nested}
    assert used >= LAZY_EXCEPTIONS


def test_loading_a_checkpoint_imports_nothing_offline(tmp_path):
    checkpoint = save_rosaq(tmp_path, default=LinearFormat(3, 32, num_salient=4))
    code = f"""
import sys, torch, rosaq
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})
model(torch.arange(4).view(1, 4))
print(*sorted({{name.split('.')[1] for name in sys.modules if name.startswith('rosaq.')}}))
"""
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {"linear", "ops", "integrations"} <= set(loaded)
    assert not set(loaded) & (OFFLINE | BESIDE)
