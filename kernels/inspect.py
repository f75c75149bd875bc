"""What the compiler makes of a kernel, for any architecture and without a GPU.

Registers, spills and shared memory bound how many programs run beside each other on a core of the
GPU; the instructions of the hot loop per score (one query, one key) bound the speed from below.
The hot loops are the innermost loops with matrix instructions that take about one exponential
per score: a kernel with several, such as the memory bank's backward, reports each.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from .config import SHARED_MEMORY

REGISTERS = 65536  # of a core, 32 bits each
THREADS = {"sm_80": 2048, "sm_89": 1536, "sm_90": 2048}
DOUBLED = 1.75  # exponentials per score from which on two warps compute the same; 1 + rescaling
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = {"HGMMA": "wgmma", "HMMA": "mma"}  # and MFMA on AMD


@dataclass(frozen=True)
class Compiled:
    """One kernel with one configuration on one architecture."""

    registers: int  # of a thread
    spills: int  # bytes of stack of a thread, where registers are spilled to
    shared: int  # bytes of a program
    occupancy: int | None  # programs on a core, as far as registers, threads and memory allow
    matrix: str | None  # wgmma, mma, mfma; None without matrix instructions
    instructions: tuple[float, ...]  # per score, of each hot loop
    exponentials: tuple[float, ...]  # per score, of each hot loop
    bulk_copies: int  # TMA loads, sm_90
    warps: int  # of a program, those added by warp specialization included
    warp_specialized: bool

    def flaws(self, arch: str) -> list[str]:
        """Why the configuration should not be used, if so."""
        flaws = []
        if self.spills:
            flaws.append(f"spills {self.spills} bytes")
        if self.shared > SHARED_MEMORY[arch]:
            flaws.append(f"{self.shared} bytes of shared memory, {SHARED_MEMORY[arch]} allowed")
        if any(x > DOUBLED for x in self.exponentials):
            flaws.append(f"{max(self.exponentials):.1f} exponentials per score")
        return flaws


def jobs(kernel: str, d: int, dtype: torch.dtype, config: dict, arch: str) -> dict[str, tuple]:
    """The compile jobs of a kernel and its variants, by name; see `compile_jobs` of each module."""
    module = import_module(f"mana_triton.kernels.{kernel.rpartition('_')[0]}")
    every = module.compile_jobs(d, dtype, config, arch)
    return {name: job for name, job in every.items() if name.partition(":")[0] == kernel}


def compile_job(job: tuple, config: dict, arch: str) -> Compiled | str:
    """Compile for an architecture of tuning.ARCHITECTURES; a string says why it failed."""
    function, signature, constexprs, divisible = job
    names = list(function.arg_names)
    # an argument that is a tuple has a path for every element
    paths = [
        (names.index(name), *element)
        for name in divisible
        for element in (
            [(i,) for i in range(len(signature[name]))]
            if isinstance(signature[name], tuple)
            else [()]
        )
    ]
    source = ASTSource(
        fn=function,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={name: value for name, value in constexprs.items() if name in names},
        attrs={path: [["tt.divisibility", 16]] for path in paths},  # pyright: ignore[reportArgumentType]
    )
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch[3:]), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    options = {name: config[name] for name in ("num_warps", "num_stages")}
    try:
        kernel = triton.compile(source, target=target, options=options)
    except (RuntimeError, TritonError) as error:
        return f"does not compile: {str(error).strip().splitlines()[-1]}"
    scores = config["BLOCK_M"] * config["BLOCK_N"] / (config["num_warps"] * target.warp_size)
    read = _read_nvidia if arch.startswith("sm_") else _read_amd
    return read(kernel, scores, arch)


def _read_nvidia(kernel, scores: float, arch: str) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _disassemble("--dump-resource-usage", file.name)
        sass = _disassemble("--dump-sass", file.name)
    resources = {name: int(x) for name, x in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    # an instruction may stand after a predicate such as @!P0
    opcodes = [re.sub(r"^@\S+\s+", "", text).split()[0] for _, text in lines]
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    branches = []
    for i, (_, text) in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) in place:
            branches.append((place[int(jump.group(1), 16)], i))
    specialized = "ttg.warp_specialize" in kernel.asm["ttgir"]
    warps = kernel.metadata.num_warps
    loops = _hot_loops(
        opcodes, branches, tuple(MATRIX), ("MUFU.EX2",), scores / (2 if specialized else 1)
    )
    registers = resources["REG"]
    return Compiled(
        registers=registers,
        spills=resources["STACK"],
        shared=kernel.metadata.shared,
        occupancy=_occupancy(registers, warps, kernel.metadata.shared, arch),
        matrix=next(
            (n for op, n in MATRIX.items() if any(x.startswith(op) for x in opcodes)), None
        ),
        instructions=tuple(x for x, _ in loops),
        exponentials=tuple(x for _, x in loops),
        bulk_copies=sum(x.startswith("UTMALDG") for x in opcodes),
        warps=warps,
        warp_specialized=specialized,
    )


def _disassemble(option: str, path: str) -> str:
    command = [NVIDIA_TOOLS / "cuobjdump", option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _occupancy(registers: int, warps: int, shared: int, arch: str) -> int:
    """Programs on one core: registers come in eights, a program takes 1 KB of memory more."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_memory = (SHARED_MEMORY[arch] + 1024) // (shared + 1024)
    return min(by_registers, by_memory, THREADS[arch] // (32 * warps))


def _read_amd(kernel, scores: float, arch: str) -> Compiled:
    assembly = kernel.asm["amdgcn"]

    def figure(name: str) -> int:
        return max(int(x) for x in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    opcodes, labels, branches = [], {}, []
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label.group(1)] = len(opcodes)
        elif instruction := re.match(r"\t([a-z]\w+)\s*(.*)", line):
            jump = re.match(r"\.LBB\w+", instruction.group(2))
            if instruction.group(1).startswith(("s_branch", "s_cbranch")) and jump:
                branches.append((labels.get(jump.group(), len(opcodes) + 1), len(opcodes)))
            opcodes.append(instruction.group(1))
    loops = _hot_loops(opcodes, branches, ("v_mfma",), ("v_exp_f32",), scores)
    return Compiled(
        registers=figure("vgpr_count"),
        spills=figure("private_segment_fixed_size"),
        shared=kernel.metadata.shared,
        occupancy=None,
        matrix="mfma" if any(x.startswith("v_mfma") for x in opcodes) else None,
        instructions=tuple(x for x, _ in loops),
        exponentials=tuple(x for _, x in loops),
        bulk_copies=0,
        warps=kernel.metadata.num_warps,
        warp_specialized=False,
    )


def _hot_loops(
    opcodes: list[str],
    branches: list[tuple[int, int]],
    matrix: tuple[str, ...],
    exponential: tuple[str, ...],
    scores: float,
) -> list[tuple[float, float]]:
    """Instructions and exponentials per score of every hot loop, in the order of the code.

    Args:
        opcodes: of the kernel.
        branches: (target, source) of every jump; those backward close a loop.
        matrix, exponential: beginnings of the opcodes.
        scores: of one thread in one iteration.
    """
    spans = [
        (first, last)
        for first, last in branches
        if first <= last and any(x.startswith(matrix) for x in opcodes[first : last + 1])
    ]
    loops = []
    for first, last in sorted(spans):
        others = [span for span in spans if span != (first, last)]
        holds = any(first <= a and b <= last for a, b in others)
        # a wait's retry stands behind the kernel's end and jumps back into the loop
        leaves = any(a < first <= b < last for a, b in others)
        exponentials = sum(x.startswith(exponential) for x in opcodes[first : last + 1])
        # a loop over one side of an epilogue has matrix instructions too, but no exponentials
        if not holds and not leaves and exponentials >= 0.9 * scores:
            loops.append((round((last + 1 - first) / scores, 2), round(exponentials / scores, 2)))
    return loops
