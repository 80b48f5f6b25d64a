"""The Triton kernels as machine code, without a GPU: registers, spills, and how wide their loops read and write.

One binary serves every shape, because no size is compiled in: what a shape decides is whether rows are made of whole
vectors. Interpreted kernels say nothing here, and compiled ones nothing about results; `test_triton.py` has those.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.ops import triton_mixtures, triton_op
from megatron_hybrid.ops.divergence import DIVERGENCES, mixture_of

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: there is nothing to compile", allow_module_level=True)

SHARDS = (18992, 19008, 50304, 151936)
"""V/tp of common models: 151936 / 8, the same padded to 128 * 8, GPT-2's padded, 151936 itself."""
POINTERS = {"target": "*i64", "rows": "*i64", "position": "*i32"}
LETTERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compiled(kernel: str, capability: int, folder: Path, **options: Any) -> tuple[str, int, int]:
    """(PTX, registers, bytes spilled) of a kernel as it is launched on rows of such logits; options: `translated`."""
    asm = translated(kernel, capability, **options)
    return asm["ptx"], *assembled(asm["ptx"], folder)


def translated(
    kernel: str,
    capability: int,
    *,
    dtype: Any,
    teacher: bool = True,
    whole: bool = True,
    masked: bool = True,
    divergence: str = "",
) -> Any:
    """The stages of `compiled` by name, up to PTX.

    whole       rows are made of whole vectors
    masked      some rows do not count
    divergence  of a mixture kernel
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_hybrid.ops import triton_kernels, triton_mixture_kernels

    tiling = triton_op.Tiling.of(4096, 18992, torch.empty(1, 18992 if whole else 18991, dtype=dtype, device="meta"))
    options = {"num_warps": 1}
    constants: dict[str, Any] = {"HAS_TEACHER": teacher, "MOST_SPLITS": 64}
    if kernel != "merge_kernel":
        constants = tiling.constants() | ({} if teacher else {"teacher": None})
        constants |= {} if masked else {"position" if "gradient" in kernel else "rows": None}
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg")}
    mixture = mixture_of(divergence, 0.3) if divergence else None
    if mixture:
        constants |= {name: None for name, value in triton_mixtures.letters(mixture).items() if value is None}
    function = getattr(triton_mixture_kernels if mixture else triton_kernels, kernel)
    signature, attributes = {}, {}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("student", "teacher", "out", "stats", "partial", "coefficients", "numbers", "sums", *POINTERS):
            of_logits = name in ("student", "teacher") or (name == "out" and "gradient" in kernel)
            signature[name] = f"*{LETTERS[dtype]}" if of_logits else POINTERS.get(name, "*fp32")
            attributes[i,] = [["tt.divisibility", 16]]  # as torch allocates
        else:
            signature[name] = "i32" if name in triton_kernels.SHAPES else "fp32"
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


def assembled(ptx: str, folder: Path) -> tuple[int, int]:
    """(registers, bytes spilled) by the newest assembler that Triton brings: older ones refuse newer PTX."""
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path, target = folder / "kernel.ptx", re.search(r"\.target (\w+)", ptx)
    assert target, "no target in the PTX"
    path.write_text(ptx)
    command = [binaries / "ptxas-blackwell", "-v", f"-arch={target[1]}", path, "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spills, said
    return int(registers[1]), int(spills[1])


def loop_of(ptx: str) -> str:
    """The kernel's one loop: from the label that a later branch goes back to, up to this branch."""
    loops = []
    for label in re.finditer(r"^(\$L__BB\w+):", ptx, re.MULTILINE):
        back = re.search(rf"bra(?:\.uni)?\s+{re.escape(label[1])};", ptx[label.end() :])
        if back:
            loops.append(ptx[label.end() : label.end() + back.end()])
    assert len(loops) == 1, f"expected one loop, got {len(loops)}"
    return loops[0]


def accesses(code: str) -> list[str]:
    return re.findall(r"\b(?:ld|st)\.global[\w.:]*", code)


@pytest.mark.parametrize("width", SHARDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shards_of_common_models_are_rows_of_whole_vectors(dtype, width):
    logits = torch.empty(3, width, dtype=dtype, device="meta")
    tiling = triton_op.Tiling.of(4096, width, logits)
    assert tiling.unit == tiling.items == 16 // dtype.itemsize
    assert tiling.splits == 1, "enough rows: none is split"
    assert tiling.stride(logits) * tiling.unit == width


def test_rows_that_begin_within_a_vector_are_not_read_as_vectors():
    for width, stride in ((50257, 50257), (18992, 18993), (18991, 18992)):
        logits = torch.empty(3, stride, dtype=torch.bfloat16, device="meta")[:, :width]
        assert triton_op.Tiling.of(4096, width, logits).unit == 1


@pytest.mark.parametrize("rows", [1, 4, 500, 4096])
@pytest.mark.parametrize("width", SHARDS)
def test_programs_cover_a_row_once_and_few_rows_are_split(width, rows):
    tiling = triton_op.Tiling.of(rows, width, torch.empty(rows, width, dtype=torch.bfloat16, device="meta"))
    of_one = tiling.tiles * triton_op.LANES * tiling.items
    assert (tiling.splits - 1) * of_one < width <= tiling.splits * of_one
    assert tiling.splits == 1 or tiling.tiles >= triton_op.FEWEST_TILES
    assert rows * tiling.splits >= triton_op.WANTED_PROGRAMS or tiling.tiles < 2 * triton_op.FEWEST_TILES


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", LETTERS)
@pytest.mark.parametrize("kernel", ["stats_kernel", "gradient_kernel"])
def test_loops_read_and_write_whole_vectors_without_spills(kernel, dtype, capability, tmp_path):
    ptx, registers, spilled = compiled(kernel, capability, tmp_path, dtype=dtype)
    loop = loop_of(ptx)
    expected = ["ld.global.v4.b32"] * 2 + ["st.global.v4.b32"] * (kernel == "gradient_kernel")  # 16 bytes each
    assert accesses(loop) == expected
    assert "bar.sync" not in loop and "shfl" not in loop, "a lane's columns are its own"
    assert "ld.local" not in ptx and spilled == 0
    assert registers <= triton_op.MOST_REGISTERS == 64


@pytest.mark.parametrize(
    ("divergence", "capability", "dtype"),
    [
        pytest.param(d, *target, marks=pytest.mark.slow if d != "jsd" and target != (90, torch.bfloat16) else ())
        for d in DIVERGENCES[1:]
        for target in ((80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float32), (100, torch.bfloat16))
    ],
)
@pytest.mark.parametrize("kernel", ["mixture_sums_kernel", "mixture_gradient_kernel"])
def test_loops_of_the_other_divergences_do_so_too(kernel, divergence, dtype, capability, tmp_path):
    ptx, registers, spilled = compiled(kernel, capability, tmp_path, dtype=dtype, divergence=divergence)
    loop = loop_of(ptx)
    assert accesses(loop) == ["ld.global.v4.b32"] * 2 + ["st.global.v4.b32"] * ("gradient" in kernel)
    assert "bar.sync" not in loop and "shfl" not in loop and "call" not in loop
    assert "ld.local" not in ptx and spilled == 0
    assert registers <= triton_op.MOST_REGISTERS == 64


@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("stats_kernel", {"dtype": torch.bfloat16, "teacher": False}),
        ("gradient_kernel", {"dtype": torch.bfloat16, "teacher": False}),
        ("stats_kernel", {"dtype": torch.bfloat16, "masked": False}),
        ("gradient_kernel", {"dtype": torch.bfloat16, "masked": False}),
        ("stats_kernel", {"dtype": torch.bfloat16, "whole": False}),
        ("gradient_kernel", {"dtype": torch.bfloat16, "whole": False}),
        ("merge_kernel", {"dtype": torch.bfloat16}),
        ("mixture_sums_kernel", {"dtype": torch.bfloat16, "divergence": "jsd", "masked": False}),
        ("mixture_gradient_kernel", {"dtype": torch.bfloat16, "divergence": "jsd", "masked": False}),
        ("mixture_sums_kernel", {"dtype": torch.bfloat16, "divergence": "jsd", "whole": False}),
        ("mixture_gradient_kernel", {"dtype": torch.bfloat16, "divergence": "jsd", "whole": False}),
    ],
)
def test_every_other_variant_compiles_without_spills(kernel, options, capability, tmp_path):
    _, registers, spilled = compiled(kernel, capability, tmp_path, **options)
    assert spilled == 0 and registers <= triton_op.MOST_REGISTERS == 64


@pytest.mark.parametrize(
    "kernel", ["stats_kernel", "gradient_kernel", "mixture_sums_kernel", "mixture_gradient_kernel"]
)
@pytest.mark.parametrize("masked", [False, True])
def test_rows_beyond_two_billion_logits_are_where_they_are(kernel, masked):
    # 14200 rows of 151936 pass 2**31: a row's offset from the first must not be an int32 product
    divergence = "jsd" if "mixture" in kernel else ""
    text = translated(kernel, 90, dtype=torch.bfloat16, masked=masked, divergence=divergence)["ttir"]
    to_rows = re.findall(r"tt\.addptr %(?:student|teacher|out)\w*, .*: !tt\.ptr<bf16>, (\w+)", text)
    assert len(to_rows) >= 2 and set(to_rows) == {"i64"}, to_rows


def test_without_a_teacher_nothing_of_it_is_read_or_computed(tmp_path):
    ptx, _, _ = compiled("stats_kernel", 90, tmp_path, dtype=torch.bfloat16, teacher=False)
    whole, _, _ = compiled("stats_kernel", 90, tmp_path, dtype=torch.bfloat16)
    assert accesses(loop_of(ptx)) == ["ld.global.v4.b32"]
    exponentials = [loop_of(code).count("ex2.approx") for code in (ptx, whole)]
    assert exponentials == [9, 18]  # eight columns and one rescaling, of each distribution


def test_the_gradient_is_rounded_to_nearest_by_the_hardware(tmp_path):
    ptx, _, _ = compiled("gradient_kernel", 90, tmp_path, dtype=torch.bfloat16)
    assert "cvt.rn.bf16" in loop_of(ptx)
