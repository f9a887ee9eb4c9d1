"""Tokenizer metadata of GGUF files."""

import itertools
import json

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tests import tiny
from tests.export.gguf_fixtures import GOLDEN, export, llama_tokenizer
from tests.export.readers.gguf_file import read_gguf
from vila.chat.jinja import chat_template
from vila.chat.templates import find_template
from vila.core.errors import LayoutError
from vila.export.gguf_llm import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    build_vocabulary,
    tokenizer_problems,
)
from vila.model.processor import VilaProcessor

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|")


def byte_level(cut, normalizer=None):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*letters, "<|end|>", "th", "the"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = cut
    if normalizer:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", extra_special_tokens=["<|turn|>"])


def processor_of(tokenizer, template=""):
    spec = tiny.vila()[1].vision_spec
    return VilaProcessor(tokenizer, vision_spec=spec, template=template)


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        (GPT2, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), "smollm"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), PLAIN]), "qwen2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), PLAIN]), "llama-bpe"),
    ],
)
def test_the_pre_tokenizer_is_recognised(cut, name):
    vocabulary = build_vocabulary(processor_of(byte_level(cut)), 300)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", name)


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT2])),
        byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), "isolated"), PLAIN])),
        byte_level(PLAIN),
        byte_level(GPT2, normalizers.Lowercase()),
    ],
)
def test_other_pre_tokenizers_are_not_supported(tokenizer):
    assert len(tokenizer_problems(tokenizer)) == 1
    with pytest.raises(LayoutError) as caught:
        build_vocabulary(processor_of(tokenizer), 300)
    assert caught.value.field == "tokenizer"


def test_a_word_piece_tokenizer_is_not_supported():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    assert "WordPiece" in tokenizer_problems(PreTrainedTokenizerFast(tokenizer_object=backend))[0]


def test_rows_without_a_token_are_unused_and_tokens_without_a_row_are_dropped():
    tokenizer = byte_level(GPT2)  # 256 letters, <|end|>, th, the, <|turn|>
    tokenizer.add_tokens(["plain"])
    wide = build_vocabulary(processor_of(tokenizer), 264)
    assert wide.tokens[256:] == ["<|end|>", "th", "the", "<|turn|>", "plain", "[PAD261]", "[PAD262]", "[PAD263]"]
    assert wide.types[256:] == [CONTROL, NORMAL, NORMAL, CONTROL, USER_DEFINED, UNUSED, UNUSED, UNUSED]
    assert wide.merges == ["t h", "th e"]
    narrow = build_vocabulary(processor_of(tokenizer), 259)
    assert narrow.tokens[-1] == "the" and len(narrow.types) == 259


def test_the_end_of_turn_token_is_set():
    tokenizer = byte_level(GPT2)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "extra_special_tokens": ["<|im_end|>"]})
    vocabulary = build_vocabulary(processor_of(tokenizer, "chatml"), 300)
    named = {name: vocabulary.tokens[number] for name, number in vocabulary.special.items()}
    assert named == {"bos": "<|begin|>", "eos": "<|end|>", "eot": "<|im_end|>"}
    assert not vocabulary.add_bos


def test_the_tokenizer_of_llama_3_is_recognised():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / "llama3_bytelevel_nobos")
    vocabulary = build_vocabulary(processor_of(tokenizer, "llama_3"), len(tokenizer))
    assert vocabulary.pre == "llama-bpe"
    assert "eot" not in vocabulary.special  # VILA ends its turns with the end of text
    assert vocabulary.tokens[vocabulary.special["eos"]] == "<|end_of_text|>"


def test_sentencepiece_tokens_have_types_and_scores_in_the_order_of_merges():
    vocabulary = build_vocabulary(processor_of(llama_tokenizer(), "vicuna_v1"), 32000)
    assert (vocabulary.model, vocabulary.pre) == ("llama", "default")
    assert vocabulary.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert vocabulary.types[258:260] == [BYTE, NORMAL]
    assert vocabulary.tokens[259:262] == ["\u2581\u2581", "\u2581t", "er"]
    # Of two pieces the one that merges make earlier has the higher score.
    merges = json.loads(llama_tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    first = dict(reversed([("".join(pair), rank) for rank, pair in enumerate(merges)]))
    ranked = sorted(first, key=first.__getitem__)
    place = {token: number for number, token in enumerate(vocabulary.tokens)}
    scores = [vocabulary.scores[place[token]] for token in ranked]
    assert len(scores) > 29000 and all(one > two for one, two in itertools.pairwise(scores))
    assert vocabulary.add_bos and vocabulary.add_space_prefix
    assert vocabulary.special == {"bos": 1, "eos": 2, "unk": 0} | (
        {"pad": llama_tokenizer().pad_token_id} if llama_tokenizer().pad_token_id is not None else {}
    )


def test_the_file_has_tokenizer_and_template(tmp_path):
    model, processor = tiny.vila(template="vicuna_v1")
    facts = read_gguf(export(tmp_path, model, processor) / "model-f16.gguf").metadata
    vocab = sorted(tiny.tokenizer().get_vocab().items(), key=lambda item: item[1])
    assert facts["tokenizer.ggml.tokens"] == [token for token, _ in vocab]
    assert facts["tokenizer.ggml.token_type"][:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    assert facts["tokenizer.ggml.merges"] == ["! !"]  # it has none, and llama.cpp wants one
    assert "tokenizer.ggml.scores" not in facts
    assert facts["tokenizer.ggml.eos_token_id"] == 2 and facts["tokenizer.ggml.padding_token_id"] == 0
    assert facts["tokenizer.ggml.add_bos_token"] is False and facts["tokenizer.ggml.add_space_prefix"] is False
    assert facts["tokenizer.chat_template"] == chat_template(find_template("vicuna_v1"))
    assert json.dumps(facts["tokenizer.ggml.tokens"])
