"""Plans agree with real models (parameters, memory) and with published training hours."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import plan_memory
from benchmarks import scaling as scaling_page
from tests import tiny
from vila.config.load import load_recipe, recipe_names
from vila.config.schema import ModelSource, Recipe
from vila.core.errors import ConfigError
from vila.model.loading import save_model
from vila.plan.devices import parse_machine, step_traffic
from vila.plan.flops import TrainableParts, count_trainable
from vila.plan.memory import MemoryConfig, MicroBatch, memory_by_component, peak_memory, static_memory
from vila.plan.model_shape import config_of, count_parameters, shape_of
from vila.plan.planner import DEFAULT_MFU, PUBLISHED_BATCH, make_plan, stage_of
from vila.plan.published_data import DataStats
from vila.train.optimizer import MODULES, select_trainable

ROOT = Path(__file__).parents[2]
PARAMETERS = {  # as published
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "lmsys/vicuna-13b-v1.5": 13_015_864_320,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "NousResearch/Nous-Hermes-2-Yi-34B": 34_388_917_248,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


def source(llm: str = "lmsys/vicuna-7b-v1.5", vision: str = "openai/clip-vit-large-patch14-336") -> ModelSource:
    return ModelSource(llm=llm, vision=vision)


@pytest.mark.parametrize("llm", PARAMETERS)
def test_packaged_llms_have_the_published_number_of_parameters(llm: str) -> None:
    counts = count_parameters(shape_of(config_of(source(llm))))
    assert counts["embeddings"] + counts["blocks"] + counts["head"] == PARAMETERS[llm]


def test_packaged_towers_have_the_published_number_of_parameters() -> None:
    towers = {"openai/clip-vit-large-patch14-336": 303_507_456, "google/siglip-so400m-patch14-384": 428_225_600}
    for vision, count in towers.items():
        config = config_of(source(vision=vision).model_copy(update={"select_feature": "cls_patch"}))
        assert count_parameters(shape_of(config))["tower"] == count


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("tower", "tied"), [("clip", True), ("siglip", False), ("dinov2", True)])
def test_numbers_of_parameters_and_trainable_parameters_are_those_of_the_model(
    family: str, tower: str, tied: bool
) -> None:
    model, _ = tiny.vila(family, tower=tower, tie_word_embeddings=tied)
    shape = shape_of(model.config)
    assert sum(count_parameters(shape).values()) == sum(p.numel() for p in model.parameters())
    for trainable in (
        TrainableParts(vision=True, projector=True, llm=True),
        TrainableParts(projector=True),
        TrainableParts(llm=True, embeddings=False),
        TrainableParts(projector=True, llm=True, parts=("mlp",)),
    ):
        tune = [name for name in MODULES if getattr(trainable, name)]
        select_trainable(model, tune, tune_embeddings=trainable.embeddings, llm_parts=trainable.parts)
        num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(count_trainable(shape, trainable).values()) == num_trainable


@pytest.mark.parametrize(
    "name",
    [
        "frozen LLM, bf16, gradient checkpointing",
        "LLM and projector, accumulated",
        "everything, many images, bf16",
    ],
)
def test_predicted_memory_is_within_a_tenth_of_the_measured_peak(name: str) -> None:
    case = plan_memory.CASES[name]
    assert plan_memory.predict(case).total == pytest.approx(plan_memory.measure(case), rel=plan_memory.BOUND)


def test_sharded_memory_is_inverse_to_the_number_of_ranks() -> None:
    shape, trainable = shape_of(config_of(source())), TrainableParts(projector=True, llm=True)
    micro = MicroBatch(1, 64, 1, 64)
    one, eight = (memory_by_component(shape, trainable, MemoryConfig(num_shards=ranks), micro) for ranks in (2, 16))
    for name in ("blocks", "tower"):
        assert one[name].weights == 8 * eight[name].weights
        assert one[name].optimizer == 8 * eight[name].optimizer
        assert one[name].gradients == 8 * eight[name].gradients
        assert one[name].activations == eight[name].activations


def test_a_trainable_parameter_takes_sixteen_bytes() -> None:
    shape = shape_of(config_of(source()))
    trainable = TrainableParts(projector=True, llm=True)
    parts = memory_by_component(shape, trainable, MemoryConfig(num_shards=8), MicroBatch(1, 64, 1, 64))
    num_trainable = sum(count_trainable(shape, trainable).values())
    frozen = sum(count_parameters(shape).values()) - num_trainable
    total = sum(part.weights + part.gradients + part.optimizer for part in parts.values())
    assert total == pytest.approx((16 * num_trainable + 2 * frozen) / 8)


def test_four_bit_weights_take_half_a_byte_and_their_scales() -> None:
    shape = shape_of(config_of(source()))
    trainable = TrainableParts(llm=True, rank=8)
    half, four = (static_memory(shape, trainable, MemoryConfig(llm_bits=bits))["blocks"].weights for bits in (16, 4))
    matrices = shape.llm.layers * sum(matrix.weights for matrix in shape.llm.matrices)
    assert half - four == pytest.approx(matrices * (2 - 4.5 / 8))


def test_recomputing_more_blocks_saves_activations() -> None:
    shape, trainable = shape_of(config_of(source())), TrainableParts(projector=True)
    needs = [
        peak_memory(shape, trainable, MemoryConfig(recompute=every), MicroBatch(2, 2048, 2, 2048)).activations
        for every in (1, 2, 4, 0)
    ]
    assert needs == sorted(needs)
    assert needs[0] < needs[-1] / 10


HOURS = [  # (recipe, machine, hours) as VILA's README reports them
    ("vila_7b/1_align", "8xA100-80G", 3.5),
    ("vila_13b/1_align", "8xA100-80G", 5.5),
    ("vila_7b/2_pretrain", "128xA100-80G", 30.0),
    ("vila_7b/3_sft", "8xA100-80G", 25.0),
    ("vila_13b/3_sft", "8xA100-80G", 40.0),
]


@pytest.mark.parametrize(("name", "machine", "hours"), HOURS)
def test_published_hours_follow_from_one_utilisation_per_stage(name: str, machine: str, hours: float) -> None:
    plan = make_plan(load_recipe(name), parse_machine(machine))
    assert plan.duration is not None
    assert plan.duration.hours == pytest.approx(hours, rel=0.3)
    assert plan.duration.mfu == DEFAULT_MFU[plan.stage]
    assert plan.batch.size == PUBLISHED_BATCH[plan.stage]
    assert plan.data is not None
    assert plan.data.sources


def test_twice_the_utilisation_is_half_the_time() -> None:
    recipe, machine = load_recipe("vila_7b/1_align"), parse_machine("8xA100")
    slow, fast = (make_plan(recipe, machine, mfu=mfu).duration for mfu in (0.25, 0.5))
    assert slow is not None
    assert fast is not None
    assert slow.hours == pytest.approx(2 * fast.hours)


def test_tokens_of_packed_and_unpacked_batches() -> None:
    machine = parse_machine("8xA100")
    packing = ["data.packing=rows", "batch.rows=16", "batch.samples=0", "batch.micro=2"]
    packed = make_plan(load_recipe("vila_7b/1_align", packing), machine).batch
    assert packed.tokens == pytest.approx(16 * 2048, rel=0.03)
    assert packed.samples == pytest.approx(packed.tokens / (576 + 15))
    assert packed.accumulation == 1
    plain = make_plan(load_recipe("vila_7b/1_align", ["batch.micro=8"]), machine).batch
    assert (plain.samples, plain.tokens, plain.accumulation) == (256, 256 * (576 + 15), 4)


def applied(remedy: str, recipe: str, overrides: list[str], machine: str) -> tuple[Recipe, str]:
    words = shlex.split(remedy)
    if words[0] == "--gpus":
        machine, words = words[1], words[2:]
    return load_recipe(recipe, [*overrides, *words]), machine


@pytest.mark.parametrize(
    ("name", "overrides", "machine", "expected"),
    [
        ("vila_7b/3_sft", [], "8xA100-40G", "batch.micro=8"),
        (
            "vila_7b/3_sft",
            ["compute.gradient_checkpointing=false"],
            "8xA100-80G",
            "compute.gradient_checkpointing=true",
        ),
        ("vila_7b/3_sft", ["compute.sharding=replicate"], "8xA100-80G", "compute.sharding=full"),
        ("vila_7b/3_sft", [], "4xRTX-4090", "--gpus 8xRTX-4090-24G"),
        ("vila_13b/3_sft", [], "1xRTX-4090", "stage.lora.bits=4"),
    ],
)
def test_every_remedy_fits(name: str, overrides: list[str], machine: str, expected: str) -> None:
    plan = make_plan(load_recipe(name, overrides), parse_machine(machine))
    assert not plan.fits
    assert any(expected in remedy for remedy in plan.remedies)
    for remedy in plan.remedies:
        recipe, where = applied(remedy, name, overrides, machine)
        assert make_plan(recipe, parse_machine(where)).fits, remedy


def test_the_largest_micro_batch_fits_and_the_next_one_does_not() -> None:
    machine = parse_machine("8xA100-40G")
    first = make_plan(load_recipe("vila_7b/3_sft", ["batch.micro=1"]), machine)
    largest = first.largest_micro_batch
    assert 1 <= largest < 16
    assert make_plan(load_recipe("vila_7b/3_sft", [f"batch.micro={largest}"]), machine).fits
    assert not make_plan(load_recipe("vila_7b/3_sft", [f"batch.micro={2 * largest}"]), machine).fits


def test_a_batch_that_the_devices_do_not_divide_is_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(load_recipe("vila_7b/3_sft"), parse_machine("24xA100"))
    assert (caught.value.field, caught.value.value, caught.value.expected) == ("batch", 128, "120 or 144")


def test_a_micro_batch_larger_than_the_batch_of_a_gpu_is_reduced() -> None:
    plan = make_plan(load_recipe("vila_7b/3_sft"), parse_machine("16xA100"))
    assert (plan.batch.micro, plan.batch.asked_micro, plan.batch.accumulation) == (8, 16, 1)
    assert plan.memory == make_plan(load_recipe("vila_7b/3_sft", ["batch.micro=8"]), parse_machine("16xA100")).memory


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("starter/")])
def test_every_packaged_recipe_can_be_planned(name: str) -> None:
    recipe = load_recipe(name)
    plan = make_plan(recipe, parse_machine("1xH200"))
    assert plan.memory.total > 0
    assert (plan.duration is None) == bool(plan.unknown)


def test_a_model_on_disk_is_read_from_its_config(tmp_path: Path) -> None:
    model, processor = tiny.vila("qwen2")
    save_model(model, processor, tmp_path / "model")
    changes = [f"model.path={tmp_path / 'model'}", "compute.feature_cache=false"]
    data = DataStats(1000, 1.0, 20.0, 10.0, ())
    plan = make_plan(load_recipe("starter/3_sft", changes), parse_machine("L4"), data=data)
    assert sum(plan.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert plan.duration is not None


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(ModelSource(path="runs/mine/model"))
    assert (caught.value.field, caught.value.value) == ("model.path", "runs/mine/model")
    assert "model.llm=" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        config_of(source(llm="mine"))
    assert (caught.value.field, caught.value.value) == ("model.llm", "mine")
    assert "lmsys/vicuna-7b-v1.5" in caught.value.hint


def test_without_the_size_of_the_data_there_is_no_duration() -> None:
    changes = ["data.mixture=[{format: messages, path: mine.jsonl}]"]
    plan = make_plan(load_recipe("vila_7b/3_sft", changes), parse_machine("8xA100"))
    assert plan.duration is None
    assert plan.unknown == ("mine.jsonl",)


def test_disk_space_counts_the_checkpoint_being_written() -> None:
    recipe = load_recipe("vila_7b/3_sft")
    plan = make_plan(recipe, parse_machine("8xA100"))
    num_trainable = sum(plan.trainable.values())
    assert plan.disk == {
        "checkpoint": 12 * num_trainable,
        "checkpoints": 36 * num_trainable,
        "model": 2 * sum(plan.parameters.values()),
    }


def test_stages_follow_from_trainable_modules_and_data() -> None:
    kinds = {name: stage_of(load_recipe(name)) for name in ("vila_7b/1_align", "vila_7b/2_pretrain", "vila_7b/3_sft")}
    assert list(kinds.values()) == ["align", "pretrain", "sft"]


def test_traffic_per_sharding() -> None:
    facts = {"parameters": 1000, "num_trainable": 600, "units": 1, "trainable_units": 1, "micro_batches": 1}
    node, nodes = parse_machine("8xA100"), parse_machine("32xA100")
    assert step_traffic(parse_machine("A100"), "full", **facts).intra_node == 0
    # All-gather of bfloat16 weights twice, reduce-scatter of float32 gradients once; a rank has an eighth already.
    assert step_traffic(node, "full", **facts).intra_node == pytest.approx((2 * 2 * 1000 + 4 * 600) * 7 / 8)
    kept = step_traffic(node, "full", reshard=False, **facts)
    assert kept.intra_node == pytest.approx((2 * 1000 + 4 * 600) * 7 / 8)
    assert step_traffic(node, "full", **facts).inter_node == 0
    hybrid = step_traffic(nodes, "hybrid", **facts)
    assert hybrid.inter_node == pytest.approx(2 * 4 * 600 / 8 * 3 / 4)
    whole = step_traffic(nodes, "replicate", **facts)
    assert whole.intra_node + whole.inter_node == pytest.approx(2 * 4 * 600 * 31 / 32)
    assert step_traffic(nodes, "hybrid", **facts).latency_s < step_traffic(nodes, "full", **facts).latency_s


def test_the_scaling_page_is_up_to_date() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for title in scaling_page.STAGES:
        assert scaling_page.table(title) in text, f"{title} is stale; run: PYTHONPATH=. python benchmarks/scaling.py"
    assert scaling_page.break_even() in text
    assert scaling_page.load_balance() in text


def test_cached_features_need_no_memory_for_the_tower() -> None:
    shape, trainable = shape_of(config_of(source())), TrainableParts(projector=True)
    # A small batch, whose peak is the forward pass of the tower.
    micro = MicroBatch(1, 600, 40, 15)
    uncached, cached = (
        peak_memory(shape, trainable, MemoryConfig(has_feature_cache=value), micro) for value in (False, True)
    )
    assert cached.total < uncached.total
    assert replace(cached, activations=0, working=0) == replace(uncached, activations=0, working=0)
