"""What the compiler makes of a kernel, for any architecture and without a GPU.

Registers, spills and shared memory bound how many programs run on a core of the GPU at the same
time. The instructions of the hot loop per score (one query, one key) bound the speed. The hot
loops are the innermost loops with matrix instructions and about one exponential per score. A
kernel with several, such as the memory bank's backward, reports each.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from . import memory, projection
from .config import SHARED_MEMORY
from .cross_frame import gaussian, window
from .cross_frame.backward import _dkv_kernel, _dq_kernel
from .cross_frame.forward import _forward_kernel, _lse_kernel

REGISTERS = 65536  # of a core, 32 bits each
THREADS = {"sm_80": 2048, "sm_89": 1536, "sm_90": 2048}
DOUBLED = 1.75  # exponentials per score from which on two warps compute the same; 1 + rescaling
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = {"HGMMA": "wgmma", "HMMA": "mma"}  # and MFMA on AMD

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_OPERANDS = (  # pointers of the operands' type; others are to float32 or, below, int32
    "q k v do dd o dk dv y m f mean folded table query_table key_table"
)
_INTEGERS = {"window_radius_ptr", "reverse_radius_ptr"}
_MULTIPLES_OF_16 = {"q_pixels", "k_pixels", "pixels", "N"}


class Job(NamedTuple):
    """What it takes to compile a kernel."""

    function: Any
    signature: dict[str, Any]  # types of the arguments; a tuple of types for a tuple
    constexprs: dict[str, Any]
    divisible: list[str]  # arguments that are multiples of 16

    @classmethod
    def of(cls, function: Any, constexprs: dict, dtype: torch.dtype, **types: Any) -> "Job":
        """The job of a kernel on operands of a type; `types` of arguments that are exceptions."""
        signature = {}
        for name in function.arg_names:
            if name in constexprs:
                continue
            if name.endswith("_ptr"):
                kind = "i32" if name in _INTEGERS else "fp32"
                kind = f"*{_TYPES[dtype] if name[:-4] in _OPERANDS.split() else kind}"
            else:
                kind = "fp32" if name == "eta" else "i32"
            signature[name] = types.get(name, kind)
        divisible = [x for x in signature if x in _MULTIPLES_OF_16 or "*" in signature[x][0]]
        return cls(function, signature, constexprs, divisible)


def jobs(kernel: str, d: int, dtype: torch.dtype, config: dict, arch: str) -> dict[str, Job]:
    """The compile jobs of one of config.KERNELS and its variants, by name.

    A name with a colon is a variant of the kernel before the colon, with the same configuration:
    with the displacement (offsets), or the second part of the gate form's gradient.
    """
    if kernel.startswith("memory"):
        function = memory._forward_kernel if kernel.endswith("forward") else memory._backward_kernel
        options = memory.options(config, config["BLOCK_N"], dtype, arch.startswith("gfx"))
        constexprs = {"D": d} | {x: y for x, y in options.items() if x in function.arg_names}
        return {kernel: Job.of(function, constexprs, dtype, dq_ptr=f"*{_TYPES[dtype]}")}
    blocks = {"D": d, "BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"]}
    blocks["EXACT"] = dtype == torch.float32
    if kernel == "cross_frame_lse":
        return {kernel: Job.of(_lse_kernel, blocks, dtype)}
    function = {
        "cross_frame_forward": _forward_kernel,
        "cross_frame_dq": _dq_kernel,
        "cross_frame_dkv": _dkv_kernel,
    }[kernel]
    variants = {"": (False, False), ":offsets": (True, False), ":gate": (False, True)}
    if function is _forward_kernel:
        del variants[":gate"]
        blocks["WARP_SPECIALIZE"] = config.get("WARP_SPECIALIZE", False)
    flags = ("DISPLACEMENT", "PLAIN")
    return {
        kernel + name: Job.of(
            function,
            blocks | {x: y for x, y in zip(flags, on, strict=True) if x in function.arg_names},
            dtype,
        )
        for name, on in variants.items()
    }


def prepass_jobs(d: int, dtype: torch.dtype) -> dict[str, Job]:
    """The jobs of the kernels that run before the attention; they have no configuration."""
    kernels = {
        "key_table": (gaussian._key_table_kernel, {"BLOCK_N": 64}),
        "query_table": (gaussian._query_table_kernel, {"BLOCK_M": 128, "BLOCK_N": 64}),
        "key_tile": (window._key_tile_kernel, {"D": d}),
        "select_key_tiles": (
            window._select_key_tiles_kernel,
            {"D": d, "RINGS": 128, "CHUNK": 16},
        ),
        "reverse": (window._reverse_kernel, {"CHUNK": 256}),
    }
    return {name: Job.of(*kernel, dtype) for name, kernel in kernels.items()}


def projection_jobs(c: int, d: int, dtype: torch.dtype, config: dict) -> dict[str, Job]:
    """The jobs of three projections of float32 weights, each normalized and multiplied.

    Args:
        c, d: channels of the features and of a projection.
        dtype: of the features.
        config: see `projection.launch_config`.
    """
    sizes = {"C": c, "D": d, "J": 3}
    options = {key: config[key] for key in ("BLOCK_M", "BLOCK_K", "PRECISION")}
    tuples: dict[str, Any] = dict.fromkeys(("weights", "biases", "factors"), ("*fp32",) * 3)
    tuples["outputs"] = (f"*{_TYPES[dtype]}",) * 3
    kernels = {
        "projection_fold": (projection._fold_kernel, {**sizes, "ROWS": projection.ROWS}),
        "projection": (
            projection._project_kernel,
            {**sizes, "NORMALIZE": (True,) * 3, **options},
        ),
    }
    return {name: Job.of(*kernel, dtype, **tuples) for name, kernel in kernels.items()}


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


def compile_job(job: Job, config: dict, arch: str) -> Compiled | str:
    """Compile for one of config.ARCHITECTURES; a string says why it failed."""
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
    return _read_nvidia(kernel, scores, arch) if arch.startswith("sm_") else _read_amd(kernel)


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
    loops = _hot_loops(opcodes, branches, scores / (2 if specialized else 1))
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


def _read_amd(kernel) -> Compiled:
    """Without the hot loops: an order of candidates by instructions is for NVIDIA alone."""
    assembly = kernel.asm["amdgcn"]

    def figure(name: str) -> int:
        return max(int(x) for x in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return Compiled(
        registers=figure("vgpr_count"),
        spills=figure("private_segment_fixed_size"),
        shared=kernel.metadata.shared,
        occupancy=None,
        matrix="mfma" if "v_mfma" in assembly else None,
        instructions=(),
        exponentials=(),
        bulk_copies=0,
        warps=kernel.metadata.num_warps,
        warp_specialized=False,
    )


def _hot_loops(
    opcodes: list[str], branches: list[tuple[int, int]], scores: float
) -> list[tuple[float, float]]:
    """Instructions and exponentials per score of every hot loop, in the order of the code.

    Args:
        opcodes: of the kernel.
        branches: (target, source) of every jump; those backward close a loop.
        scores: of one thread in one iteration.
    """
    spans = [
        (first, last)
        for first, last in branches
        if first <= last and any(x.startswith(tuple(MATRIX)) for x in opcodes[first : last + 1])
    ]
    loops = []
    for first, last in sorted(spans):
        others = [span for span in spans if span != (first, last)]
        holds = any(first <= a and b <= last for a, b in others)
        # a wait's retry comes after the kernel's end and jumps back into the loop
        leaves = any(a < first <= b < last for a, b in others)
        exponentials = sum(x.startswith("MUFU.EX2") for x in opcodes[first : last + 1])
        # a loop over one side of an epilogue has matrix instructions too, but no exponentials
        if not holds and not leaves and exponentials >= 0.9 * scores:
            loops.append((round((last + 1 - first) / scores, 2), round(exponentials / scores, 2)))
    return loops
