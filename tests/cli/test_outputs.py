"""Every command checks what it will write before it reads a model, data or the network."""

import pytest
from typer.main import get_command

from vila.cli.main import app
from vila.core.errors import ConfigError

# The inputs are absent, so that a command that looks at them first raises another error.
DIRECTORIES = [
    ("quantize", "no/model", "--out"),
    ("convert", "no/model", "--layout", "native"),
    ("export", "no/model", "--format", "safetensors", "--out"),
    ("eval", "no/model", "--out"),
    ("submit", "no/run", "--out"),
    ("compare", "no/run", "no/other", "--out"),
    ("quickstart", "--out"),
    ("bench", "quality", "no/model", "--out"),
    ("bench", "serve", "no/model", "--out"),
    ("data", "prepare", "mmc4", "no.jsonl", "--out"),
    ("data", "prepare", "coyo", "no.parquet", "--out"),
    ("data", "prepare", "llava-align", "no.json", "--images", "no", "--out"),
    ("data", "prepare", "sharegpt4v", "no.json", "--out"),
    ("data", "prepare", "m3it", "no", "--out"),
    ("data", "prepare", "flan", "no.parquet", "--out"),
    ("data", "prepare", "pkl", "no", "--kind", "mmc4", "--out"),
]
FILES = [
    ("run", "no/model", "--batch", "no.jsonl", "--out"),
    ("quantize", "no/model", "--out", "{tmp}/new", "--dump-awq"),
    ("data", "from-csv", "no.csv", "--images", "no", "--out"),
    ("data", "inspect", "no.jsonl", "--html"),
    ("bench", "decode", "no/model", "--out"),
]


def name_of(words):
    return " ".join(word for word in words if "/" not in word and "." not in word)


@pytest.mark.parametrize("output", ["file/below.pt", f"{'n' * 300}.pt", "/proc/below.pt"])
@pytest.mark.parametrize("words", [*DIRECTORIES, *FILES], ids=name_of)
def test_an_output_that_cannot_be_written_is_an_error_before_any_input_is_read(vila_error, tmp_path, words, output):
    (tmp_path / "file").touch()
    target = output if output.startswith("/") else f"{tmp_path}/{output}"
    error = vila_error(*(word.format(tmp=tmp_path) for word in words), target)
    assert isinstance(error, ConfigError)
    assert (error.field, error.value) == ("DST" if words[0] == "convert" else words[-1], target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("words", FILES, ids=name_of)
def test_a_directory_or_device_is_not_taken_for_a_file(vila_error, tmp_path, words):
    (tmp_path / "folder.pt").mkdir()
    for target in (f"{tmp_path}/folder.pt", "/dev/null"):
        if words[0] == "quantize" and target == "/dev/null":
            continue  # the name has the wrong ending
        assert isinstance(vila_error(*(word.format(tmp=tmp_path) for word in words), target), ConfigError)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt"]


def test_every_option_that_names_an_output_is_in_the_lists():
    """A command with --out or --html that is not tested above fails here."""
    tested = {(*words[: 3 if words[:2] == ("data", "prepare") else 2],) for words in (*DIRECTORIES, *FILES)}

    def outputs(command, words):
        for name, below in getattr(command, "commands", {}).items():
            yield from outputs(below, (*words, name))
        if any(option in ("--out", "--html", "--dump-awq") for param in command.params for option in param.opts):
            yield words

    found = set(outputs(get_command(app), ()))
    assert {words for words in found if not any(one[: len(words)] == words for one in tested)} == set()
