"""What preprocessing, postprocessing and the BLS share: the tokenizer, texts of token ids, parameters and errors.

`trtbuild package` copies this file beside each model.py. It needs numpy and tokenizers; nothing of trtbuild.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\ufffd"
# A character is at most four byte tokens; what still looks unfinished after this many is invalid, not unfinished.
MAX_PENDING = 8


class RequestError(ValueError):
    """A request that cannot be served; its message is for the client."""


class Parameters:
    """The parameters of a model's config.pbtxt; `ValueError` names the one that is missing or not what it should be."""

    def __init__(self, args: dict[str, str]) -> None:
        found = json.loads(args["model_config"]).get("parameters", {})
        self._values = {name: value.get("string_value", "") for name, value in found.items()}
        self._name = args["model_name"]
        # Paths that are not absolute start here, so that a repository can be moved.
        self._directory = os.path.join(args["model_repository"], args["model_version"])  # noqa: PTH118

    def text(self, name: str) -> str:
        value = self._values.get(name, "")
        if not value or "${" in value:
            raise ValueError(f"config.pbtxt of {self._name}: parameter {name} is {value or 'missing'!r}; fill it in")
        return value

    def path(self, name: str) -> str:
        return os.path.join(self._directory, self.text(name))  # noqa: PTH118

    def flag(self, name: str) -> bool:
        value = self.text(name).lower()
        if value not in ("true", "false"):
            raise ValueError(f"config.pbtxt of {self._name}: parameter {name} is {value!r}; it is true or false")
        return value == "true"

    def integer(self, name: str) -> int:
        value = self.text(name)
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"config.pbtxt of {self._name}: parameter {name} is {value!r}; a whole number") from None

    def integers(self, name: str) -> list[int]:
        """A list with commas; an empty one may be missing."""
        if not self._values.get(name):
            return []
        try:
            return [int(part) for part in self.text(name).split(",")]
        except ValueError:
            raise ValueError(f"config.pbtxt of {self._name}: parameter {name}: whole numbers with commas") from None


def load_tokenizer(directory: str) -> Any:
    """The Rust tokenizer of tokenizer.json, without truncation and padding."""
    from tokenizers import Tokenizer

    file = os.path.join(directory, "tokenizer.json")  # noqa: PTH118
    if not os.path.isfile(file):  # noqa: PTH113
        raise ValueError(
            f"no {file}; package the engine again, or give parameter tokenizer_dir a directory that has it"
        )
    tokenizer = Tokenizer.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def decoder_of(tokenizer: Any, skip_special_tokens: bool) -> Decode:
    """`decode(ids) -> str`; ids that the tokenizer does not have are left out."""
    return lambda ids: tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=skip_special_tokens)


class TextStream:
    """Text of tokens that come piece by piece, in whole characters; the pieces joined are `decode(all ids)`.

    A short window of the newest tokens is decoded with and without those that are new, and the difference is the new
    text: characters can span tokens, and a sentencepiece decoder drops the space of what it thinks is the beginning.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._context: list[int] = []
        """Newest tokens whose text is out."""
        self._pending: list[int] = []
        """Tokens behind them whose text is not."""

    @property
    def is_pending(self) -> bool:
        return bool(self._pending)

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain now, given more tokens; often empty."""
        return "".join(self._push_one(int(token_id)) for token_id in ids)

    def finish(self) -> str:
        """Whatever is left, half a character included (as U+FFFD)."""
        return self._show(len(self._pending)) if self._pending else ""

    def _push_one(self, token_id: int) -> str:
        if not self._decode([token_id, token_id]):
            # Invisible: a special token. Twice, since a sentencepiece decoder hides a single leading space.
            return ""
        self._pending.append(token_id)
        if not self._decode([*self._context, *self._pending]).endswith(_REPLACEMENT):
            return self._show(len(self._pending))
        return self._show(self._safe_cut()) if len(self._pending) > MAX_PENDING else ""

    def _safe_cut(self) -> int:
        """Some pending bytes are invalid: how many tokens can be shown without cutting a character."""
        for cut in range(len(self._pending) - 1, 0, -1):
            left, right = self._decode(self._pending[:cut]), self._decode(self._pending[cut:])
            if right and left + right == self._decode(self._pending):
                return cut
        return len(self._pending)

    def _show(self, count: int) -> str:
        shown, self._pending = self._pending[:count], self._pending[count:]
        before, text = self._decode(self._context), self._decode([*self._context, *shown])
        if not text.startswith(before):
            # A bad byte made the decoder take back text that is out: decode the new tokens alone.
            before, text = "", self._decode(shown)
        self._context = shown
        return text[len(before) :]


def error_response(error: Exception) -> Any:
    """INVALID_ARG for what a client can mend, INTERNAL for the rest."""
    code = "INVALID_ARG" if isinstance(error, RequestError) else "INTERNAL"
    # Triton puts TritonError into its module only after this file was imported.
    return pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, code)))


def input_of(request: Any, name: str) -> Any:
    """An input as an array, or None where the request has none."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def text_of(value: Any, name: str) -> str:
    """A string of a tensor."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 at byte {error.start}") from error
