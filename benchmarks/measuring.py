"""How time and memory are measured: alternating repeats, and the peak of a process of its own."""

import concurrent.futures
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from switchkd.export.contract.processor import processor_features, processor_name

MIB = 2**20
# Runs a forward and a backward; what it returns is the caller's business.
Work = Callable[[], Any]


def describe_machine(device: torch.device) -> str:
    """Return what ran the benchmark: the processor, what of its features decides its speed, how much of it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    processor = ", ".join([processor_name(), *processor_features()])
    return f"{threads} thread{'s' * (threads > 1)} of {os.cpu_count()} of {processor}, torch {torch.__version__}"


def times_ms(works: Mapping[str, Work], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Return the milliseconds of every repeat of every work, taken in turns, each round in the opposite order.

    Turns, so that a slow minute of the machine falls on all of them; one round before is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name in list(works) if repeat % 2 else reversed(list(works)):
            milliseconds = _timed(works[name], device)
            if repeat:
                taken[name].append(milliseconds)
    return taken


def _timed(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(stop))
    before = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - before)


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cuda_peak_mib(work: Work, device: torch.device) -> dict[str, float]:
    """Return the allocator's peak while the work ran, in all and above what was held before."""
    work()
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    work()
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak_mib": peak / MIB, "above_mib": (peak - held) / MIB}


def cpu_peak_mib(
    prepare: Callable[..., Work], arguments: tuple[Any, ...], warm_up: tuple[Any, ...]
) -> dict[str, float]:
    """Return the resident memory's peak while the work ran, in all and above what was held before.

    In a fresh process, because memory that a process freed earlier hides what it needs now. `prepare` makes the work
    and its inputs there; the first run is measured, with everything that numpy and torch allocate. `warm_up` are
    arguments for a small work that is run before, so that what is loaded and started once does not count.
    """
    # Forked from a server that has imported what the work needs and run nothing.
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_of_this_process, torch.get_num_threads(), prepare, arguments, warm_up).result()


def _peak_of_this_process(
    threads: int, prepare: Callable[..., Work], arguments: tuple[Any, ...], warm_up: tuple[Any, ...]
) -> dict[str, float]:
    torch.set_num_threads(threads)
    prepare(*warm_up)()
    work = prepare(*arguments)
    gc.collect()
    held = _resident_bytes("VmRSS")
    # 5 sets the peak back to what is held now (proc(5)); what making the inputs took is not the work's.
    Path("/proc/self/clear_refs").write_text("5")
    work()
    peak = _resident_bytes("VmHWM")
    return {"peak_mib": peak / MIB, "above_mib": (peak - held) / MIB}


def _resident_bytes(field: str) -> int:
    if (size := _bytes_in("/proc/self/status", field)) is None:
        raise ValueError(f"/proc/self/status has no {field}; on this system memory cannot be measured, use --no-memory")
    return size


def _bytes_in(table: str, field: str) -> int | None:
    """Return the size that a line of /proc such as `VmRSS:  1024 kB` gives; None where there is no such line."""
    for line in Path(table).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def memory_at_hand(device: torch.device) -> int:
    """Return the bytes that a case may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _bytes_in("/proc/meminfo", "MemAvailable") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
