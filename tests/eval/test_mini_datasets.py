"""The mini datasets: all ten published layouts are readable."""

import hashlib

import pytest

from scripts.make_eval_data import LAYOUTS
from tests.eval.mini_datasets import TEN, truly, write_mini_datasets
from vila.eval.benchmark import BENCHMARKS, missing_media
from vila.eval.predictions import predicted_answers
from vila.eval.significance import score_interval


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mini_datasets(tmp_path_factory.mktemp("data"))


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_bytes_every_time(data, tmp_path):
    assert hashes(write_mini_datasets(tmp_path)) == hashes(data)


def test_published_file_names(data):
    names = {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}
    assert names >= {
        "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl",
        "vqav2/llava_vqav2_mscoco_test2015.jsonl",
        "vqav2/test2015/COCO_test2015_000000000001.jpg",
        "gqa/testdev_balanced_questions.json",
        "gqa/images/n000001.jpg",
        "vizwiz/test/VizWiz_test_00000000.jpg",
        "scienceqa/llava_test_CQM-A.json",
        "scienceqa/images/test/1/image.png",
        "textvqa/TextVQA_0.5.1_val.json",
        "pope/coco/coco_pope_adversarial.json",
        "MME/MME_Benchmark_release_version/artwork/questions_answers_YN/0001.txt",
        "MME/MME_Benchmark_release_version/OCR/0001.jpg",
        "mmbench/mmbench_dev_20230712.tsv",
        "mmbench_cn/mmbench_dev_cn_20231003.tsv",
        "seed_bench/SEED-Bench.json",
        "seed_bench/SEED-Bench-image/1_square",
        "seed_bench/SEED-Bench-video-image/10_v10.png",
    }


@pytest.mark.parametrize("name", TEN)
def test_every_benchmark_finds_its_questions_and_images(data, name):
    items = BENCHMARKS[name](data, 0).items()
    assert items and missing_media(items) == []


@pytest.mark.parametrize(
    ("name", "full"),
    [("gqa", 100), ("scienceqa", 100), ("textvqa", 100), ("pope", 100), ("mme", 2000), ("mmbench", 100),
     ("mmbench_cn", 100), ("seed", 100)],
)  # fmt: skip
def test_true_answers_win_all_points(data, name, full):
    benchmark = BENCHMARKS[name](data, 0)
    texts = {item.id: truly(0, item) for item in benchmark.items()}
    assert benchmark.score(predicted_answers(benchmark.items(), texts)).score == pytest.approx(full)


@pytest.mark.parametrize("protocol", ["upstream", "lmms-eval"])
@pytest.mark.parametrize("name", [name for name in TEN if name not in ("vqav2", "vizwiz")])
def test_the_interval_is_of_the_score_also_for_aggregate_metrics(data, name, protocol):
    benchmark = BENCHMARKS[name](data, 0)
    texts = {item.id: truly(n, item) if n % 4 else "no" for n, item in enumerate(benchmark.items())}
    result = benchmark.score(predicted_answers(benchmark.items(), texts), protocol)
    found = score_interval(result)
    assert found.mean == pytest.approx(result.score)
    assert found.low <= result.score <= found.high


def test_ten_layouts():
    assert len(LAYOUTS) == 10
