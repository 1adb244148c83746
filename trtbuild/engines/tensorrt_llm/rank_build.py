"""trtllm-build for one rank: `python -m trtbuild.engines.tensorrt_llm.rank_build RANK FLAGS...`.

trtllm-build has no flag for it: it builds all ranks of a checkpoint, and of a killed build nobody can tell what it had
finished. So its own `main` runs here, with `parallel_build` (tensorrt_llm/commands/build.py) held to one rank on the
first visible GPU. The flags are trtllm-build's.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from trtbuild.ends_with_parent import end_with_parent


def build_rank(rank: int) -> None:
    """Run trtllm-build's main for the command line's flags."""
    import tensorrt_llm.commands.build as command  # pyright: ignore[reportMissingImports]

    missing = [name for name in ("main", "parallel_build", "build_and_save") if not hasattr(command, name)]
    if missing:
        sys.exit(
            f"tensorrt_llm.commands.build has no {', '.join(missing)}: this release of TensorRT-LLM is not 1.0 to 1.2"
        )

    def one_rank(
        model_config: Any,
        ckpt_dir: str | None,
        build_config: Any,
        output_dir: str,
        workers: int = 1,
        log_level: str = "info",
        model_cls: Any = None,
        **kwargs: Any,
    ) -> None:
        built = command.build_and_save(
            rank, 0, ckpt_dir, build_config, output_dir, log_level, model_config, model_cls, **kwargs
        )
        if not built:
            sys.exit(f"rank {rank} was not built")

    command.parallel_build = one_rank
    command.main()


def main() -> None:
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal():
        sys.exit("usage: python -m trtbuild.engines.tensorrt_llm.rank_build RANK FLAGS-OF-TRTLLM-BUILD")
    # Nobody waits for an engine whose trtbuild was killed, and the next one builds in the same place.
    end_with_parent(signal.SIGKILL, os.getppid())
    rank = int(sys.argv.pop(1))
    sys.argv[0] = "trtllm-build"
    build_rank(rank)


if __name__ == "__main__":
    main()
