#!/usr/bin/env bash
# The main job on the bundled model: a Mixtral checkpoint becomes FP8 and INT4 TensorRT engines, sharded over two ranks,
# on any x86-64 Linux machine, answers, and is packaged for Triton, which must answer as it does. Engines land in
# engines/, the Triton model repository in triton_repo/models/.
set -euo pipefail
cd "$(dirname "$0")"
trtbuild=.venv/bin/trtbuild

say() { printf '\n$ trtbuild'; printf ' %q' "$@"; printf '\n'; "$trtbuild" "$@"; }

say compile tiny-mixtral --tp 2 --moe-ep 2 --precision fp8
say compile tiny-mixtral --tp 2 --precision int4
say generate tiny-mixtral-fp8-tp2-ep2 "ROMEO" --max-tokens 40
say generate tiny-mixtral-int4-tp2 "What news from the king" --chat --max-tokens 40
say package tiny-mixtral-fp8-tp2-ep2
