"""Tokenization with several kinds of tokenizers; for LLaMA's, the sentencepiece library is the reference."""

import json
import re
import shutil

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from tests.chat.conftest import GOLDEN
from vila.chat.template import Span
from vila.chat.tokenize import SpanTokenizer, tokenize
from vila.core.types import Image

VICUNA = GOLDEN / "tokenizers" / "vicuna_v15_legacy_false"
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}
IMAGE = Image(b"image")


def token_ids(tokenizer, chunks, kind):
    spans = [part for chunk in chunks for part in (Span("", "media", media=IMAGE), Span(chunk, kind))][1:]
    return [-200 if i == tokenizer.image_token_id else i for i in tokenize(spans, tokenizer, lambda m: 1).ids]


class Reference:
    """The slow LLaMA tokenizer with legacy=False, built on the sentencepiece library.

    It adds BOS, splits at special tokens, and gives only the first piece of a text the dummy prefix.
    """

    def __init__(self, path):
        facts = path.read_bytes()
        self.prefixing = sentencepiece.SentencePieceProcessor(model_proto=facts)
        model = sentencepiece_model_pb2.ModelProto.FromString(facts)
        model.normalizer_spec.add_dummy_prefix = False
        self.plain = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self.unknown = len(self.plain.encode("<unk>"))

    def chunk(self, text, *, specials):
        pieces = re.split("(<unk>|<s>|</s>)", text) if specials else [text]
        ids = self.prefixing.encode(pieces[0]) if pieces[0] else []
        for piece in pieces[1:]:
            ids += [SPECIAL[piece]] if piece in SPECIAL else self.after_special(piece)
        return ids

    def after_special(self, text):
        # sentencepiece strips leading space of a text without prefix, hence the <unk> before it.
        return (
            self.plain.encode("<unk>" + text)[self.unknown :]
            if text.startswith((" ", "\u2581"))
            else self.plain.encode(text)
        )

    def ids(self, chunks, *, specials):
        out = [1]
        for place, chunk in enumerate(chunks):
            out += ([-200] if place else []) + self.chunk(chunk, specials=specials)
        return out


@pytest.fixture(scope="module")
def reference():
    return Reference(VICUNA / "tokenizer.model")


bits = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\t",
        "USER:",
        " ASSISTANT: ",
        "</s>",
        "<s>",
        "<unk>",
        "12",
        "3.5",
        "\N{GRINNING FACE}",
        "\u00fcber",
        "\u2581",
        "\u4e2d\u6587",
    ]
)
chunk_texts = st.lists(bits | st.text(max_size=6), max_size=8).map("".join)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(chunk_texts, min_size=1, max_size=4))
@example(["", " is", "\n", "</s>", "</s> a", " </s>", "\N{GRINNING FACE}"])
def test_template_text_is_tokenized_chunk_by_chunk_as_by_sentencepiece(vicuna, reference, chunks):
    assert token_ids(vicuna, chunks, "template") == reference.ids(chunks, specials=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(chunk_texts, min_size=1, max_size=4))
@example(["</s>", " <s>", "<unk>x"])
def test_content_is_tokenized_chunk_by_chunk_and_holds_no_special_token(vicuna, reference, chunks):
    assert token_ids(vicuna, chunks, "content") == reference.ids(chunks, specials=False)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(chunk_texts)
def test_the_offsets_of_a_text_cover_it_in_order(vicuna, text):
    _, offsets = vicuna.encode(text, True)
    assert all(0 <= a < b <= max(len(text), 1) for a, b in offsets)
    assert {place for a, b in offsets for place in range(a, b)} >= set(range(len(text)))


def vicuna_folder(folder, **changes):
    """tokenizer.model and its config with changes; None removes a key."""
    shutil.copy(VICUNA / "tokenizer.model", folder)
    facts = {**json.loads((VICUNA / "tokenizer_config.json").read_text()), **changes}
    facts = {key: value for key, value in facts.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


CHUNKS = ["A chat. USER: ", "\nWhat? ASSISTANT: a</s>USER:", " is"]


@pytest.mark.parametrize("legacy", [True, False, None])
def test_the_legacy_flag_changes_nothing(legacy, reference, tmp_path):
    # Upstream loads every LLaMA tokenizer with legacy=False, whatever its config says.
    tokenizer = SpanTokenizer(AutoTokenizer.from_pretrained(vicuna_folder(tmp_path, legacy=legacy)))
    assert token_ids(tokenizer, CHUNKS, "template") == reference.ids(CHUNKS, specials=True)


def test_bos_comes_only_from_a_tokenizer_that_adds_it(reference, tmp_path):
    tokenizer = SpanTokenizer(AutoTokenizer.from_pretrained(vicuna_folder(tmp_path, add_bos_token=False)))
    assert tokenizer.bos_ids == []
    assert token_ids(tokenizer, CHUNKS, "template") == reference.ids(CHUNKS, specials=True)[1:]


def test_an_eos_that_the_tokenizer_adds_is_dropped(reference, tmp_path):
    tokenizer = SpanTokenizer(AutoTokenizer.from_pretrained(vicuna_folder(tmp_path, add_eos_token=True)))
    assert tokenizer.bos_ids == [1]
    assert token_ids(tokenizer, CHUNKS, "template") == reference.ids(CHUNKS, specials=True)


def test_a_sentencepiece_model_and_a_saved_tokenizer_give_equal_ids(reference, tmp_path):
    shutil.copy(VICUNA / "tokenizer.model", tmp_path)
    lone = LlamaTokenizer.from_pretrained(tmp_path, legacy=False, add_bos_token=True)
    lone.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for tokenizer in (lone, saved):
        assert token_ids(SpanTokenizer(tokenizer), CHUNKS, "template") == reference.ids(CHUNKS, specials=True)


def test_a_dummy_prefix_of_a_normalizer_is_added_only_before_a_chunk(reference):
    # Older form of LLaMA's tokenizer.json: the normalizer prepends, also after every special token.
    backend = Tokenizer.from_str(AutoTokenizer.from_pretrained(VICUNA).backend_tokenizer.to_str())
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = SpanTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
    assert token_ids(tokenizer, CHUNKS, "template") == reference.ids(CHUNKS, specials=True)


def byte_level(bos):
    """A byte-level BPE as of Qwen2 or, with a BOS in its post-processor, of Llama 3."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<|end|>", "<|begin|>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|begin|>")


@pytest.mark.parametrize("bos", [True, False])
def test_byte_level_tokenizers_have_no_prefix_and_one_bos_at_most(bos):
    stock = byte_level(bos)
    tokenizer = SpanTokenizer(stock)
    assert tokenizer.bos_ids == ([1] if bos else [])
    chunks = ["Hi ", "\n\u00fcber<|end|>", " is"]
    expected = [*tokenizer.bos_ids]
    for place, chunk in enumerate(chunks):
        expected += ([-200] if place else []) + stock(chunk, add_special_tokens=False)["input_ids"]
    assert token_ids(tokenizer, chunks, "template") == expected


def test_two_bos_if_template_and_tokenizer_both_add_one():
    tokenizer = SpanTokenizer(byte_level(bos=True))
    ids = token_ids(tokenizer, ["<|begin|>a", "b"], "template")
    a, b = (tokenizer.encode(letter, False)[0][0] for letter in "ab")
    assert ids == [1, 1, a, -200, b]
