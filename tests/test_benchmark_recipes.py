"""The ablation's recipes (benchmarks/accuracy/ablation.py): each is one that can be asked for, and another one."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[1] / "benchmarks" / "accuracy" / "ablation.py"
spec = importlib.util.spec_from_file_location("accuracy_ablation", FILE)
ablation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablation)


def test_every_variant_is_a_recipe_of_its_own():
    recipes = ablation.variants()
    assert recipes["as shipped"] == ablation.SHIPPED
    assert len(set(recipes.values())) == len(recipes)
