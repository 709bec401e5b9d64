"""ROSAQ's variants: shared axes that fold, axes of each site as a projection, axes of each site as a dense rotation."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rosaq.checkpoint import bits_by_tensor, read_config
from rosaq.config import LinearFormat
from rosaq.layout import dense_weight
from rosaq.linear import RosaqLinear
from rosaq.pipeline import quantize
from rosaq.quantizers import quantize_in_axes, quantize_with_basis
from rosaq.recipes import RECIPES, make_recipe
from rosaq.report.tables import describe_bits
from rosaq.rotation import inverse_transpose
from rosaq.specs import BudgetSpec, QuantSpec, Recipe, RotationSpec, RowSpec, SalientSpec, TuneSpec
from tests.families import save_family, tiny_family
from tests.models import SMALL, save_dense, tiny_llama
from tests.tolerances import FLOORS, assert_as_good_as, assert_tight

N, K, COUNT = 24, 96, 6
RTN = QuantSpec(3, 32, method="rtn", clip=False)
DENSE_FORMAT = LinearFormat(3, 32, num_salient=COUNT, rotation_blocks=1, rotation_size=K)
BASIS_FORMAT = LinearFormat(3, 32, num_salient=COUNT, salient="basis")

pytestmark = pytest.mark.filterwarnings("ignore:rosaq-layer. got dense rotations:UserWarning")


@pytest.fixture(scope="module")
def weight():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def gram():
    """Second moments whose eigenvalues fall by a tenth from one to the next: principal axes are well defined."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.linalg.qr(torch.randn(K, K, generator=generator, dtype=torch.float64))[0]
    return mix * torch.exp(-0.1 * torch.arange(K, dtype=torch.float64)) @ mix.T


# --- one linear ------------------------------------------------------------------------------------------------------


def test_the_rotation_is_the_principal_axes_as_stored(weight, gram):
    rotation = quantize_in_axes(weight, gram, RTN, COUNT)["rotation"]
    assert rotation.shape == (1, K, K)
    assert rotation.dtype == torch.float16
    turned = rotation[0].double().T @ gram @ rotation[0].double()
    values = torch.linalg.eigvalsh(gram).flip(0)
    floor = FLOORS[torch.float16] * values[0]
    assert (turned - torch.diag(values)).abs().max() <= floor


def test_a_dense_rotation_changes_nothing_before_rounding(weight, gram):
    """Rounded to float16 it is orthogonal to three digits only: the weight is turned by the inverse of what is kept."""
    rotation = quantize_in_axes(weight, gram, RTN, COUNT)["rotation"]
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w = weight.double()
    assert_tight((x @ rotation[0].double()) @ (w @ inverse_transpose(rotation[0])).T, x @ w.T)
    assert ((x @ rotation[0].double()) @ (w @ rotation[0].double()).T - x @ w.T).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("quantize_site", "fmt"), [(quantize_in_axes, DENSE_FORMAT), (quantize_with_basis, BASIS_FORMAT)]
)
def test_the_identity_gives_the_weight(quantize_site, fmt, weight, gram):
    linear = RosaqLinear.from_tensors(quantize_site(weight, gram, RTN, COUNT), fmt)
    eye = torch.eye(K)
    assert_as_good_as(linear(eye), eye @ linear.dequantize().T, linear.dequantize().double().T)
    assert (linear(eye).T - weight).norm() < 0.25 * weight.norm()


def test_both_forms_are_exact_on_the_same_principal_directions(weight, gram):
    dense = quantize_in_axes(weight, gram, RTN, COUNT)
    basis = quantize_with_basis(weight, gram, RTN, COUNT)
    assert dense["salient_index"].tolist() == list(range(COUNT))
    assert torch.equal(dense["rotation"][0, :, :COUNT], basis["salient_basis"])
    u = basis["salient_basis"].double()
    for tensors, fmt in ((dense, DENSE_FORMAT), (basis, BASIS_FORMAT)):
        error = (dense_weight(tensors, fmt).double() - weight.double()) @ u
        floor = FLOORS[torch.float16] * weight.norm(dim=1).max()
        # a projection is exact in the metric of the second moments, and the rest of them is orthogonal to it here
        assert error.abs().max() <= 2 * floor, fmt


def test_nothing_kept_in_16_bits_is_a_plain_rotation(weight, gram):
    tensors = quantize_in_axes(weight, gram, RTN, 0)
    assert set(tensors) == {"qweight", "scales", "zeros", "rotation"}
    linear = RosaqLinear.from_tensors(tensors, replace(DENSE_FORMAT, num_salient=0))
    assert (linear.dequantize() - weight).norm() < 0.25 * weight.norm()


# --- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_llama())


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    with pytest.warns(UserWarning, match="rosaq-layer: got dense rotations"):
        layer = quantize(dense, root / "rosaq-layer", recipe="rosaq-layer", salient=4, **SMALL)
    return {
        "rosaq-layer": (root / "rosaq-layer", layer),
        "rosaq-basis": (root / "b", quantize(dense, root / "b", recipe="rosaq-basis", salient=4, **SMALL)),
    }


def test_every_site_has_its_own_directions_and_nothing_is_folded(made, dense):
    kept = ("embed_tokens.weight", "layernorm.weight", "model.norm.weight")
    before = load_file(dense / "model.safetensors")
    for recipe, name in (("rosaq-layer", "rotation"), ("rosaq-basis", "salient_basis")):
        after = load_file(made[recipe][0] / "model.safetensors")
        assert all(torch.equal(after[key], before[key]) for key in before if key.endswith(kept)), recipe
        for block in ("model.layers.0.", "model.layers.1."):
            same = [after[f"{block}self_attn.{linear}_proj.{name}"] for linear in "qkv"]
            assert all(torch.equal(each, same[0]) for each in same)  # one launch for all three
            assert not torch.equal(same[0], after[f"{block}mlp.up_proj.{name}"])
            assert after[f"{block}mlp.down_proj.{name}"].shape == ((1, 128, 128) if name == "rotation" else (128, 4))
        axes = [after[f"model.layers.{block}.self_attn.q_proj.{name}"] for block in (0, 1)]
        assert not torch.equal(*axes)
    # the first site sees the same inputs in both recipes
    rotation = load_file(made["rosaq-layer"][0] / "model.safetensors")["model.layers.0.self_attn.q_proj.rotation"]
    basis = load_file(made["rosaq-basis"][0] / "model.safetensors")["model.layers.0.self_attn.q_proj.salient_basis"]
    assert torch.equal(rotation[0, :, :4], basis)


def test_a_dense_rotation_is_counted_and_told(made, dense):
    output, result = made["rosaq-layer"]
    sizes = {(64, 64): 4, (32, 64): 4, (128, 64): 4, (64, 128): 2}  # (n, k): linears of two blocks
    num_weights = sum(n * k * count for (n, k), count in sizes.items())
    rotations = sum(16 * k * k * count for (_, k), count in sizes.items()) / num_weights
    parts = bits_by_tensor(output)
    assert parts["rotation"] == pytest.approx(rotations)
    assert sum(parts.values()) == pytest.approx(result.bits_per_weight)
    assert result.bits_by_tensor == parts
    rows = {row["name"]: row["bits_per_weight"] for row in result.layers}
    assert rows["model.layers.0.self_attn.k_proj"] > 16 * 64 / 32  # more than twice the dense layer
    assert f"rotations {rotations:.3f} (MORE THAN THE CODES)" in describe_bits(parts)
    told = f"{rotations:.2f} of {result.bits_per_weight:.2f} bits per weight are theirs"
    with pytest.warns(UserWarning, match=told):
        quantize(dense, output.parent / "again", recipe="rosaq-layer", salient=4, **SMALL)
    assert "MORE" not in describe_bits(made["rosaq-basis"][1].bits_by_tensor)


def test_a_dense_rotation_cannot_be_cut_between_ranks(made):
    assert read_config(made["rosaq-layer"][0]).tp_sizes == (1,)
    assert len(read_config(made["rosaq-basis"][0]).tp_sizes) > 1


def test_more_directions_lose_less(dense, made, tmp_path):
    few = made["rosaq-basis"][1]
    many = quantize(dense, tmp_path / "many", recipe="rosaq-basis", salient=16, **SMALL)
    assert all(a["sqnr_db"] < b["sqnr_db"] for a, b in zip(few.layers, many.layers, strict=True))
    assert [row["num_salient"] for row in few.layers] == [4] * 14


@pytest.mark.filterwarnings("ignore:.*got fewer tokens than their:UserWarning")
@pytest.mark.parametrize("recipe", ["rosaq-basis", "rosaq-layer"])
@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe"])
def test_families_that_nothing_folds_into_and_mixtures(name, recipe, tmp_path):
    source = save_family(tmp_path / "dense", tiny_family(name))
    quantize(source, tmp_path / "out", recipe=recipe, bits=4, salient=4, **SMALL)
    assert RECIPES[recipe].rotation == RotationSpec(**json_rotation(tmp_path / "out"))
    ids = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = (
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)(ids).logits.flatten()
            for d in (tmp_path / "out", source)
        )
    assert torch.cosine_similarity(got, want, dim=0) > 0.9


def json_rotation(directory):
    return json.loads((directory / "rosaq_layers.json").read_text())["recipe"]["rotation"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused():
    dense_everywhere = RotationSpec("dense", "dense", "dense")
    for further in ({"tune": TuneSpec(steps=1)}, {"rows": RowSpec(parts=2)}):
        with pytest.raises(ValueError, match="rotation: got 'dense' with tuning, a budget or parts of rows, need a"):
            Recipe("mine", QuantSpec(), dense_everywhere, SalientSpec(4, basis=()), moments="dense", **further)
    with pytest.raises(ValueError, match=r"salient: got a basis and a dense rotation at sites that read \['hidden'\]"):
        Recipe("mine", RTN, dense_everywhere, SalientSpec(4))
    for rotation, sites in ((RotationSpec(), "'residual', 'values'"), (RotationSpec("pca", "fitted"), "'values'")):
        with pytest.raises(ValueError, match=rf"got principal directions at sites that read \[{sites}\], which"):
            Recipe("mine", RTN, rotation, SalientSpec(4))
    drawn, room = RotationSpec("random"), BudgetSpec(target_bits=3.5, most=1)
    with pytest.raises(ValueError, match=r"got principal directions at sites that read \['residual'\], which nothing"):
        Recipe("mine", RTN, drawn, SalientSpec(sites=("residual",)), moments="dense", budget=room)
    with pytest.raises(ValueError, match="target_bits: got .* whose moments are 'quantised', need 'dense'"):
        make_recipe("rosaq-layer", target_bits=3.5)


@pytest.mark.parametrize(
    ("spec", "values", "message"),
    [
        (RotationSpec, {"residual": "hadamrd"}, "residual: got 'hadamrd', need one of none, random, pca"),
        (RotationSpec, {"mlp_out": "random"}, "mlp_out: got 'random', need one of none, hadamard, dense"),
        (SalientSpec, {"by": "energi"}, "by: got 'energi', need one of eigenvalue, energy"),
        (SalientSpec, {"count": 4, "sites": ("attn_in",)}, r"sites: got \['attn_in'\], need some of .*residual"),
        (partial(Recipe, "mine", RTN), {"moments": "Dense"}, "moments: got 'Dense', need one of quantised, dense"),
    ],
)
def test_a_word_that_means_nothing_is_refused(spec, values, message):
    with pytest.raises(ValueError, match=message):
        spec(**values)


def test_directions_stay_principal_when_their_number_changes():
    for name in ("rosaq", "rosaq-basis", "rosaq-layer"):
        assert make_recipe(name, salient=3).salient == replace(RECIPES[name].salient, count=3)
    assert make_recipe("quarot", salient=3).salient.by == "energy"


def test_rounding_to_nearest_on_the_dense_stream_looks_at_tokens(tmp_path):
    """Whoever measures or tunes on the dense model's stream needs it, whatever rounds."""
    recipe = replace(RECIPES["rtn"], quant=RTN, moments="dense", tune=TuneSpec(steps=2))
    made = quantize(save_dense(tmp_path / "dense", tiny_llama()), tmp_path / "out", recipe=recipe, **SMALL)
    assert made.bits_per_weight < 5
