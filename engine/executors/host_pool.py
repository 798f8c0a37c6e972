"""Whether a pool of KV blocks fits into this machine's memory."""

import os

from engine.kv.layout import KvLayout


def check_memory(layout: KvLayout, num_blocks: int, available: int) -> None:
    """The pool is touched page by page, so what does not fit would kill the process later, in mid-request."""
    needed = num_blocks * layout.block_bytes
    if needed > available:
        raise ValueError(
            f"{num_blocks} KV blocks of {layout.block_bytes} bytes need {needed / 2**30:.1f} GiB, and "
            f"{available / 2**30:.1f} GiB are available beside the weights; "
            f"at most {max(0, available) // layout.block_bytes} fit. Lower kv_cache.memory or kv_cache.num_blocks"
        )


def available_memory() -> int:
    """Bytes that can be had without swapping, by the kernel's estimate."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
