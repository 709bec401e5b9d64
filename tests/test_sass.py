"""What the compiler made of the CUDA kernels, read off the built extension. Seeing that needs no GPU.

Every kernel of every architecture: nothing in local memory (no spills), no memory descriptor in an odd uniform
register. The fused kernels also: one turn of the main loop has tensor-core instructions, copies with 128-bit
asynchronous copies only, does not divide, and stays within a budget of instructions for each MMA. Planted kernels, and
planted lines of a disassembly, show that each of these can fail.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rosaq import _C
from tests.sass import disassembly
from tests.sass.facts import Facts, count, facts_of, of_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc" / "build_support"))

import cuda  # noqa: E402

pytestmark = pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))

FUSED = re.compile(r"fused_gemm_kernel<.*Tile<(?P<dtype>\w+), (?P<bits>\d), (?P<symmetric>true|false), (?P<tiles>\d)>>")
# (symmetric only, tiles of 8 tokens): instructions for each MMA, with all of the loop's work: fetching, decoding,
# scaling. The most that nvcc 13.0 needs for any architecture and dtype, and 3 % more; a change that needs fewer should
# lower its line.
BUDGET = {(True, 1): 26.4, (True, 2): 14.5, (False, 1): 32.8, (False, 2): 18.2, (False, 4): 10.3, (False, 8): 10.5}
# The kernel for a few tokens, whose loop reads x from global memory.
FEW = re.compile(r"few_tokens_kernel<.*Tile<\w+, \d, (?P<symmetric>true|false), 1>, (?:true|false)>")
FEW_BUDGET = {True: 23.1, False: 31.8}
# The kernels of warpgroups, which are empty but for sm_90a.
WARPGROUP = re.compile(r"warpgroup_gemm_kernel<.*WarpgroupTile<\w+, \d, \d+>>")
# Loads under way together: a rotation's columns, with more than 16 tokens; indices of salient channels, with a few.
LOADS_TOGETHER, FEW_LOADS_TOGETHER = 32, 8
# Not a spill: an array that is indexed at run time, in a kernel that runs once for each weight, at load time.
MAY_USE_LOCAL_MEMORY = {"rosaq::cuda::prepack_codes_kernel<4>"}


def plain_turn(facts: Facts) -> int:
    """MMAs of a turn of a fused main loop that rotates nothing: 8 steps x 2 row tiles x token tiles of a warp."""
    found = FUSED.search(facts.name)
    if FEW.search(facts.name):
        return 16
    return 16 * min(int(found["tiles"]), 4) if found else max(map(int, facts.hot), default=0)


def problems(facts: Facts, budget: float | None, loads: int = 0) -> list[str]:
    """What is wrong with a kernel. budget: of its main loop; None if it needs none. loads: how many have to be under
    way together."""
    found = []
    if facts.loads_together < loads:
        found.append(f"{facts.loads_together} loads under way together, need {loads}")
    spilled = count(facts.all, "LDL", "STL")
    if spilled and facts.name not in MAY_USE_LOCAL_MEMORY:
        found.append(f"{spilled} accesses to local memory")
    if facts.odd_descriptors:
        found.append(f"{facts.odd_descriptors} memory descriptors in an odd uniform register")
    if budget is None:
        return found
    mma = plain_turn(facts)
    if str(mma) not in facts.hot:
        return [*found, f"no turn of {mma} MMAs in a loop that both copies and multiplies, but {list(facts.hot)}"]
    turn = facts.hot[str(mma)]
    copies = {opcode: n for opcode, n in turn.items() if opcode.startswith("LDGSTS")}
    if narrow := [opcode for opcode in copies if "128" not in opcode.split(".")]:
        found.append(f"asynchronous copies of less than 128 bits: {narrow}")
    if divisions := count(turn, "MUFU.RCP", "I2F.RP", "I2F.U32.RP"):
        found.append(f"{divisions} instructions of divisions in the main loop")
    if (loads := count(turn, "LDG", "LD")) and not FEW.search(facts.name):
        found.append(f"{loads} synchronous loads from global memory in the main loop")
    per_mma = sum(turn.values()) / mma
    if per_mma > budget:
        found.append(f"{per_mma:.1f} instructions for each MMA, budget {budget}")
    return found


def warpgroup_problems(facts: Facts) -> list[str]:
    """What is wrong with a kernel of warpgroups for sm_90a."""
    # Half a K-tile is four products between an arrival and a commit. Where ptxas cannot follow who uses whose registers
    # it waits after every product, and says so in a note that nobody reads.
    products, waits = count(facts.all, "HGMMA"), count(facts.all, "WARPGROUP.DEPBAR")
    found = [f"{products} wgmma products: far too few"] if products < 60 else []
    if waits * 2 > products:
        found.append(f"{waits} waits for {products} wgmma products: they are serialised")
    # Registers that the loader gives back and the two others take.
    if count(facts.all, "USETMAXREG") != 2:
        found.append("registers are not shared out anew")
    return found


def budget_of(facts: Facts) -> float | None:
    if found := FEW.search(facts.name):
        return FEW_BUDGET[found["symmetric"] == "true"]
    found = FUSED.search(facts.name)
    return BUDGET[found["symmetric"] == "true", int(found["tiles"])] if found else None


def least_loads(facts: Facts) -> int:
    if FEW.search(facts.name):
        return FEW_LOADS_TOGETHER
    found = FUSED.search(facts.name)
    if found:
        return LOADS_TOGETHER if int(found["tiles"]) > 2 else 0
    return LOADS_TOGETHER if WARPGROUP.search(facts.name) and facts.arch == "90a" else 0


@pytest.mark.parametrize("arch", cuda.DEFAULT_ARCHS)
def test_kernels_are_what_they_were_written_to_be(arch: str) -> None:
    if not _C.build_info()["cuda"]:
        pytest.skip("this build has no CUDA kernels (no nvcc)")
    if arch not in re.split("[;, ]+", str(_C.build_info()["cuda_archs"])):
        pytest.skip(f"this build has no code for sm_{arch}")
    kernels = facts_of(Path(_C.__file__), arch)
    instances = [path.name for path in (ROOT / "csrc/launch/instances").glob("*.cu")]
    warpgroups = [facts for facts in kernels if WARPGROUP.search(facts.name)]
    assert len(warpgroups) == sum(name.startswith("warpgroup") for name in instances) > 0
    assert sum(FUSED.search(facts.name) is not None for facts in kernels) == len(instances) - len(warpgroups)
    # With a rotation and without.
    assert sum(FEW.search(facts.name) is not None for facts in kernels) == 2 * sum("_m8." in name for name in instances)
    found = {f"{facts.name} sm_{arch}": problems(facts, budget_of(facts), least_loads(facts)) for facts in kernels}
    for facts in warpgroups:
        if arch == "90a":
            found[f"{facts.name} sm_{arch}"] += warpgroup_problems(facts)
        else:
            assert count(facts.all, "HGMMA") == 0
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Facts]]:
    """Facts of the planted kernels by architecture."""
    nvcc = cuda.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc to compile the planted kernels with")
    made = tmp_path_factory.mktemp("planted") / "planted.o"
    targets = [flag for arch in ("80", "90a") for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    source = ROOT / "tests/sass/kernels/planted.cu"
    subprocess.run(
        [str(nvcc), *cuda.FLAGS, *targets, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(made)], check=True
    )
    return {arch: facts_of(made, arch) for arch in ("80", "90a")}


@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("good", None),
        ("narrow_copy", r"copies of less than 128 bits: \['LDGSTS.E'\]"),
        ("division", "instructions of divisions in the main loop"),
        ("local_array", "accesses to local memory"),
        ("no_mma", "no turn of 0 MMAs in a loop that both copies and multiplies"),
        ("padded_loop", "instructions for each MMA, budget"),
    ],
)
def test_planted_kernels_are_told_apart(
    planted: dict[str, list[Facts]], arch: str, kernel: str, message: str | None
) -> None:
    (facts,) = [facts for facts in planted[arch] if facts.name == f"planted::{kernel}"]
    found = "; ".join(problems(facts, budget=40.0))
    if message is None:
        assert found == ""
    else:
        assert re.search(message, found), f"{found!r}, hot path {facts.hot}"


@pytest.mark.parametrize(
    ("products", "waits", "shares", "found"),
    [
        (72, 28, 2, []),
        (72, 72, 2, ["72 waits for 72 wgmma products: they are serialised"]),
        (8, 2, 2, ["8 wgmma products: far too few"]),
        (72, 28, 0, ["registers are not shared out anew"]),
    ],
)
def test_a_serialised_warpgroup_is_found(products: int, waits: int, shares: int, found: list[str]) -> None:
    opcodes = {"HGMMA.64": products, "WARPGROUP.DEPBAR.LE": waits, "USETMAXREG.DEALLOC.CTAPOOL": shares}
    assert warpgroup_problems(Facts("warpgroup", "90a", opcodes, 0, 0, {})) == found


@pytest.mark.parametrize(
    ("operands", "found"),
    [
        ("[R33], desc[UR4][R244.64]", []),
        ("[R33+0x200], desc[UR14][R244.64+0x200], P3", []),
        ("[R9+UR0], desc[UR1][R248.64]", ["1 memory descriptors in an odd uniform register"]),
        ("[R9+0x200], desc[UR13][R248.64+0x200], P3", ["1 memory descriptors in an odd uniform register"]),
    ],
)
def test_a_descriptor_in_an_odd_register_is_found(operands: str, found: list[str]) -> None:
    """In text, because no source makes every ptxas get it wrong."""
    text = f".text.copies:\n        /*cab0*/                   LDGSTS.E.BYPASS.128 {operands} ;\n"
    (kernel,) = disassembly.parse(text, "sm_90a")
    assert problems(of_kernel(kernel), budget=None) == found


@pytest.mark.parametrize(
    ("lines", "together"),
    [
        (["LDG.E R4, [R2.64]", "LDG.E R5, [R2.64+0x4]", "LDG.E R6, [R2.64+0x8]", "FADD R7, R4, R5"], 3),
        (["LDG.E R4, [R2.64]", "FADD R7, R4, R7", "LDG.E R5, [R2.64+0x4]", "FADD R7, R5, R7"], 1),
        (["LDG.E R4, [R2.64]", "LDG.E R5, [R4.64]"], 1),
        (["LDG.E R4, [R2.64]", "@P0 BRA `(.L_x_1)", "LDG.E R5, [R2.64+0x4]"], 1),
    ],
)
def test_loads_that_wait_for_each_other_are_counted_alone(lines: list[str], together: int) -> None:
    text = "".join(f"        /*{16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(lines))
    (kernel,) = disassembly.parse(f".text.loads:\n{text}.L_x_1:\n        /*0100*/  EXIT ;\n", "sm_90a")
    facts = of_kernel(kernel)
    assert facts.loads_together == together
    wanted = [f"{together} loads under way together, need 4"]
    assert problems(facts, budget=None, loads=4) == wanted
    assert problems(facts, budget=None, loads=together) == []


def test_a_binary_without_device_code_has_no_kernels(tmp_path: Path) -> None:
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    subprocess.run(["cc", "-c", "empty.c"], cwd=tmp_path, check=True)
    assert facts_of(tmp_path / "empty.o", "80") == []
