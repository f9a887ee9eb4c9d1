"""Operations are counted as PyTorch counts them when it runs the real model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode

from tests import tiny
from vila.core.errors import ConfigError
from vila.model.modeling import segment_mask
from vila.plan.devices import find_device, parse_machine, peak_tflops
from vila.plan.flops import Learning, causal_pairs, step_flops
from vila.plan.model_shape import shape_of
from vila.train.parameter_groups import select_trainable

ROWS, LENGTH = 2, 24


def counted(learning: Learning, family: str = "llama", tower: str = "clip") -> tuple[int, float]:
    """Operations of forward and backward pass: as PyTorch saw them, and as we count them."""
    model, _ = tiny.vila(family, tower=tower, tie_word_embeddings=False)
    shape = shape_of(model.config)
    adapters = None
    if learning.rank:
        names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        lora = LoraConfig(r=learning.rank, target_modules=list(learning.targets) or names)
        inject_adapter_in_model(lora, model.language_model)
        adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    tune = [name for name in ("vision", "projector", "llm") if getattr(learning, name)]
    select_trainable(model, tune, tune_embeddings=learning.embeddings, llm_parts=learning.parts, adapters=adapters)
    for part in (model.config, model.language_model.config, model.vision_tower.config):
        part._attn_implementation = "eager"  # its products are plain ones
    ids = torch.randint(3, 200, (ROWS, LENGTH))
    ids[:, 2 : 2 + shape.media_tokens] = model.config.image_token_id
    with FlopCounterMode(display=False) as seen:
        features = model.vision_features(torch.randn(ROWS, 3, 28, 28))
        model(ids, features=features).logits.square().sum().backward()
    facts = {"tokens": ROWS * LENGTH, "pairs": ROWS * LENGTH**2, "supervised": ROWS * LENGTH, "images": ROWS}
    return seen.get_total_flops(), step_flops(shape, learning, **facts).total


@pytest.mark.parametrize(
    "learning",
    [
        Learning(projector=True),
        Learning(vision=True),
        Learning(llm=True),
        Learning(llm=True, embeddings=False),
        Learning(llm=True, parts=("mlp",)),
        Learning(llm=True, parts=("self_attn",)),
        Learning(projector=True, llm=True),
        Learning(vision=True, projector=True, llm=True),
        Learning(llm=True, rank=4),
        Learning(llm=True, rank=4, targets=("up_proj",)),
        Learning(projector=True, llm=True, rank=4),
    ],
    ids=str,
)
def test_operations_are_those_that_run_whatever_is_frozen(learning: Learning) -> None:
    seen, ours = counted(learning)
    assert ours == seen


@pytest.mark.parametrize(("family", "tower"), [("mistral", "siglip"), ("qwen2", "dinov2"), ("llama", "clip")])
def test_operations_are_those_that_run_for_every_family_and_tower(family: str, tower: str) -> None:
    seen, ours = counted(Learning(vision=True, projector=True, llm=True), family, tower)
    assert ours == seen


def test_attention_is_counted_inside_samples_alone() -> None:
    assert causal_pairs([3, 1]) == 6 + 1
    shape = shape_of(tiny.vila()[0].config)
    facts = {"tokens": 8, "supervised": 4, "images": 0}
    packed = step_flops(shape, Learning(llm=True), pairs=causal_pairs([4, 4]), **facts)
    whole = step_flops(shape, Learning(llm=True), pairs=causal_pairs([8]), **facts)
    assert packed.attention / whole.attention == pytest.approx(20 / 36)
    assert replace(packed, attention=0) == replace(whole, attention=0)


def test_a_step_without_pictures_costs_the_tower_nothing() -> None:
    shape = shape_of(tiny.vila()[0].config)
    flops = step_flops(shape, Learning(llm=True), tokens=8, pairs=36, supervised=8, images=0)
    assert flops.tower == flops.projector == 0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("Tesla T4", None),
        ("Some A1000 Laptop GPU", None),
    ],
)
def test_a_device_is_known_by_the_name_that_its_driver_gives(name: str, tflops: float | None) -> None:
    assert peak_tflops(name) == tflops


def test_every_device_is_found_by_its_own_name() -> None:
    from vila.plan.devices import _TABLE

    for _, device in _TABLE:
        assert find_device(device.name.replace("-", " ")) == device


def test_a_machine_is_read_from_its_short_form() -> None:
    machine = parse_machine("16xA100-40G")
    assert (machine.gpus, machine.per_node, machine.device.memory_gb, machine.text) == (16, 8, 40, "16xA100-40G")
    assert parse_machine("H100").gpus == 1
    assert parse_machine("4x RTX 4090").device.tflops == 165.2
    assert parse_machine("8xH100-PCIe-80G").device.tflops == 756


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8xT4", "known devices are A10, A100"),
        ("eight", "expected something like 8xA100-80G"),
        ("0xA100", "at least one device"),
        ("12xA100", "12 devices do not fill nodes of 8"),
    ],
)
def test_a_machine_that_is_not_known_is_refused_with_those_that_are(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_machine(text)


def test_pairs_are_the_positions_that_the_mask_lets_through() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, 3, 3, -1]])
    parents = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 0, 1, 0]])  # two branches behind a prefix, then a sample of its own
    real = segments >= 0
    seen = segment_mask(segments, parents)[0, 0][real[0]].sum()
    assert int(seen) == int((positions + 1)[real].sum())
