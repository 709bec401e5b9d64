"""What a run costs, counted: bytes held at once, and multiplications, as the model and the calibration text grow."""

from dataclasses import dataclass, replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from rosaq.pipeline import quantize
from rosaq.recipes import make_recipe
from rosaq.specs import CalibrationSpec, RotationSpec, RowSpec
from tests.models import TEXT, save_dense, tiny_llama
from tests.peak import PeakMemory

LENGTH = 64
RECIPE = make_recipe(bits=3, preset="fast")
FITTED = replace(RECIPE, quant=replace(RECIPE.quant, group_size=32, refine=1))  # more rounds take no more memory
RECIPE = replace(FITTED, rotation=RotationSpec("pca-random", "random", "hadamard"))  # without a sweep

# How many of each are held at once (DESIGN.md, "From a dense model to a checkpoint"). An eigendecomposition takes two
# second moments more for itself.
BLOCKS, MOMENTS, STREAMS = 6, 5, 3


@dataclass(frozen=True)
class Size:
    """Of a Llama whose key-value heads are half as many as its heads, and of its calibration text."""

    hidden: int
    mlp: int
    layers: int
    sequences: int = 8
    length: int = LENGTH
    kv_share: float = 0.5

    @property
    def block(self):
        """Bytes of a block's linears in float32."""
        return 4 * self.hidden * ((2 + 2 * self.kv_share) * self.hidden + 3 * self.mlp)

    @property
    def moments(self):
        """Bytes of the largest second moments, float64."""
        return 8 * max(self.hidden, self.mlp) ** 2

    @property
    def stream(self):
        """Bytes of the calibration text's hidden states, float32."""
        return 4 * self.sequences * self.length * self.hidden

    @property
    def model(self):
        """Bytes of all blocks in 16 bits."""
        return self.layers * self.block / 2

    @property
    def bound(self):
        return BLOCKS * self.block + MOMENTS * self.moments + STREAMS * self.stream


SMALL = [Size(64, 256, layers) for layers in (1, 2, 4)]
MORE_TEXT = [Size(64, 256, 1, sequences) for sequences in (16, 24)]
WIDE = [Size(128, 512, 1, sequences) for sequences in (8, 16)]


@pytest.fixture(scope="module")
def cost(tmp_path_factory):
    """{size: (bytes at the peak, floating point operations)} of a run."""
    root, found = tmp_path_factory.mktemp("cost"), {}
    for number, size in enumerate(SMALL + MORE_TEXT + WIDE):
        sizes = {"hidden_size": size.hidden, "intermediate_size": size.mlp, "head_dim": size.hidden // 4}
        source = save_dense(root / f"dense{number}", tiny_llama(num_hidden_layers=size.layers, **sizes))
        text, spec = [TEXT[0] * 20], CalibrationSpec(size.sequences, LENGTH, batch_size=8)
        with PeakMemory() as memory, FlopCounterMode(display=False) as operations:
            quantize(source, root / f"out{number}", recipe=RECIPE, preset="fast", calibration=text, spec=spec)
        found[size] = memory.peak, operations.get_total_flops()
    return found


def test_memory_holds_no_more_for_more_layers(cost):
    _, two, four = (cost[size][0] for size in SMALL)  # a single block has none before it
    assert four - two <= 0.1 * (SMALL[2].model - SMALL[1].model)  # the codes alone would be 0.2 of it


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """{size: bytes at the peak} of a run that tunes. Without the counter of operations, which keeps graphs alive."""
    root, found = tmp_path_factory.mktemp("tuned"), {}
    recipe = replace(RECIPE, tune=replace(RECIPE.tune, steps=4, model_steps=2))
    for size in SMALL[1:]:
        sizes = {"hidden_size": size.hidden, "intermediate_size": size.mlp, "head_dim": size.hidden // 4}
        source = save_dense(root / f"dense{size.layers}", tiny_llama(num_hidden_layers=size.layers, **sizes))
        spec = CalibrationSpec(size.sequences, LENGTH, batch_size=8)
        with PeakMemory() as memory:
            quantize(source, root / f"out{size.layers}", recipe=recipe, calibration=[TEXT[0] * 20], spec=spec)
        found[size] = memory.peak
    return found


def test_tuning_adds_the_codes_of_more_layers(tuned):
    two, four = tuned.values()
    assert four - two <= 0.6 * (SMALL[2].model - SMALL[1].model)  # a byte each is 0.5 of it


def test_tuning_holds_the_calibration_text_three_times(tmp_path):
    """What enters the block in the dense and in the quantised model, and what the dense one makes of it."""
    peaks, sizes = [], [Size(64, 256, 1, sequences) for sequences in (32, 64)]
    recipe = replace(RECIPE, tune=replace(RECIPE.tune, steps=4))
    source = save_dense(tmp_path / "dense", tiny_llama(num_hidden_layers=1, intermediate_size=256))
    for size in sizes:
        spec = CalibrationSpec(size.sequences, LENGTH, batch_size=8)
        with PeakMemory() as memory:
            quantize(source, tmp_path / f"{size.sequences}", recipe=recipe, calibration=[TEXT[0] * 40], spec=spec)
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] <= 3.2 * (sizes[1].stream - sizes[0].stream)


@pytest.mark.parametrize("size", SMALL[1:])
def test_tuning_stays_below_the_bound(size, tuned):
    assert tuned[size] <= size.bound + 0.5 * size.model


@pytest.mark.parametrize("size", SMALL[1:])
def test_sharing_out_bits_holds_the_text_once_for_every_block(size, tmp_path):
    """The gradient of the predictions comes back through them all; the sequences it is taken on are 8 at most."""
    recipe = make_recipe(target_bits=4.6, group_size=32, preset="fast")
    recipe = replace(recipe, quant=replace(recipe.quant, refine=1))
    source = save_dense(tmp_path / "dense", tiny_llama(num_hidden_layers=size.layers, intermediate_size=size.mlp))
    spec = CalibrationSpec(size.sequences, LENGTH, batch_size=8)
    with PeakMemory() as memory:
        quantize(source, tmp_path / "out", recipe=recipe, preset="fast", calibration=[TEXT[0] * 20], spec=spec)
    assert memory.peak <= size.bound + (size.layers + 2) * size.stream


@pytest.mark.parametrize("size", SMALL[1:])
def test_fitting_rotations_holds_one_block_beside_what_its_sweep_does(size, tmp_path):
    """Steps of fitting are less than what they find in memory: the sweep is what a run without a budget pays for it."""
    source = save_dense(tmp_path / "dense", tiny_llama(num_hidden_layers=size.layers, intermediate_size=size.mlp))
    spec = CalibrationSpec(size.sequences, LENGTH, batch_size=8)
    with PeakMemory() as memory:
        quantize(source, tmp_path / "out", recipe=FITTED, preset="fast", calibration=[TEXT[0] * 20], spec=spec)
    assert memory.peak <= size.bound + (size.layers + 2) * size.stream


@pytest.mark.parametrize("size", SMALL[1:])
def test_feedback_between_rows_holds_squares_of_the_outputs_of_one_block(size, tmp_path):
    """Those of gate and up are as large as the largest second moments; each is factorised while the others are held."""
    recipe = replace(RECIPE, rows=RowSpec(parts=4, sequences=8))
    source = save_dense(tmp_path / "dense", tiny_llama(num_hidden_layers=size.layers, intermediate_size=size.mlp))
    spec = CalibrationSpec(size.sequences, LENGTH, batch_size=8)
    with PeakMemory() as memory:
        quantize(source, tmp_path / "out", recipe=recipe, calibration=[TEXT[0] * 20], spec=spec)
    assert memory.peak <= size.bound + 4 * size.moments
    assert memory.peak > size.bound  # or the text of DESIGN.md says too much


def test_memory_holds_the_calibration_text_twice(cost):
    """What enters the block and what leaves it: the rest is there whatever the length of the text."""
    less, more = MORE_TEXT
    assert cost[more][0] - cost[less][0] <= 2.2 * (more.stream - less.stream)


@pytest.mark.parametrize("size", [SMALL[0], SMALL[2], WIDE[0]])
def test_memory_stays_below_the_bound(size, cost):
    assert cost[size][0] <= size.bound
    assert cost[size][0] > 0.7 * size.bound  # or the bound says nothing


def test_a_model_of_seven_billion_fits_where_it_fits_in_16_bits():
    size = Size(4096, 11008, 32, 128, 512, kv_share=1)
    work_space = 2 * size.moments
    assert size.bound + work_space < size.model + size.block + size.stream + size.moments


def test_cost_grows_linearly_with_layers(cost):
    one, two, four = (cost[size][1] for size in SMALL)
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


def test_cost_grows_linearly_with_tokens(cost):
    first, second, third = (cost[size][1] for size in (SMALL[0], *MORE_TEXT))
    assert third - second == pytest.approx(second - first, rel=0.01)


def test_cost_of_a_token_grows_no_faster_than_the_parameters(cost):
    small = cost[MORE_TEXT[0]][1] - cost[SMALL[0]][1]
    wide = cost[WIDE[1]][1] - cost[WIDE[0]][1]
    assert 0.75 < (wide / small) / (WIDE[0].block / SMALL[0].block) <= 1.01
