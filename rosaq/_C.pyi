"""The compiled extension: facts about the build, the machine and the packed layout. Ops are in torch.ops.rosaq."""

from typing import Any

PANEL_ROWS: int
HEADER_BYTES: int

def build_info() -> dict[str, Any]:
    """compiler, torch_headers, torch_target (strings), cuda (bool), cuda_archs (string), layout_version (int)."""

def available_isas() -> list[str]:
    """Instruction sets this build and machine can run, slowest first: portable, avx2, avx512, avx512vnni."""

def active_isa() -> str:
    """The instruction set in use: the last of `available_isas()`, or the one that ROSAQ_CPU_ISA names."""

def set_isa(name: str) -> None:
    """Switch the whole process to `name`, for tests and benchmarks. ValueError if it is not available."""

def cpu_precision() -> str:
    """How activations enter the CPU's products: exact, or int8 (see `rosaq.set_cpu_precision`)."""

def set_cpu_precision(name: str) -> None:
    """exact or int8, for the whole process. ValueError for any other name."""

def packed_bytes(
    n: int, k: int, bits: int, group_size: int, symmetric: bool, cuda: bool = False, bf16_scales: bool = False
) -> int:
    """Bytes of the blob that `rosaq::prepack` makes of a [n, k] weight (group_size -1: k). ValueError for bad sizes.

    On CUDA the size also tells float16 from bfloat16 scales.
    """

def code_bits(bits: int, j: int) -> list[tuple[int, int]]:
    """Where each bit of the code at position j (0 to 31) of a block is, lowest first: (word, bit of that word)."""

def cuda_code_bits(bits: int, row: int, k: int) -> list[tuple[int, int, int]]:
    """The same for the code at (row, k) of a CUDA record of 32 rows x 128 k: (lane, word of the lane, bit of it)."""

def cuda_schedule(
    m: int, n: int, k: int, r: int, has_basis: bool, has_rotation: bool, rows: int, resident: int
) -> dict[str, int]:
    """How `fused_gemm` cuts a problem into row tiles of `rows` and blocks, on a device that holds `resident` blocks:
    tokens, row_tiles, k_tiles, grid, tiles_per_block, extra, projection_parts, scratch_bytes."""
