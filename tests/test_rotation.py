"""Rotations: orthogonal, and folded into a block they change nothing but the basis."""

import pytest
import torch

from rosaq.models import Sizes, family_of
from rosaq.rotation import (
    BlockRotations,
    fold_norms,
    inverse_transpose,
    leading_axes,
    pca_random_tail,
    principal_axes,
    random_orthogonal,
    rotate_block,
    rotate_blocks,
    rotate_rows,
    shared_hadamard_block,
)
from tests.models import tiny_llama
from tests.tolerances import assert_same_function, assert_tight


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def spiky_gram(k, seed=0):
    x = torch.randn(4 * k, k, generator=generator(seed), dtype=torch.float64)
    x = x * torch.linspace(3, 0.1, k, dtype=torch.float64) ** 2
    return x.T @ x


@pytest.mark.parametrize("n", [16, 36, 50, 64])  # 50 has no Hadamard matrix: Haar
def test_random_orthogonal_is_orthogonal_and_seeded(n):
    r = random_orthogonal(n, generator(1))
    assert_tight(r @ r.T, eye(n))
    assert torch.equal(r, random_orthogonal(n, generator(1)))
    assert not torch.equal(r, random_orthogonal(n, generator(2)))


def test_principal_axes_diagonalise_in_descending_order():
    gram = spiky_gram(24)
    values, axes = principal_axes(gram)
    assert_tight(axes.T @ axes, eye(24))
    assert_tight(axes.T @ gram @ axes / values[0], torch.diag(values) / values[0])
    assert bool((values[:-1] >= values[1:]).all())


@pytest.mark.parametrize("k", [40, 300])  # from all axes, and from a Krylov space
def test_leading_axes_are_the_first_principal_ones(k):
    values = torch.cat([torch.tensor([90.0, 50.0, 20.0]), torch.linspace(2, 1, k - 3)]).double()
    turn = torch.linalg.qr(torch.randn(k, k, generator=generator(), dtype=torch.float64))[0]
    gram = turn * values @ turn.T
    assert_same_function(leading_axes(gram, 3), principal_axes(gram)[1][:, :3])


def test_leading_axes_of_a_flat_spectrum_are_orthonormal_and_hold_their_energy():
    """No axis stands out; then of fewer directions than the Krylov space has."""
    x = torch.randn(900, 400, generator=generator(), dtype=torch.float64)
    for gram in (x.T @ x / 900, x[:20].T @ x[:20]):
        axes = leading_axes(gram, 3)
        assert_tight(axes.T @ axes, eye(3))
        best = torch.linalg.eigvalsh(gram)[-3:].sum()
        assert 0.98 * best < (axes.T @ gram @ axes).trace() <= best * (1 + 1e-9)


def test_pca_random_tail_keeps_principal_axes_and_mixes_the_rest():
    gram = spiky_gram(32)
    values, axes = principal_axes(gram)
    r = pca_random_tail(axes, 4, generator())
    assert_tight(r.T @ r, eye(32))
    assert torch.equal(r[:, :4], axes[:, :4])
    turned = r.T @ gram @ r
    assert_tight(turned[:4, :4] / values[0], torch.diag(values[:4]) / values[0])
    off_diagonal = turned[4:, 4:] - torch.diag(torch.diagonal(turned[4:, 4:]))
    assert off_diagonal.abs().max() > 0.01 * values[4]  # GPTQ has correlations to use


@pytest.mark.parametrize(
    ("k", "n", "size"), [(1536, 576, 32), (14336, 4096, 128), (576, 4096, 64), (96, 4096, 32), (128, 64, 16)]
)
def test_shared_hadamard_block_divides_inverts_and_is_cheap(k, n, size):
    block = shared_hadamard_block(k, n)
    assert size == 16 or 16 * block.numel() <= 0.05 * n * k
    assert block.shape == (1, size, size)
    assert block.dtype == torch.float16
    assert_tight(block[0].double() @ inverse_transpose(block)[0].T, eye(size))


def test_shared_hadamard_block_refuses_odd_widths():
    with pytest.raises(ValueError, match="got in_features 24, need a multiple of 16"):
        shared_hadamard_block(24, 64)


@pytest.mark.parametrize("blocks", [1, 3])
def test_rotate_blocks_is_a_block_diagonal_product(blocks):
    rotation = torch.randn(blocks, 16, 16, generator=generator(), dtype=torch.float64)
    x = torch.randn(2, 5, 48, generator=generator(1), dtype=torch.float64)
    dense = torch.block_diag(*(rotation if blocks == 3 else rotation.expand(3, 16, 16)))
    assert_tight(rotate_blocks(x, rotation), x @ dense)


def _block(bias):
    model = tiny_llama(attention_bias=bias, mlp_bias=bias)
    layer = model.model.layers[0]
    with torch.no_grad():  # random gains and biases: ones and zeros would hide mistakes
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator(3))
    return model, layer, {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def _run(layer, model, weights, hidden):
    positions = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    with torch.no_grad():
        return torch.func.functional_call(layer, weights, (hidden,), {"position_embeddings": positions})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("what", ["fold", "residual", "values", "mlp_out", "gains", "all"])
def test_a_folded_and_rotated_block_is_the_same_function(bias, what):
    model, layer, weights = _block(bias)
    family, sizes = family_of("llama"), Sizes.of(model.config)
    residual = random_orthogonal(64, generator(5)) if what in ("residual", "gains", "all") else None
    values = torch.randn(2, 16, 16, generator=generator(6), dtype=torch.float64) if what in ("values", "all") else None
    norms = ("input_layernorm", "post_attention_layernorm") if what in ("gains", "all") else ()
    gains = {norm: torch.rand(64, generator=generator(7)).double() + 0.5 for norm in norms}
    mlp_out = shared_hadamard_block(128, 64) if what in ("mlp_out", "all") else None
    online = {} if mlp_out is None else {"mlp_out": mlp_out}
    rotated = rotate_block(fold_norms(weights, family), BlockRotations(residual, values, online, gains), family, sizes)
    if mlp_out is not None:  # the block's code has no online rotation: undo it on the weight
        down = "mlp.down_proj.weight"
        rotated[down] = rotate_blocks(rotated[down].double(), mlp_out.double().transpose(1, 2)).float()

    hidden = torch.randn(2, 9, 64, generator=generator(8))
    want = _run(layer, model, weights, hidden)
    turn = eye(64) if residual is None else residual
    got = _run(layer, model, rotated, (hidden.double() @ turn).float()).double() @ turn.T
    assert_same_function(got.float(), want)
    assert all(torch.equal(rotated[f"{norm}.weight"], gain.float()) for norm, gain in gains.items())
    if what != "fold":
        assert any(not torch.equal(rotated[name], fold_norms(weights, family)[name]) for name in weights)


def test_rotate_block_leaves_its_input_alone():
    model, _, weights = _block(False)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    family = family_of("llama")
    rotations = BlockRotations(random_orthogonal(64, generator()))
    rotate_block(fold_norms(weights, family), rotations, family, Sizes.of(model.config))
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_rotate_rows_gives_the_same_logits():
    rows = torch.randn(40, 64, generator=generator(), dtype=torch.float64)
    gain = torch.rand(64, generator=generator(1), dtype=torch.float64) + 0.5
    residual = random_orthogonal(64, generator(2))
    hidden = torch.randn(3, 64, generator=generator(3), dtype=torch.float64)
    logits = (hidden @ residual).float() @ rotate_rows(rows, residual, gain).T
    assert_same_function(logits, ((hidden * gain) @ rows.T).float())
