"""Incremental text: equal to decoding the whole, never half a character, stop strings found wherever they are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trtbuild.engines.serving.detokenizer import Decode, Detokenizer, StopMatcher, TextStream, decoder_of

TINY_MIXTRAL = Path(__file__).parents[2] / "checkpoints" / "tiny-mixtral"
TEXTS = [
    "Hello, world",
    " leading and  double spaces ",
    "你好，世界",
    "a😀👩‍👩‍👧b",
    "naïve café\n\n\ttab",
    "e\u0301 ไทย हिन्दी",
    "a , b . c 's",
    "\ufffd literal",
]


def byte_level() -> PreTrainedTokenizerFast:
    """All bytes, some merges that end inside a character, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space_e4, ni = "Ġä", "ä½"
    vocab = {token: index for index, token in enumerate([*alphabet, space_e4, ni, "ll", "Ġw"])}
    merges = [("Ġ", "ä"), ("ä", "½"), ("l", "l"), ("Ġ", "w")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece_like(decoder: decoders.Decoder | None = None) -> PreTrainedTokenizerFast:
    """Llama 2's scheme: pieces with a leading space mark, bytes for everything else."""
    pieces = [
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Hello",
        "▁world",
        "Hello",
        "a",
        "b",
        "▁a",
        "l",
        ",",
        "▁▁",
        ".",
    ]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece_like()
METASPACE = sentencepiece_like(decoders.Metaspace())
MIXTRAL = AutoTokenizer.from_pretrained(TINY_MIXTRAL)


def pieces_of(decode: Decode, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def byte_pieces(text: str) -> list[int]:
    # <s> and </s> come before the 256 byte tokens.
    return [2 + byte for byte in text.encode()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, MIXTRAL], ids=["byte-level", "tiny-mixtral"])
def test_joined_is_the_text_and_no_piece_has_half_a_character(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(decoder_of(tokenizer), ids)
    assert "".join(pieces) == text == tokenizer.decode(ids, skip_special_tokens=True)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("text", [t for t in TEXTS if "\ufffd" not in t])
def test_byte_fallback_shows_each_character_when_its_last_byte_is_there(text: str) -> None:
    ids = [SENTENCEPIECE.convert_tokens_to_ids("▁a"), *byte_pieces(text)]
    pieces = pieces_of(decoder_of(SENTENCEPIECE), ids)
    assert "".join(pieces) == SENTENCEPIECE.decode(ids) == "a" + text
    assert [piece for piece in pieces if piece] == ["a", *text]


@settings(deadline=None, max_examples=400)
@given(ids=st.lists(st.integers(0, len(BYTE_LEVEL) + 1), max_size=40))
def test_any_byte_level_ids_join_to_decode(ids: list[int]) -> None:
    assert "".join(pieces_of(decoder_of(BYTE_LEVEL), ids)) == BYTE_LEVEL.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("invalid", range(13))
def test_characters_behind_invalid_bytes_stay_whole(invalid: int) -> None:
    ids = BYTE_LEVEL.encode("\u00ff")[1:] * invalid + BYTE_LEVEL.encode("😀好")
    assert "".join(pieces_of(decoder_of(BYTE_LEVEL), ids)) == "\ufffd" * invalid + "😀好"


@settings(deadline=None, max_examples=400)
@given(ids=st.lists(st.sampled_from([0, 1, *range(258, 269), 99999]), max_size=25))
@pytest.mark.parametrize("tokenizer", [SENTENCEPIECE, METASPACE], ids=["strip", "metaspace"])
def test_any_sentencepiece_ids_join_to_decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> None:
    assert "".join(pieces_of(decoder_of(tokenizer), ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=200)
@given(parts=st.lists(st.sampled_from(["▁Hello", "▁world", "a", "你", "😀", "é", "</s>"]), max_size=20))
def test_words_and_byte_runs_mixed(parts: list[str]) -> None:
    ids = []
    for part in parts:
        known = SENTENCEPIECE.convert_tokens_to_ids(part)
        ids += [known] if known is not None else byte_pieces(part)
    assert "".join(pieces_of(decoder_of(SENTENCEPIECE), ids)) == SENTENCEPIECE.decode(ids, skip_special_tokens=True)


def test_bad_byte_in_a_run_keeps_the_characters_before_it() -> None:
    ids = [*byte_pieces("你好"), 2 + 0xFF, SENTENCEPIECE.convert_tokens_to_ids("a")]
    assert SENTENCEPIECE.decode(ids) == "\ufffd" * 7 + "a"
    assert "".join(pieces_of(decoder_of(SENTENCEPIECE), ids)) == "你好\ufffda"


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([BYTE_LEVEL.convert_tokens_to_ids("</s>")] * 3000, id="special"),
        pytest.param([BYTE_LEVEL.convert_tokens_to_ids("l")] * 3000, id="letters"),
        pytest.param(BYTE_LEVEL.encode("\u00ff")[:1] * 3000, id="never-a-character"),
        pytest.param([100_000] * 3000, id="unknown"),
    ],
)
def test_cost_per_token_is_constant(ids: list[int]) -> None:
    decode = decoder_of(BYTE_LEVEL)
    work: list[int] = []

    def counting(window: list[int]) -> str:
        work.append(len(window))
        return decode(window)

    text = "".join(pieces_of(counting, ids))  # type: ignore[arg-type]
    assert text == decode(ids)
    assert sum(work) < 60 * len(ids), "tokens decoded per token of output"


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_stop_does_not_depend_on_how_the_text_is_cut(text: str, stop: list[str], cuts: list[int]) -> None:
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = (text[: min(ends)[1]], True) if ends else (text, False)
    matcher, shown, stopped = StopMatcher(stop), "", False
    rest = text
    for size in cuts:
        piece, stopped = matcher.push(rest[:size])
        shown, rest = shown + piece, rest[size:]
        if stopped or not rest:
            break
    assert (shown if stopped else shown + matcher.finish(), stopped) == expected


def test_only_a_possible_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["</end>", "STOP"])
    assert [matcher.push(piece) for piece in ("ab<", "/e", "x S", "TO", "PS")] == [
        ("ab", False),
        ("", False),
        ("</ex ", False),
        ("", False),
        ("", True),
    ]


def test_stream_honours_min_tokens_and_flushes_what_it_held() -> None:
    decode = decoder_of(BYTE_LEVEL)
    ids = BYTE_LEVEL.encode("xyxyx")
    stream = TextStream(decode, ["xy"], min_tokens=2)
    assert [stream.push(i) for i in ids[:4]] == [("x", False), ("y", False), ("", False), ("", True)]
    held = TextStream(decode, ["xyz"])
    assert [held.push(i)[0] for i in ids[:2]] == ["", ""]
    assert held.finish() == ("xy", False)
    cut = TextStream(decode)
    assert [cut.push(i)[0] for i in BYTE_LEVEL.encode("😀")[:2]] == ["", ""]
    assert cut.finish() == ("\ufffd", False)
