"""Every command checks what it will write before it reads a model, data or the network."""

import pytest
from typer.main import get_command

from vila.cli.main import app
from vila.core.errors import ConfigError

# The inputs are absent, so that a command that looks at them first raises another error.
DIRECTORIES = [
    ("quantize", "no/model", "--output"),
    ("convert", "no/model", "--layout", "native"),
    ("export", "no/model", "--format", "safetensors", "--output"),
    ("eval", "no/model", "--output"),
    ("submit", "no/run", "--output"),
    ("compare", "no/run", "no/other", "--output"),
    ("quickstart", "--output"),
    ("bench", "quality", "no/model", "--output"),
    ("bench", "serve", "no/model", "--output"),
    ("data", "prepare", "mmc4", "no.jsonl", "--output"),
    ("data", "prepare", "coyo", "no.parquet", "--output"),
    ("data", "prepare", "llava-align", "no.json", "--images", "no", "--output"),
    ("data", "prepare", "sharegpt4v", "no.json", "--output"),
    ("data", "prepare", "m3it", "no", "--output"),
    ("data", "prepare", "flan", "no.parquet", "--output"),
    ("data", "prepare", "pkl", "no", "--kind", "mmc4", "--output"),
]
FILES = [
    ("run", "no/model", "--batch-file", "no.jsonl", "--output"),
    ("quantize", "no/model", "--output", "{tmp}/new", "--dump-awq"),
    ("data", "from-csv", "no.csv", "--image-root", "no", "--output"),
    ("data", "inspect", "no.jsonl", "--html"),
    ("bench", "decode", "no/model", "--output"),
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
    """A command with --output or --html that is not tested above fails here."""
    tested = {(*words[: 3 if words[:2] == ("data", "prepare") else 2],) for words in (*DIRECTORIES, *FILES)}

    def outputs(command, words):
        for name, below in getattr(command, "commands", {}).items():
            yield from outputs(below, (*words, name))
        if any(option in ("--output", "--html", "--dump-awq") for param in command.params for option in param.opts):
            yield words

    found = set(outputs(get_command(app), ()))
    assert {words for words in found if not any(one[: len(words)] == words for one in tested)} == set()
