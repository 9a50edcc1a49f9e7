"""Every form of every Triton kernel compiles for GPUs that are not here, as lean as it was.

No spills but for MAX_SPILLS, shared memory within the chip's, and the main loop's instructions per
element within a tenth of kernels/gpu/instructions.json.
"""

from pathlib import Path

import pytest
import triton

from kernels.gpu.compile import (
    CAPABILITIES,
    SHARED_LIMITS,
    compile_case,
    jobs,
    modules,
    table,
)
from kernels.gpu.sass import main_loop
from tests.background import Background
from tests.spilling_kernel import case

TOLERANCE = 0.1
# Bytes of stack. Triton 3.6 puts one register pair of an fp8 kernel there; 3.9 does not.
MAX_SPILLS = {80: 0, 89: 8, 90: 0}
MEND = "`python -m kernels.gpu.compile --write-table` writes what is compiled here"


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("module", modules())
def test_kernels_compile_lean(module: str, capability: int, background: Background) -> None:
    expected = table().get(triton.__version__, {}).get(str(capability))
    faults = []
    for job in jobs(module, [capability]):
        found = background.compiled[job].result()
        if found.spills > MAX_SPILLS[capability]:
            faults.append(f"{job.label}: spills {found.spills} bytes")
        if found.shared > SHARED_LIMITS[capability]:
            faults.append(f"{job.label}: {found.shared} bytes of shared memory")
        if expected is None:
            continue
        if job.name not in expected:
            faults.append(f"{job.label}: not in the table; {MEND}")
            continue
        before = expected[job.name]["per_element"]
        if abs(found.per_element - before) > TOLERANCE * before:
            faults.append(
                f"{job.label}: {found.per_element} instructions per element, the table has "
                f"{before}; {MEND}"
            )
    assert not faults, "\n".join(faults)


def test_the_table_knows_this_triton() -> None:
    versions = table()
    if triton.__version__ not in versions:
        pytest.skip(f"no instructions for Triton {triton.__version__}; {MEND}")
    known = {(str(job.capability), job.name) for module in modules() for job in jobs(module)}
    listed = {(c, name) for c, rows in versions[triton.__version__].items() for name in rows}
    assert listed == known, MEND


@pytest.fixture
def triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or left in the user's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_a_spill_and_its_cost_show(triton_cache: None) -> None:
    lean, spilling = compile_case(case(64), 80), compile_case(case(128, maxnreg=64), 80)
    assert lean.spills == 0
    assert lean.hmma > 0
    assert spilling.spills > 100
    assert spilling.per_element > 2 * lean.per_element
    assert lean.shared < spilling.shared


def test_hoppers_matrix_units_are_seen(triton_cache: None) -> None:
    compiled = compile_case(case(64), 90)
    assert compiled.hgmma > 0
    assert compiled.hmma == 0


CODE = """
    .L_x_0:
        /*0010*/  LDG.E R0 ;
        /*0020*/  IADD3 R1 ;
        /*0030*/  IADD3 R2 ;
        /*0040*/  @P0 BRA `(.L_x_0) ;
    .L_x_4:
        /*0048*/  HMMA.16816.F32 R4 ;
    .L_x_1:
        /*0050*/  HMMA.16816.F32 R0 ;
        /*0060*/  SEL R1 ;
        /*0070*/  @!P1 BRA `(.L_x_1) ;
    .L_x_2:
        /*0080*/  HMMA.16816.F32 R0 ;
        /*0090*/  @!P1 BRA `(.L_x_2) ;
        /*0098*/  @!P2 BRA `(.L_x_4) ;
        /*00a0*/  EXIT ;
    .L_x_3:
        /*00b0*/  BRA `(.L_x_3);
"""


def _opcodes(lines: list[str]) -> list[str]:
    return [line.split("*/")[1].split()[0] for line in main_loop(lines)]


def test_the_main_loop_is_the_shortest_with_the_most_matrix_instructions() -> None:
    lines = [line for line in CODE.splitlines() if line.strip()]
    assert _opcodes(lines) == ["HMMA.16816.F32", "@!P1"]
    assert _opcodes([line for line in lines if "MMA" not in line])[0] == "LDG.E"
