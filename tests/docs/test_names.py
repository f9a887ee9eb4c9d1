"""README, docs and CONTRIBUTING only name flags, recipe fields, modules and files that exist."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from vila.cli.main import app
from vila.config.field_docs import describe_fields

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
FIELDS = {path for path, *_ in describe_fields()}
SECTIONS = {path.partition(".")[0] for path in FIELDS}
# Flags of pip, torchrun, sbatch and scripts of the original release that the pages mention.
OTHER_FLAGS = {
    "--no-deps",
    "--extra-index-url",
    "--version",
    "--nproc-per-node",
    "--dependency",
    "--load-awq",
    "--include-path",
}
# Keys of other programs that look like modules of ours.
OTHER_MODULES = {"vila.vocab_size"}
# Paths that a command writes, or that belong to the user or to the original release.
OTHER_PATHS = re.compile(r"^(runs|data|playground|scripts/v1_5|llava)/")


def command_flags() -> dict[tuple[str, ...], set[str]]:
    """Return the flags of every `vila` command, by the words of the command."""
    found: dict[tuple[str, ...], set[str]] = {}

    def walk(command, path: tuple[str, ...]) -> None:
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                walk(child, (*path, name))
        else:
            flags = {flag for part in command.params for flag in (*part.opts, *part.secondary_opts)}
            found[path] = {flag for flag in flags if flag.startswith("-")} | {"--help", "-h"}

    walk(typer.main.get_command(app), ())
    return found


COMMANDS = command_flags()
ALL_FLAGS = set().union(*COMMANDS.values()) | OTHER_FLAGS


def fenced_blocks(text: str) -> Iterator[tuple[int, str, str]]:
    for match in FENCE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match[1], match[2]


def vila_calls(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the words of every `vila` command in the shell blocks and inline code of a page."""
    for line, language, code in fenced_blocks(text):
        if language in ("bash", "sh", "console"):
            joined = code.replace("\\\n", " ")
            for command in re.split(r"[\n|;&]+", joined):
                yield from ((line, words) for words in [words_of(command)] if "vila" in words[:1])
    for match in INLINE_CODE.finditer(FENCE.sub("", text)):
        if match[1].startswith("vila "):
            yield 0, words_of(match[1])


def words_of(command: str) -> list[str]:
    command = re.sub(r"\s#.*", "", command.strip())
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def unknown_flags(text: str) -> list[str]:
    wrong = []
    for line, words in vila_calls(text):
        path = next((tuple(words[1:end]) for end in (4, 3, 2) if tuple(words[1:end]) in COMMANDS), None)
        if path is None:
            continue
        for word in words[1 + len(path) :]:
            flag = word.partition("=")[0]
            if re.fullmatch(r"--?[a-z][\w-]*", flag) and flag.replace("_", "-") not in COMMANDS[path]:
                wrong.append(f"line {line}: vila {' '.join(path)} {flag}")
    for match in INLINE_CODE.finditer(FENCE.sub("", text)):
        script = re.match(r"(?:python )?(benchmarks/\w+\.py)", match[1])
        known = (ROOT / script[1]).read_text(encoding="utf-8") if script else ""
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", match[1]):
            if flag.replace("_", "-") not in ALL_FLAGS and flag not in known:
                wrong.append(f"`{match[1]}`: {flag}")
    return wrong


def unknown_fields(text: str) -> list[str]:
    return [
        name
        for name in INLINE_CODE.findall(FENCE.sub("", text))
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name)
        and name.partition(".")[0] in SECTIONS
        and name not in FIELDS
        and not any(field.startswith(f"{name}.") for field in FIELDS)
        and not (ROOT / "src/vila" / name.replace(".", "/")).with_suffix(".py").exists()
        and not names_attribute(f"vila.{name}")
        and Path(name).suffix not in (".yaml", ".json", ".jsonl", ".md", ".py")
    ]


def names_attribute(dotted: str) -> bool:
    """Return True if `dotted` is a module of the package, or a top-level name (or a member of one) of such a module."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT / "src" / "/".join(parts[:end])
        source = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if not source.is_file():
            continue
        if end == len(parts):
            return True
        text = source.read_text(encoding="utf-8")
        names = {
            target.id if isinstance(target, ast.Name) else getattr(target, "name", "")
            for node in ast.parse(text).body
            for target in (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else [node]
            )
        }
        return parts[end] in names or (source.name == "__init__.py" and f'"{parts[end]}"' in text)
    return False


def unknown_modules(text: str) -> list[str]:
    names = set(re.findall(r"\bvila(?:\.[A-Za-z_]\w*)+", text)) - OTHER_MODULES
    return sorted(name for name in names if not names_attribute(name))


def unknown_paths(text: str, page: Path) -> list[str]:
    wrong = []
    for name in INLINE_CODE.findall(FENCE.sub("", text)):
        from_root = re.fullmatch(r"(src|docs|tests|benchmarks|scripts|examples)/[\w./*-]+", name)
        in_package = re.fullmatch(r"[a-z_0-9]+(/[a-z_0-9*]+)+\.py", name)
        if OTHER_PATHS.match(name) or not (from_root or in_package):
            continue
        if not list(ROOT.glob(name.rstrip("/"))) and not (in_package and list((ROOT / "src/vila").glob(name))):
            wrong.append(name)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and not (page.parent / target).exists():
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert {
        # This page maps the flags of the original release.
        "flags": [] if page.name == "from_upstream.md" else unknown_flags(text),
        "fields": unknown_fields(text),
        "modules": unknown_modules(text),
        "paths": unknown_paths(text, page),
    } == {"flags": [], "fields": [], "modules": [], "paths": []}


def test_names_that_do_not_exist_are_found() -> None:
    page = "Use `--no-such-flag`, `data.no_field`, `vila.core.nothing.X` and `src/vila/absent.py`.\n"
    page += "```bash\nvila train a.yaml --no-flag\n```\n"
    assert unknown_flags(page) == ["line 2: vila train --no-flag", "`--no-such-flag`: --no-such-flag"]
    assert unknown_fields(page) == ["data.no_field"]
    assert unknown_modules(page) == ["vila.core.nothing.X"]
    assert unknown_paths(page, ROOT / "README.md") == ["src/vila/absent.py"]
