"""Texts of tokens that come piece by piece, and chat templates, in the files that are copied into a repository."""

from __future__ import annotations

import importlib.util
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trtllm_engine import TINY_MIXTRAL

from trtbuild.triton_repo.tensorrt_llm.repository import MODEL_SOURCES

TEXTS = ("naïve café — 東京都 🌍🚀 done", "a\u0301b  two  spaces\n\n数学", "👩‍👩‍👧 family", "plain words only")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of the repository, outside of Triton."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))

    def loaded(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, MODEL_SOURCES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


def byte_level() -> Tokenizer:
    """Every byte a token."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As sentencepiece's of Llama 2: words with their space in front, bytes for all else."""
    words = ["▁", "▁plain", "▁words", "▁only", "▁done", "▁two", "▁spaces", "▁family", *"abcdefnlopstw"]
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocab |= {word: len(vocab) + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.Unigram([(w, -1.0) for w in vocab], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte level", "byte fallback"])
def test_pieces_are_whole_characters_and_make_the_text(tokenizer: Tokenizer, load: Any) -> None:
    shared = load("trtllm_text")
    chance = random.Random(5)
    for text in TEXTS * 5:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        stream, pieces = shared.TextStream(shared.decoder_of(tokenizer, True)), []
        while ids:
            count = chance.randint(1, 3)
            pieces.append(stream.push(ids[:count]))
            ids = ids[count:]
        pieces.append(stream.finish())
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_do_not_hold_up_what_follows(load: Any) -> None:
    shared, tokenizer = load("trtllm_text"), byte_level()
    bad = tokenizer.encode("語", add_special_tokens=False).ids[:1]
    ids = bad * 12 + tokenizer.encode("and on", add_special_tokens=False).ids
    stream = shared.TextStream(shared.decoder_of(tokenizer, True))
    shown = stream.push(ids) + stream.finish()
    assert shown == tokenizer.decode(ids)
    assert shown.endswith("and on")


def test_special_tokens_are_shown_only_where_asked(load: Any) -> None:
    shared = load("trtllm_text")
    tokenizer = shared.load_tokenizer(str(TINY_MIXTRAL))
    ids = [1, *tokenizer.encode("ROMEO", add_special_tokens=False).ids, 2]
    for skip, expected in ((True, "ROMEO"), (False, "<s>ROMEO</s>")):
        stream = shared.TextStream(shared.decoder_of(tokenizer, skip))
        assert "".join(stream.push([one]) for one in ids) + stream.finish() == expected


MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "true"'},
    {"role": "user", "content": "What news"},
    {"role": "assistant", "content": "None"},
    {"role": "user", "content": "And now?"},
]
TEMPLATES = {
    "blocks": "{% for m in messages %}\n  {%- if m.role == 'user' %}\n[U] {{ m.content | trim }}\n  {% else %}\n"
    "({{ m['role'] }}) {{ m.content }}\n  {% endif %}\n{% endfor %}\n{{ bos_token }}{{ eos_token }}",
    "json": "{{ messages | tojson }}{% if tools is not none %}tools{% endif %}{{ messages | tojson(indent=2) }}",
    "loop": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}",
}


@pytest.mark.parametrize("name", ["own", *TEMPLATES])
def test_chat_templates_are_rendered_as_transformers_does(name: str, load: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for file in TINY_MIXTRAL.glob("*token*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if name != "own":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    load("trtllm_text")
    found = load("trtllm_chat").ChatTemplate(str(tmp_path)).render(MESSAGES)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert found == tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert found


def test_a_template_that_rejects_messages(load: Any, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    shared = load("trtllm_text")
    template = load("trtllm_chat").ChatTemplate(str(tmp_path))
    with pytest.raises(shared.RequestError, match="rejects these messages: roles must alternate"):
        template.render(MESSAGES)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load("trtllm_chat").ChatTemplate(str(tmp_path))
