"""What trtllm-build says while it builds: how far it is, and in our own words why it failed."""

from __future__ import annotations

import re
import signal

# Lines of its log at level info, in the order in which they come (tensorrt_llm/builder.py).
STAGES = (
    (
        "reading weights",
        re.compile(r"Set (nccl_plugin|PluginConfig\.|gpt_attention_plugin)|Setting model configuration"),
    ),
    ("network made", re.compile(r"Total time of constructing network")),
    (
        "kernels chosen",
        re.compile(r"Total time of building Unnamed Network|Engine generation completed|Total time of b"),
    ),
    ("writing", re.compile(r"Serializing engine to")),
)
_NOISE = re.compile(r"^\s*(File |\^|~|During handling|The above exception)|^Traceback|^\s*$")
_CAUSES = (
    (re.compile(r"unrecognized arguments?: (?P<what>.+)|argument (?P<flag>--\w+): invalid"),
     "the installed trtllm-build does not take {0}; see [trtllm] in the recipe"),
    (re.compile(r"Required but not provided tensors: ?(?P<what>.{0,200})"),
     "the rank checkpoint lacks {0}; convert it again with --force, and with the release that builds"),
    (re.compile(r"not supported on SM ?(?P<what>[>=]*\d+)"),
     "the GPU (SM {0}) lacks what the precision or a plugin needs"),
    (re.compile(r"(?i)cuda out of memory|out ?of ?memory|cudaErrorMemoryAllocation|Requested amount of GPU memory"),
     "the GPU's memory is full: stop what else runs on it, lower max_num_tokens or --max-batch-size, or raise --tp"),
    (re.compile(r"No space left on device"), "the disk is full"),
    (re.compile(r"(?i)could not find any implementation for node (?P<what>\S{0,120})"),
     "TensorRT found no kernel for {0}, mostly for lack of GPU memory while it times them"),
    (re.compile(r"No module named '(?P<what>[\w.]+)'"), "its Python has no module {0}; the installation is not whole"),
    (re.compile(r"(?i)CUDA driver version is insufficient|no CUDA-capable device"),
     "the driver does not fit the container"),
)  # fmt: skip


def stage_of(line: str, reached: int) -> int:
    """Index of the next stage that a line shows to be reached, or `reached`; -1 is before the first."""
    for index in range(len(STAGES) - 1, reached, -1):
        if STAGES[index][1].search(line):
            return index
    return reached


def cause(lines: list[str], code: int) -> str:
    """Why a rank's build ended with `code` (negative: a signal), from the last lines of its log."""
    for line in reversed(lines):
        for pattern, text in _CAUSES:
            found = pattern.search(line)
            if found is not None:
                what = next((group for group in found.groups() if group), "")
                return text.format(what.strip())
    if code == -signal.SIGKILL:
        return "it was killed, mostly by the kernel for lack of host memory: build fewer ranks at once (--workers 1)"
    if code < 0:
        return f"it died of {signal.Signals(-code).name}"
    telling = [line.strip() for line in lines if not _NOISE.search(line)]
    return telling[-1][:300] if telling else f"it ended with {code} and said nothing"
