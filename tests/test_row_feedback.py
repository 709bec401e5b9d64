"""Rows that hear of each other's errors: the algebra, what it gains, from the gradient to the checkpoint."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rosaq.calibrate import Gram, SiteGradients
from rosaq.layout import dequantize
from rosaq.models.tables import LLAMA
from rosaq.pipeline import quantize
from rosaq.pipeline import run as run_module
from rosaq.pipeline.output_moments import OutputMoments
from rosaq.pipeline.request import calibration_windows
from rosaq.pipeline.run import Run
from rosaq.pipeline.source import DenseModel
from rosaq.pipeline.workspace import Workspace
from rosaq.quantizers import NotPositiveDefiniteError, RowFeedback, quantize_weight, quantize_with_basis
from rosaq.recipes import make_recipe
from rosaq.specs import CalibrationSpec, QuantSpec, Recipe, RotationSpec, RowSpec
from tests.models import SMALL, TEXT, save_dense, tiny_llama
from tests.tolerances import assert_tight

ROOT = Path(__file__).parents[1]
N, K = 48, 64
SPEC = QuantSpec(group_size=32, refine=2)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(k, seed, decay=0.1):
    """Second moments whose eigenvalues fall by a tenth from one to the next."""
    axes = torch.linalg.qr(gaussian(k, k, seed=seed).double())[0]
    return axes * torch.exp(-decay * torch.arange(k, dtype=torch.float64)) @ axes.T


def damped(h):
    return h + 0.2 * torch.diagonal(h).mean() * torch.eye(len(h), dtype=h.dtype)


def weight_of(tensors):
    w = dequantize(tensors["qweight"], tensors["scales"], tensors.get("zeros"), 3)
    if "salient_index" in tensors:
        w[:, tensors["salient_index"].long()] += tensors["salient_weight"].float()
    elif "salient_basis" in tensors:
        w += tensors["salient_weight"].float() @ tensors["salient_basis"].float().T
    return w


def loss(h, d, g):
    return float(((h @ d.double() @ g) * d.double()).sum())


# --- one weight ------------------------------------------------------------------------------------------------------


def test_every_row_is_in_one_part_and_those_with_much_gradient_come_first():
    h = moments(N, 1)
    parts = RowFeedback([h, None], [N, 5], 4).parts()
    assert sorted(torch.cat(parts).tolist()) == list(range(N + 5))
    own = torch.cat([part[part < N] for part in parts])
    assert torch.diagonal(h)[own].tolist() == sorted(torch.diagonal(h).tolist(), reverse=True)
    assert [len(part) for part in parts] == [13, 13, 13, 14]


def test_later_rows_make_up_for_errors_as_well_as_rows_can():
    """Against the minimum of the loss over all real values of the rows that are still to come."""
    h, error = moments(N, 1), gaussian(12, K).double()
    feedback = RowFeedback([h], [N], 4)
    rows = feedback.parts()[0]
    rest = torch.tensor(sorted({*range(N)} - {*rows.tolist()}))
    work = torch.zeros(N, K, dtype=torch.float64)
    feedback.carry(work, 0, error)
    assert_tight(work[rest], torch.linalg.solve(damped(h)[rest][:, rest], damped(h)[rest][:, rows] @ error))
    assert not work[rows].any()


def test_parts_in_turn_leave_the_optimum_of_each_given_those_before():
    """The second part too: its errors are carried on given that the first part's rows are fixed."""
    h, feedback = moments(N, 1), RowFeedback([moments(N, 1)], [N], 3)
    first, second, third = feedback.parts()
    work, errors = torch.zeros(N, K).double(), [gaussian(16, K, seed=seed).double() for seed in (2, 3)]
    feedback.carry(work, 0, errors[0])
    shift = work[second].clone()
    feedback.carry(work, 1, errors[1])
    wrong = torch.cat([errors[0], errors[1] - shift])  # what was wanted at first less what the rows became
    done = torch.cat([first, second])
    want = torch.linalg.solve(damped(h)[third][:, third], damped(h)[third][:, done] @ wrong)
    assert_tight(work[third], want)


def test_rows_without_common_gradient_are_rounded_as_if_alone():
    w, g = gaussian(N, K), moments(K, 0)
    plain = quantize_weight(w, g, SPEC)
    for given in ([torch.eye(N, dtype=torch.float64)], [None]):
        fed = quantize_weight(w, g, SPEC, feedback=RowFeedback(given, [N], 4))
        assert plain.keys() == fed.keys()
        assert all(torch.equal(plain[name], fed[name]) for name in plain)


@pytest.mark.parametrize("how", ["plain", "index", "basis"])
def test_the_models_loss_falls_and_that_of_the_outputs_rises(how):
    w, g, h = gaussian(N, K), moments(K, 0), moments(N, 1, decay=0.2)
    found = {}
    for feedback in (None, RowFeedback([h], [N], 8)):
        if how == "basis":
            tensors = quantize_with_basis(w, g, SPEC, 2, feedback)
        else:
            index = torch.tensor([3, 40]) if how == "index" else None
            tensors = quantize_weight(w, g, SPEC, index, feedback)
        found[feedback is not None] = weight_of(tensors) - w
    assert loss(h, found[True], g) < 0.6 * loss(h, found[False], g)
    assert loss(torch.eye(N).double(), found[True], g) > loss(torch.eye(N).double(), found[False], g)


def test_more_parts_gain_more():
    w, g, h = gaussian(N, K), moments(K, 0), moments(N, 1, decay=0.2)
    losses = [
        loss(h, weight_of(quantize_weight(w, g, SPEC, feedback=RowFeedback([h], [N], parts))) - w, g)
        for parts in (1, 2, 6, N)
    ]
    assert losses == sorted(losses, reverse=True)


def test_moments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"moments: got shape \(48, 48\), need \(24, 24\)"):
        RowFeedback([moments(N, 1)], [24], 4)
    with pytest.raises(NotPositiveDefiniteError), pytest.warns(RuntimeWarning, match="damping doubled"):
        RowFeedback([torch.diag(torch.tensor([1.0, -40.0] * 24).double()) + 20], [N], 4)
    with pytest.raises(ValueError, match="parts: got 0"):
        RowSpec(parts=0)
    with pytest.raises(ValueError, match="rows: got 2 parts with moments 'quantised' and method 'gptq'"):
        Recipe("own", QuantSpec(), rows=RowSpec(parts=2))


# --- a model ---------------------------------------------------------------------------------------------------------

# without tuning, and at all sites
ROWS = make_recipe("rosaq-gptq", salient=2, group_size=32, preset="fast")
ROWS = replace(ROWS, rows=RowSpec(parts=4, sequences=5), rotation=RotationSpec("pca-random", "random", "hadamard"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "model", tiny_llama())


def gradients_of(tokens, site=LLAMA.sites[0], k=K):
    """Made-up gradients at a site whose linears have 16, 24 and 32 rows, with a token that is an attention sink."""
    x = gaussian(tokens, k) * torch.linspace(0.3, 3, k)
    x[0] *= 40
    slopes = {name: gaussian(tokens, 16 + 8 * i, seed=i + 1) for i, name in enumerate(site.linears)}
    return SiteGradients(0, site, x, slopes)


def test_output_moments_are_those_of_the_gradient_weighed_by_leverage():
    found = gradients_of(300)
    measured = OutputMoments("block.", 0.01, torch.float32)
    for tokens in (slice(200), slice(200, None)):
        slopes = {name: slope[tokens] for name, slope in found.slopes.items()}
        measured.add(replace(found, x=found.x[tokens], slopes=slopes))
    x = found.x.double()
    gram = x.T @ x / len(x)
    bulk = gram.diagonal().sort().values[: K // 2].mean()
    inverse = torch.linalg.inv(gram + 0.01 * bulk * torch.eye(K))
    leverage = ((x @ inverse) * x).sum(1)
    got = measured.moments()
    assert list(got) == list(found.slopes)
    for name, slope in found.slopes.items():
        g = slope.double()
        want = (g * leverage[:, None]).T @ g / leverage.sum()
        assert (got[name] - want).norm() <= 1e-4 * want.norm(), name
    assert not measured.moments()  # nothing is kept


def test_moments_that_no_damping_inverts_are_refused_by_name(monkeypatch):
    measured = OutputMoments("model.layers.1.", 0.01, torch.float32)
    measured.add(gradients_of(300))
    monkeypatch.setattr(Gram, "mean", lambda _: torch.tensor([[1.0, 9.0], [9.0, 1.0]]).double())
    with (
        pytest.raises(
            NotPositiveDefiniteError, match=r"model.layers.1.self_attn.q_proj: gram \[2, 2\] is not positive"
        ),
        pytest.warns(RuntimeWarning, match="damping doubled"),
    ):
        measured.moments()


def codes(directory):
    return {name: t for name, t in load_file(directory / "model.safetensors").items() if name.endswith("qweight")}


def test_the_gradient_reaches_the_codes_of_every_linear(dense, tmp_path):
    quantize(dense, tmp_path / "rows", recipe=ROWS, **SMALL)
    quantize(dense, tmp_path / "plain", recipe=replace(ROWS, rows=RowSpec()), **SMALL)
    ours, plain = codes(tmp_path / "rows"), codes(tmp_path / "plain")
    assert ours.keys() == plain.keys()
    assert not any(torch.equal(ours[name], plain[name]) for name in ours)
    assert {path.name for path in tmp_path.iterdir()} == {"rows", "plain"}


def test_sites_may_be_chosen_and_the_fast_preset_does_without(dense, tmp_path):
    own = replace(ROWS, rows=replace(ROWS.rows, sites=("attn_in",)))
    for name, recipe, preset in (("in", own, "default"), ("plain", own, "fast")):
        quantize(dense, tmp_path / name, recipe=recipe, preset=preset, **SMALL)
    ours, plain = codes(tmp_path / "in"), codes(tmp_path / "plain")
    changed = {name for name in ours if not torch.equal(ours[name], plain[name])}
    assert changed == {name for name in ours if any(f"{part}_proj" in name for part in "qkv")}
    with pytest.raises(ValueError, match=r"rows.sites: got \['mlp'\], need some of \['attn_in', "):
        quantize(dense, tmp_path / "no", recipe=replace(own, rows=replace(own.rows, sites=("mlp",))), **SMALL)


def test_moments_follow_the_stream_into_the_basis_that_the_budget_leaves(dense, tmp_path):
    """Measured in the stream before its unkept axes are mixed, and turned: as if measured in it afterwards."""
    recipe = make_recipe("rosaq-gptq", group_size=32, preset="fast", target_bits=4.6)
    recipe = replace(recipe, rows=RowSpec(parts=4, sequences=5))
    source = DenseModel(dense)
    ids = calibration_windows(source, recipe, TEXT, SMALL["spec"])

    def run_in(name):
        work = Workspace(tmp_path / name, {}, torch.device("cpu"), force=False, resume=False)
        return Run(source, recipe, SMALL["spec"], ids, work, lambda *_, **__: None)

    before, after = run_in("before"), run_in("after")
    before.choose_rotations()
    before.measure_predictions()
    unmixed = before.output_moments(1)["self_attn.o_proj"]
    before.settle_rotations()
    after.rotations = before.rotations
    after.measure_predictions()
    turned, straight = before.output_moments(1), after.output_moments(1)
    assert turned.keys() == straight.keys() >= {"self_attn.o_proj", "mlp.up_proj"}
    for name, h in straight.items():
        # the damping of the leverage is a share of the smaller channels, and the basis decides which they are
        assert (turned[name] - h).norm() <= 0.02 * h.norm(), name
    assert (unmixed - straight["self_attn.o_proj"]).norm() > 0.1 * unmixed.norm()


def test_a_killed_run_reads_the_gradient_back(dense, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(event):
        if (event.stage, event.block) == ("blocks", 0):
            raise Killed

    request = {"recipe": ROWS, **SMALL}
    quantize(dense, tmp_path / "undisturbed", **request)
    with pytest.raises(Killed):
        quantize(dense, tmp_path / "out", progress=kill, **request)
    monkeypatch.setattr(run_module, "site_gradients", None)
    quantize(dense, tmp_path / "out", resume=True, **request)
    for path in (tmp_path / "undisturbed").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_two_ranks_carry_what_one_process_carries(dense, tmp_path):
    """Batches of 2, so that 5 sequences of gradient are 2 batches on one rank and a part of one on the other."""
    worker = "import sys; from tests.test_row_feedback import on_ranks; on_ranks(*sys.argv[1:])"
    script = tmp_path / "worker.py"
    script.write_text(worker)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(dense), str(tmp_path / "two")], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    on_ranks(dense, tmp_path / "one")
    ours, alone = codes(tmp_path / "two"), codes(tmp_path / "one")
    assert all(torch.equal(ours[name], alone[name]) for name in alone)


def on_ranks(dense, output):
    """Quantise on whatever processes there are."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    spec = CalibrationSpec(num_sequences=8, sequence_length=48, batch_size=2)
    quantize(dense, output, recipe=ROWS, group_size=32, calibration=TEXT, spec=spec)
    if "RANK" in os.environ:
        torch.distributed.destroy_process_group()
