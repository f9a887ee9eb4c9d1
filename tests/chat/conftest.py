"""Tokenizers for the tests of this folder."""

import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaTokenizer

from vila.chat.tokenize import SpanTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def vicuna():
    """A 1,200-piece SentencePiece BPE with Vicuna's properties, from only a tokenizer.model and its config."""
    return SpanTokenizer(AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / "vicuna_v15_legacy_false"))


@pytest.fixture(scope="session")
def llama3():
    """A byte-level BPE with Llama-3's special tokens that adds no BOS."""
    return SpanTokenizer(AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / "llama3_bytelevel_nobos"))


@pytest.fixture(scope="session")
def llama_files():
    """LLaMA's vocabulary and merges."""
    return json.loads(gzip.decompress((GOLDEN / "llama_tokenizer" / "tokenizer.json.gz").read_bytes()))


@pytest.fixture(scope="session")
def stock_llama(llama_files):
    """LLaMA's tokenizer as transformers builds it, with `<image>` as a special token of its own."""
    vocab = {token: number for number, token in enumerate(llama_files["vocab"])}
    merges = [tuple(pair.split(" ")) for pair in llama_files["merges"]]
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=False, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.fixture(scope="session")
def llama(stock_llama):
    """The same tokenizer as a `SpanTokenizer`."""
    return SpanTokenizer(stock_llama)


@pytest.fixture(scope="session")
def bytewise():
    """One id per byte, special tokens of ChatML, no BOS."""
    from tests import tiny

    return SpanTokenizer(tiny.tokenizer())
