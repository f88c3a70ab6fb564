"""Compile one Triton kernel for a GPU that is not here.

The binary tells what it would cost on it.

Needs no driver: the Triton wheel brings ptxas, cuobjdump and the AMD back end. Must run without
TRITON_INTERPRET: a kernel is either interpreted or compiled in a process, never both. Results are
cached in TRITON_CACHE_DIR (Triton's own cache).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from appo._kernels.common.gpu.aot import AotCase

# Dynamic shared memory that one block may ask for; registers of one multiprocessor (NVIDIA) or of
# one lane over all the waves of a SIMD (AMD); columns of tensor memory. A kernel over any of them
# compiles and then fails at its first launch.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
REGISTER_FILE = 65_536
VGPRS_PER_LANE = 512
TENSOR_MEMORY_COLUMNS = 512
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass
class Compiled:
    """One row of the table.

    Registers are per thread, sizes in bytes, instruction counts are static (loops not unrolled).
    """

    name: str
    arch: str
    warps: int = 0
    stages: int = 0
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor_core: int = 0
    async_copies: int = 0
    bulk_copies: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def shared_limit(self) -> int:
        return SHARED_LIMIT[self.arch]


def compile_case(case: AotCase, arch: str) -> Compiled:
    """Compile `case` for `arch` and list every budget that it breaks.

    A compiler error is a problem, not an exception.
    """
    row = Compiled(case.name, arch, case.num_warps, case.num_stages)
    start = time.perf_counter()
    try:
        binary = _compile(case, arch)
    except (
        Exception
    ) as error:  # the compiler raises anything from CompilationError to PassManager's RuntimeError
        row.problems.append(f"does not compile: {type(error).__name__}: {str(error).strip()[:300]}")
        return row
    row.seconds = time.perf_counter() - start
    row.shared = binary.metadata.shared
    (_read_amd if arch.startswith("gfx") else _read_nvidia)(row, binary)
    row.problems += _broken_budgets(row, case, binary)
    return row


def _compile(case: AotCase, arch: str) -> Any:
    names = case.kernel.arg_names
    missing = [n for n in names if n not in case.signature]
    extra = [n for n in case.signature if n not in names]
    if missing or extra:
        raise ValueError(f"signature lacks {missing} and has {extra} that the kernel does not take")
    unknown = [
        p.name for p in case.kernel.params if p.do_not_specialize and p.name in case.divisible
    ]
    if unknown:
        raise ValueError(f"{unknown} in divisible, but the launcher never specialises on them")
    signature = {n: case.signature[n] for n in names}
    # What the just-in-time launcher would specialise on; without it there are no vector loads and
    # no cp.async.
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible}
    source = ASTSource(case.kernel, signature, case.constexprs, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    return triton.compile(source, target=_target(arch), options=options)


def _target(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _read_nvidia(row: Compiled, binary: Any) -> None:
    ptx = binary.asm["ptx"]
    row.warps = (
        int(re.search(r"\.reqntid (\d+)", ptx)[1]) // 32
    )  # with warp specialisation more than was asked for
    row.tensor_core = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx))
    row.async_copies = len(re.findall(r"\bcp\.async\.c[ag]\b", ptx))
    row.bulk_copies = len(re.findall(r"\bcp\.async\.bulk\.tensor\b", ptx))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        used = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        row.registers = max(int(n) for n in re.findall(r"\bREG:(\d+)", used))
        row.stack = max(int(n) for n in re.findall(r"\bSTACK:(\d+)", used))
        if row.stack:
            # Assembling again shows what went to the stack. The stack itself is the gate: ptxas has
            # its own flags here.
            source = Path(folder, "kernel.ptx")
            source.write_text(ptx)
            target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
            gpu = f"--gpu-name={target}"
            log = _run("ptxas-blackwell", "-v", gpu, str(source), "-o", "/dev/null")
            row.spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _read_amd(row: Compiled, binary: Any) -> None:
    asm = binary.asm["amdgcn"]

    def note(key: str) -> int:
        return max(int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", asm))

    row.warps = note("max_flat_workgroup_size") // 64
    row.registers = note("vgpr_count")  # on gfx942 the accumulation registers are part of it
    row.stack = note("private_segment_fixed_size")
    row.spills = 4 * note(
        "vgpr_spill_count"
    )  # scalar registers spill into vector registers, not to memory
    row.tensor_core = len(re.findall(r"\bv_mfma_", asm))
    row.async_copies = len(re.findall(r"\b(?:global_load_lds|buffer_load_\w+ .*\blds\b)", asm))


def _broken_budgets(row: Compiled, case: AotCase, binary: Any) -> list[str]:
    problems = []
    if row.stack or row.spills:
        problems.append(f"spills: {row.stack} bytes of stack, {row.spills} bytes stored to it")
    if row.shared > row.shared_limit:
        problems.append(f"{row.shared:,} bytes of shared memory, the limit is {row.shared_limit:,}")
    if row.arch.startswith("gfx"):
        lanes = row.registers * -(-row.warps // 4)  # waves of one block on each of the 4 SIMDs
        if lanes > VGPRS_PER_LANE:
            problems.append(f"{lanes} vector registers per lane, there are {VGPRS_PER_LANE}")
    else:
        used = -(-row.registers // 8) * 8 * 32 * row.warps
        if used > REGISTER_FILE:
            problems.append(f"{used:,} registers per block, there are {REGISTER_FILE:,}")
    if (columns := getattr(binary.metadata, "tmem_size", 0) or 0) > TENSOR_MEMORY_COLUMNS:
        problems.append(f"{columns} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}")
    # An exact float32 product has no tensor-core instruction, and that is right only where the
    # inputs are float32.
    products = re.findall(r"\btt\.dot\b.*", binary.asm["ttir"])
    half = any(re.search("bf16|fp16", t) for t in case.signature.values())
    exact = not half and not any("inputPrecision" in p for p in products)
    if products and not exact and not row.tensor_core:
        problems.append("tl.dot without a tensor-core instruction")
    return problems
