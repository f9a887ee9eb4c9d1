"""A damaged log or JSON file of a run is an error with its line, for any content."""

import pytest

from tests.train.finish import stop_after
from tests.train.tiny_run import tiny_recipe, write_training_files
from vila.core.errors import DataError, Interrupted
from vila.train.build import build
from vila.train.metrics import MetricsLog, read_metrics
from vila.train.report import write_report


@pytest.fixture(scope="module")
def training_files(tmp_path_factory):
    return write_training_files(tmp_path_factory.mktemp("train"))


GOOD = '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("\x00\x00\x00\x00\n", None, None),
        ('{"step": 2, "lo\n', None, None),
        ("[1, 2]\n", None, [1, 2]),
        ('{"loss": 1.0}\n', "step", None),
        ('{"step": "2"}\n', "step", "2"),
        ('{"step": true}\n', "step", True),
        ('{"step": -1}\n', "step", -1),
        ('{"step": 1' + "0" * 30 + "}\n", "step", 10**30),
        ("[" * 100_000 + "\n", None, None),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, field, value):
    path = tmp_path / "metrics.jsonl"
    path.write_text(GOOD + line)
    for read in (read_metrics, lambda path: MetricsLog(path, 5), lambda path: write_report(path.parent)):
        with pytest.raises(DataError) as caught:
            read(path)
        assert (caught.value.file, caught.value.record, caught.value.field) == (str(path), "line 2", field)
        if value is not None:
            assert caught.value.value == value
    assert path.read_text() == GOOD + line


@pytest.mark.parametrize("tail", ['{"step": 2', "\x00" * 4096])
def test_a_last_line_that_a_kill_cut_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text(GOOD + tail)
    assert [row["step"] for row in read_metrics(path)] == [1]
    assert MetricsLog(path, 5).last_step == 1
    assert path.read_text() == GOOD


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": "text"}\n'),
        ("metrics.jsonl", '{"step": 1, "tokens_by_data_set": {"a": "b"}}\n'),
        ("metrics.jsonl", '{"step": 1, "loss_by_data_set": []}\n'),
        ("evaluations.jsonl", '{"step": 1}\n'),
        (
            "evaluations.jsonl",
            '{"step": 1, "benchmark": "x", "score": 1.0}\n{"step": 2, "benchmark": "x", "score": "y"}\n',
        ),
        ("answers.jsonl", '{"step": 1, "prompt": 5}\n{"step": 1}\n'),
        ("faults.jsonl", '{"position": "x", "reason": "?"}\n'),
        ("finished.json", "[]"),
        ("finished.json", '{"versions": 5}'),
        ("finished.json", '{"ranks": "two"}'),
        ("shares.json", '{"a": "much"}'),
    ],
)
def test_a_report_names_the_file_that_is_damaged(tmp_path, name, content):
    (tmp_path / "metrics.jsonl").write_text(GOOD)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        write_report(tmp_path)
    assert caught.value.file == str(tmp_path / name)


def test_a_run_does_not_resume_over_damaged_metrics(training_files):
    recipe = tiny_recipe(training_files, "out")
    with pytest.raises(Interrupted):
        build(recipe, callbacks=[stop_after(2)]).train()
    path = recipe.output.dir / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 2', '"step": "2"'))
    with pytest.raises(DataError) as caught:
        build(recipe)
    assert (caught.value.file, caught.value.record, caught.value.field) == (str(path), "line 2", "step")


@pytest.mark.parametrize("text", ["a: [", "- 1", "stage: {tune: 3}", "name: [1]", "\x00"])
def test_a_damaged_recipe_is_named_by_the_report(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        write_report(tmp_path)
    assert caught.value.file == str(tmp_path / "recipe.yaml")
