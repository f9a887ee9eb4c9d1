"""Text token by token is the text of the whole, and what is settled never changes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.engine.fixtures import sentencepiece
from vila.chat.detokenize import Detokenizer, TextStream, decoder_of, detokenizer_of

TOKENIZERS = {"byte-level": tiny.tokenizer, "sentencepiece": sentencepiece}


def grow(detokenizer, ids):
    """Settled text after each token; at each, settled and unsettled are the text of all tokens so far."""
    stream = TextStream(detokenizer)
    settled = []
    for count, token in enumerate(ids, start=1):
        stream.take(token)
        assert stream.settled + stream.unsettled == detokenizer.decode(ids[:count])
        settled.append(stream.settled)
    return settled


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tokens_settle_to_the_text_of_the_whole(name, data):
    tokenizer = TOKENIZERS[name]()
    # Byte tokens and special ones are as frequent as all others together; the last id is past the vocabulary.
    common = st.integers(0, len(tokenizer) + 1) | st.integers(0, 258)
    ids = data.draw(st.lists(common, max_size=25))
    whole = detokenizer_of(tokenizer).decode(ids)
    for settled in grow(detokenizer_of(tokenizer), ids):
        assert whole.startswith(settled)


TEXTS = [
    "plain words, and more.",
    "(  two spaces inside",
    "\n\nlines\nand  two  spaces ",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 between",
    "na\u00efve \u00e9t\u00e9 \u4f60\u597d\uff0c\u4e16\u754c \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "a replacement character \ufffd in the text",
    "do n't clean , up .",
]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_real_text_comes_out_as_it_went_in_and_without_half_characters(name, text):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    settled = grow(detokenizer_of(tokenizer), ids)
    assert detokenizer_of(tokenizer).decode(ids) == text
    assert all(text.startswith(part) for part in settled)


def test_an_emoji_of_several_byte_tokens_appears_whole_with_its_last_byte():
    tokenizer = sentencepiece()
    ids = tokenizer("hello \U0001f600 world", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[4:8]) == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    settled = grow(detokenizer_of(tokenizer), ids)
    assert settled[2:9] == ["hello", *["hello "] * 4, "hello \U0001f600", "hello \U0001f600 w"]


def test_bytes_that_are_no_character_do_not_spoil_those_before_and_after():
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["<0x61>", "<0xF0>", "<0xC3>", "<0xA9>", "\u2581he"])
    assert detokenizer_of(tokenizer).decode(ids) == "a\ufffd\u00e9 he"
    assert grow(detokenizer_of(tokenizer), ids) == ["a", "a", "a", "a\ufffd\u00e9", "a\ufffd\u00e9 he"]


def test_byte_runs_decode_as_sentencepiece_decodes_them():
    tokenizer = sentencepiece()
    original = SentencePieceProcessor(model_file=tokenizer.vocab_file)
    draw = random.Random(0)
    # Bytes of characters of every length, of surrogates and of overlong forms, and other tokens between them.
    common = [byte + 3 for byte in b"\xe2\x96\x81\xf0\x9f\x98\x80\xc3\xa9\xed\xa0\xc0\xffa\n"]
    for _ in range(1000):
        ids = [draw.choice([*common, draw.randrange(3, 259), draw.randrange(259, 1200)]) for _ in range(8)]
        if ids[0] != ord(" ") + 3:  # the decoder strips that one as the dummy prefix
            assert decoder_of(tokenizer)(ids) == original.decode(ids)
            grow(detokenizer_of(tokenizer), ids)


def test_byte_runs_that_are_valid_decode_as_the_tokenizer_decodes_them():
    tokenizer = sentencepiece()
    draw = random.Random(1)
    for _ in range(200):
        text = "".join(draw.choice("a \u00e9\u2581\u4f60\U0001f600\ufffd\n") for _ in range(6))
        ids = [byte + 3 for byte in text.encode()] + tokenizer.convert_tokens_to_ids(["\u2581he"])
        assert decoder_of(tokenizer)(ids) == tokenizer.decode(ids)


def test_special_tokens_are_kept_where_they_are_asked_for():
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["<0xF0>", "</s>", "<0x61>"])
    assert decoder_of(tokenizer)(ids) == "\ufffda"
    assert decoder_of(tokenizer, skip_special_tokens=False)(ids) == "\ufffd</s>a"


def test_the_space_of_the_first_token_is_lost_and_that_of_later_ones_is_not():
    tokenizer = sentencepiece()
    word, space = tokenizer.convert_tokens_to_ids(["\u2581he", "\u2581"])
    assert grow(detokenizer_of(tokenizer), [word, word, space, word])[-1] == "he he  he"
    assert grow(detokenizer_of(tokenizer), [space, word])[-1] == " he"
    for nothing in (2, len(tokenizer) + 5):  # a special token, and an id past the vocabulary
        assert grow(detokenizer_of(tokenizer), [nothing, word, nothing, word])[-1] == "he he"


def test_spaces_that_the_model_wrote_before_punctuation_stay():
    backend = Tokenizer(models.WordLevel({"well": 0, ",": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    assert detokenizer_of(tokenizer).decode([0, 1]) == "well ,"


def test_a_long_answer_is_decoded_once_not_once_a_token():
    letters = random.Random(0).choices("abcdef ", k=2000)
    decoded = 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return "".join(letters[i] for i in ids)

    assert grow_silently(Detokenizer(decode, lambda token: True), range(2000)) == "".join(letters)
    assert decoded <= 3 * 2000


def grow_silently(detokenizer, ids):
    stream = TextStream(detokenizer)
    for token in ids:
        stream.take(token)
    return stream.settled
