"""Which device and precision a stream runs with."""

import torch


def choose_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda needs a CUDA GPU, there is none; use device cpu")
    return chosen


def choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """The precision and the reason."""
    if precision != "auto":
        return precision, "as asked"
    if device.type == "cpu":
        return fastest_on_cpu()
    if device.type != "cuda":
        return "fp32", "safe on any device"
    native = torch.cuda.get_device_capability(device)[0] >= 8
    return ("bf16", "native on this GPU") if native else ("fp16", "this GPU has no bf16")


def fastest_on_cpu() -> tuple[str, str]:
    """The precision in which convolutions are fastest on this CPU, and why.

    bfloat16 instructions alone do not decide: the convolutions of `paper` took half the time of
    float32 on an AMD EPYC with AVX512-BF16, and 1.5 times as long on an Intel Xeon with it.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()  # which older PyTorch does not have
    if known.get("amx_bf16"):
        return "bf16", "by this processor's AMX"
    if known.get("avx512_bf16") and "AMD" in known.get("cpu_name", ""):
        return "bf16", "by this processor's AVX512-BF16"
    return "fp32", "the fastest here"
