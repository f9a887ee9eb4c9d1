"""FLOPs are those that PyTorch counts when it runs the real model."""

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
from vila.plan.flops import TrainableParts, causal_pairs, step_flops
from vila.plan.model_shape import shape_of
from vila.train.optimizer import select_trainable

ROWS, LENGTH = 2, 24


def counted(trainable: TrainableParts, family: str = "llama", tower: str = "clip") -> tuple[int, float]:
    """FLOPs of forward and backward pass: as counted by PyTorch, and by `step_flops`."""
    model, _ = tiny.vila(family, tower=tower, tie_word_embeddings=False)
    shape = shape_of(model.config)
    adapters = None
    if trainable.rank:
        names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        lora = LoraConfig(r=trainable.rank, target_modules=list(trainable.targets) or names)
        inject_adapter_in_model(lora, model.language_model)
        adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    tune = [name for name in ("vision", "projector", "llm") if getattr(trainable, name)]
    select_trainable(model, tune, tune_embeddings=trainable.embeddings, llm_parts=trainable.parts, adapters=adapters)
    for part in (model.config, model.language_model.config, model.vision_tower.config):
        part._attn_implementation = "eager"  # its products are plain ones
    ids = torch.randint(3, 200, (ROWS, LENGTH))
    ids[:, 2 : 2 + shape.media_tokens] = model.config.image_token_id
    with FlopCounterMode(display=False) as seen:
        features = model.vision_features(torch.randn(ROWS, 3, 28, 28))
        model(ids, features=features).logits.square().sum().backward()
    facts = {"tokens": ROWS * LENGTH, "pairs": ROWS * LENGTH**2, "supervised": ROWS * LENGTH, "images": ROWS}
    return seen.get_total_flops(), step_flops(shape, trainable, **facts).total


@pytest.mark.parametrize(
    "trainable",
    [
        TrainableParts(projector=True),
        TrainableParts(vision=True),
        TrainableParts(llm=True),
        TrainableParts(llm=True, embeddings=False),
        TrainableParts(llm=True, parts=("mlp",)),
        TrainableParts(llm=True, parts=("self_attn",)),
        TrainableParts(projector=True, llm=True),
        TrainableParts(vision=True, projector=True, llm=True),
        TrainableParts(llm=True, rank=4),
        TrainableParts(llm=True, rank=4, targets=("up_proj",)),
        TrainableParts(projector=True, llm=True, rank=4),
    ],
    ids=str,
)
def test_flops_equal_those_of_pytorch_for_every_choice_of_trainable_parts(trainable: TrainableParts) -> None:
    seen, ours = counted(trainable)
    assert ours == seen


@pytest.mark.parametrize(("family", "tower"), [("mistral", "siglip"), ("qwen2", "dinov2"), ("llama", "clip")])
def test_flops_equal_those_of_pytorch_for_every_family_and_tower(family: str, tower: str) -> None:
    seen, ours = counted(TrainableParts(vision=True, projector=True, llm=True), family, tower)
    assert ours == seen


def test_attention_is_counted_inside_samples_only() -> None:
    assert causal_pairs([3, 1]) == 6 + 1
    shape = shape_of(tiny.vila()[0].config)
    facts = {"tokens": 8, "supervised": 4, "images": 0}
    packed = step_flops(shape, TrainableParts(llm=True), pairs=causal_pairs([4, 4]), **facts)
    whole = step_flops(shape, TrainableParts(llm=True), pairs=causal_pairs([8]), **facts)
    assert packed.attention / whole.attention == pytest.approx(20 / 36)
    assert replace(packed, attention=0) == replace(whole, attention=0)


def test_a_step_without_images_has_no_tower_flops() -> None:
    shape = shape_of(tiny.vila()[0].config)
    flops = step_flops(shape, TrainableParts(llm=True), tokens=8, pairs=36, supervised=8, images=0)
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
def test_devices_are_found_by_driver_name(name: str, tflops: float | None) -> None:
    assert peak_tflops(name) == tflops


def test_every_device_is_found_by_its_own_name() -> None:
    from vila.plan.devices import _TABLE

    for _, device in _TABLE:
        assert find_device(device.name.replace("-", " ")) == device


def test_parsing_of_machines() -> None:
    machine = parse_machine("16xA100-40G")
    assert (machine.gpus, machine.per_node, machine.device.memory_gb, machine.text) == (16, 8, 40, "16xA100-40G")
    assert parse_machine("H100").gpus == 1
    assert parse_machine("4x RTX 4090").device.tflops == 165.2
    assert parse_machine("8xH100-PCIe-80G").device.tflops == 756


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8xT4", "8xA100-80G"),
        ("eight", "8xA100-80G"),
        ("0xA100", "at least one device"),
        ("A100-0G", "at least 1 GB"),
        ("12xA100", "a multiple of 8"),
    ],
)
def test_an_invalid_machine_is_an_error_with_what_is_expected(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_machine(text)
    assert (caught.value.field, caught.value.value) == ("--gpus", text)
    assert expected in caught.value.expected


def test_an_unknown_device_has_the_known_ones_as_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_machine("8xT4")
    assert "A10, A100" in caught.value.hint


def test_attention_pairs_are_the_entries_of_the_mask() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, 3, 3, -1]])
    parents = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 0, 1, 0]])  # two branches with a shared prefix, then another sample
    real = segments >= 0
    seen = segment_mask(segments, parents)[0, 0][real[0]].sum()
    assert int(seen) == int((positions + 1)[real].sum())
