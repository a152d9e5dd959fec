"""Which processor this is, and what it can do that decides how fast and how exactly a model runs. Free of torch."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# As /proc/cpuinfo calls them: x86's `flags`, Arm's `Features`.
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "i8mm": "I8MM",
    "sve": "SVE",
}


def processor_name() -> str:
    """The processor's name; Linux tells it in a file alone."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_features() -> tuple[str, ...]:
    """What it can do of what matters here, AVX512-VNNI for example; empty where the system does not say."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return tuple(name for flag, name in _FEATURES.items() if flag in flags)


def processors() -> int:
    """How many logical processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def this_machine() -> dict[str, Any]:
    """What measured seconds belong to: processor, how many of it, operating system, version of onnxruntime."""
    return {
        "processor": ", ".join([processor_name(), *processor_features()]),
        "processors": processors(),
        "system": f"{platform.system()} {platform.machine()}",
        "onnxruntime": _onnxruntime(),
    }


def _onnxruntime() -> str | None:
    """Its version; None where a checkpoint is evaluated without it."""
    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return None


def _cpuinfo(field: str) -> str | None:
    """The first line of this name in Linux's list of processors."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field)
    return next(found, None)
