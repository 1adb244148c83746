"""Memory that was freed goes back to the system between the steps of a calibration."""

from __future__ import annotations

import ctypes
import gc


def release_freed_memory() -> None:
    """Let go of cycles of objects, then `trim_heap`; call it where a whole layer, or the tokenizer, has just gone."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return the heap's free pages; call it where large tensors have just gone.

    glibc keeps blocks of less than 32 MiB to use them again, but one layer's fit the next one's poorly: the peak of a
    model of 0.5B was about 100 MiB higher. Without effect where the C library has no malloc_trim.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
