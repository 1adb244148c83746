"""Triton model `preprocessing`: text to the token ids that TensorRT-LLM's backend takes.

Everything that depends on the tokenizer only (end tokens, vocabulary, limits) is in the parameters of config.pbtxt;
a request costs its own tokens and no more.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from trtllm_text import Parameters, RequestError, error_response, input_of, load_tokenizer, text_of

# Encoded before a word, and taken off again, to see the word as it is cut inside a text.
_NEWLINE = "\n"


class TritonPythonModel:
    """See Triton's Python backend for the methods."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = Parameters(args)
        directory = parameters.path("tokenizer_dir")
        self._tokenizer = load_tokenizer(directory)
        self._add_special_tokens = parameters.flag("add_special_tokens")
        self._render = _renderer(parameters.text("chat_template"), directory)
        self._end_id, self._pad_id = parameters.integer("end_id"), parameters.integer("pad_id")
        self._more_end_ids = parameters.integers("more_end_ids")
        self._vocab_size = parameters.integer("vocab_size")
        self._max_input_len = parameters.integer("max_input_len")
        config = json.loads(args["model_config"])
        self._has_prompt_table = any(output["name"] == "OUT_PROMPT_TABLE_EXTRA_IDS" for output in config["output"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            outputs = self._outputs(request)
        except (RequestError, ValueError) as error:
            return error_response(error)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])

    def _outputs(self, request: Any) -> dict[str, Any]:
        """Arrays by name, the batch first."""
        prompts = [self._encode(text_of(row[0], "QUERY")) for row in input_of(request, "QUERY").reshape(-1, 1)]
        batch = len(prompts)
        lengths = [[len(prompt)] for prompt in prompts]
        end_id, pad_id = input_of(request, "END_ID"), input_of(request, "PAD_ID")
        # A client's end token takes the place of all that the model has.
        more = self._more_end_ids if end_id is None else []
        output_len = input_of(request, "REQUEST_OUTPUT_LEN").reshape(batch, -1)
        if (output_len < 1).any():
            raise RequestError(f"REQUEST_OUTPUT_LEN (max_tokens) is {output_len.min()}, must be at least 1")
        outputs = {
            "INPUT_ID": _padded(prompts, self._pad_id),
            "REQUEST_INPUT_LEN": np.array(lengths, np.int32),
            "BAD_WORDS_IDS": self._word_lists(input_of(request, "BAD_WORDS_DICT"), "BAD_WORDS_DICT", batch, []),
            "STOP_WORDS_IDS": self._word_lists(input_of(request, "STOP_WORDS_DICT"), "STOP_WORDS_DICT", batch, more),
            "EMBEDDING_BIAS": self._bias(request, batch),
            "REQUEST_OUTPUT_LEN": output_len.astype(np.int32),
            "OUT_END_ID": np.full([batch, 1], self._end_id, np.int32) if end_id is None else end_id.astype(np.int32),
            "OUT_PAD_ID": np.full([batch, 1], self._pad_id, np.int32) if pad_id is None else pad_id.astype(np.int32),
        }
        if self._has_prompt_table:
            outputs["OUT_PROMPT_TABLE_EXTRA_IDS"] = self._extra_ids(request, outputs["INPUT_ID"])
        return outputs

    def _encode(self, text: str) -> list[int]:
        if self._render is None:
            ids = self._tokenizer.encode(text, add_special_tokens=self._add_special_tokens).ids
        else:
            # The template writes the special tokens itself.
            ids = self._tokenizer.encode(self._render(text), add_special_tokens=False).ids
        if not ids:
            raise RequestError("QUERY (text_input) is empty, and this tokenizer adds no token of its own")
        if len(ids) > self._max_input_len:
            raise RequestError(
                f"QUERY (text_input) has {len(ids)} tokens; the engine takes {self._max_input_len} (max_input_len): "
                "shorten it, or build the engine with a larger --max-input-len"
            )
        return ids

    def _word_lists(self, words: Any, name: str, batch: int, more_ids: list[int]) -> Any:
        """[batch, 2, n]: ids of all words one behind the other, and where each ends; padded with 0 and with -1."""
        rows = [[[token_id] for token_id in more_ids] for _ in range(batch)]
        if words is not None:
            for row, given in zip(rows, words.reshape(batch, -1), strict=True):
                for word in given:
                    row += [ids for ids in self._word_forms(text_of(word, name)) if ids not in row]
        lists = np.zeros([batch, 2, max(sum(map(len, row)) for row in rows)], np.int32)
        lists[:, 1] = -1
        for index, row in enumerate(rows):
            flat = [token_id for ids in row for token_id in ids]
            lists[index, 0, : len(flat)] = flat
            lists[index, 1, : len(row)] = np.cumsum([len(ids) for ids in row])
        return lists

    def _word_forms(self, word: str) -> list[list[int]]:
        """How the word is cut alone, behind a space, and in the middle of a text; without those that are the same."""
        if not word:
            return []
        forms = [self._ids(word), self._ids(f" {word}")]
        newline, behind = self._ids(_NEWLINE), self._ids(_NEWLINE + word)
        if behind[: len(newline)] == newline:
            forms.append(behind[len(newline) :])
        return [ids for index, ids in enumerate(forms) if ids and ids not in forms[:index]]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _bias(self, request: Any, batch: int) -> Any:
        """[batch, vocabulary], or [batch, 0] where no word has a bias."""
        words, weights = input_of(request, "EMBEDDING_BIAS_WORDS"), input_of(request, "EMBEDDING_BIAS_WEIGHTS")
        if words is None and weights is None:
            return np.zeros([batch, 0], np.float32)
        if words is None or weights is None or words.size != weights.size:
            raise RequestError("EMBEDDING_BIAS_WORDS and EMBEDDING_BIAS_WEIGHTS must come together, one for each other")
        bias = np.zeros([batch, self._vocab_size], np.float32)
        for index, (row, values) in enumerate(zip(words.reshape(batch, -1), weights.reshape(batch, -1), strict=True)):
            for word, weight in zip(row, values, strict=True):
                ids = self._ids(text_of(word, "EMBEDDING_BIAS_WORDS"))
                bias[index, [token_id for token_id in ids if token_id < self._vocab_size]] += weight
        return bias

    def _extra_ids(self, request: Any, input_ids: Any) -> Any:
        """Tells rows of different prompt tables apart in reused KV caches; [batch, 0] without an id."""
        extra = input_of(request, "PROMPT_TABLE_EXTRA_ID")
        if extra is None:
            return np.zeros([len(input_ids), 0], np.uint64)
        return np.where(input_ids >= self._vocab_size, extra.reshape(-1, 1), 0).astype(np.uint64)


def _padded(rows: list[list[int]], value: int) -> Any:
    array = np.full([len(rows), max(map(len, rows))], value, np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array


def _renderer(mode: str, directory: str) -> Any:
    """None, or what makes the prompt of QUERY: the words of a user, or messages in JSON."""
    if mode == "off":
        return None
    if mode not in ("user", "messages"):
        raise ValueError(f"config.pbtxt: parameter chat_template is {mode!r}; it is off, user or messages")
    # For nothing else is jinja2 needed.
    from trtllm_chat import ChatTemplate

    template = ChatTemplate(directory)
    if mode == "user":
        return lambda text: template.render([{"role": "user", "content": text}])
    return lambda text: template.render(_messages(text))


def _messages(text: str) -> Any:
    try:
        messages = json.loads(text)
    except ValueError as error:
        raise RequestError(f"QUERY (text_input) must be messages in JSON here: {error}") from error
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise RequestError('QUERY (text_input) must be messages: [{"role": "user", "content": "..."}]')
    return messages
