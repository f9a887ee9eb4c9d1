"""Models and directories of GGUF tests, and the llama.cpp process."""

import gzip
import json
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaTokenizer

from tests import tiny
from vila.core.vision_spec import VisionSpec
from vila.export.base import ExportOptions, write_export
from vila.export.source import open_source
from vila.model.loading import save_model
from vila.model.modeling import VilaForConditionalGeneration
from vila.model.processor import VilaProcessor
from vila.model.vision_sizes import num_projected_tokens

GOLDEN = Path(__file__).parents[1] / "golden"
CONSUMER = Path(__file__).with_name("llama_consumer.py")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@cache
def llama_tokenizer():
    """LLaMA's own vocabulary and merges."""
    files = json.loads(gzip.decompress((GOLDEN / "llama_tokenizer" / "tokenizer.json.gz").read_bytes()))
    vocab = {token: number for number, token in enumerate(files["vocab"])}
    merges = [tuple(pair.split(" ")) for pair in files["merges"]]
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=False, add_bos_token=True)


def seeing(tower, projector="mlp2x_gelu", select_layer=-2, side=56, seed=0):
    """A model with a 4-layer, 64-wide tower over 16 patches, whose images matter."""
    config = tiny.vila(tower=tower)[0].config
    vision = config.vision_config
    vision.hidden_size, vision.intermediate_size, vision.num_attention_heads = 64, 128, 4
    vision.image_size = side
    spec = VisionSpec(side, num_projected_tokens(projector, (side // 14) ** 2), MEAN, STD, "pad")
    config.vision_spec, config.projector_type, config.select_layer = spec.to_dict(), projector, select_layer
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VilaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in (*model.vision_tower.parameters(), *model.projector.parameters()):
                if parameter.dim() > 1:
                    parameter.mul_(4)
    return model, VilaProcessor(tiny.tokenizer(), vision_spec=spec.to_dict(), template="starter_qa")


def export(folder, model, processor, name="gguf-text", precision="f16", search=None):
    """The directory of an export of a model in memory."""
    save_model(model, processor, folder / "model")
    write_export(open_source(folder / "model", search=search), name, folder / "out", ExportOptions(precision))
    return folder / "out"


def llama_python():
    """The Python that has llama-cpp-python; skips the test where none is named."""
    found = os.environ.get("VILA_LLAMA_CPP_PYTHON", "")
    if not found:
        pytest.skip("VILA_LLAMA_CPP_PYTHON names no Python with llama-cpp-python (pip install llama-cpp-python)")
    return found


def ask_llama(**asked):
    """Return the output of `llama_consumer.py`."""
    words = {key: str(value) if isinstance(value, Path) else value for key, value in asked.items()}
    done = subprocess.run(
        [llama_python(), str(CONSUMER)],
        input=json.dumps(words),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
