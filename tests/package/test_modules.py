"""Structure of the package: no import cycles between modules, and no module name for two different ideas."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

SRC = Path(__file__).parents[2] / "src"
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((SRC / "vila").rglob("*.py"))
}
SAME_IDEA = {
    "base": "protocol and registry of a folder of formats, layouts or targets",
    "coyo": "the data set COYO: reading it, preparing it",
    "mmc4": "the data set MMC4: reading it, preparing it",
    "vflan": "the data set VFLAN: reading it, preparing it",
    "easy_vqa": "the data set easy-VQA: benchmark, and its generator for the starter model",
    "errors": "error classes and their HTTP form",
    "detect": "detection of the format of data, or of the layout of a checkpoint",
    "video": "videos: decoding them, and the dataset format of videos",
    "report": "report page of a training run, an evaluation or the quickstart",
    "report_data": "data of the report page of the same package",
    "schema": "schema of a recipe, and of a request body",
    "records": "records of a data file: reading and writing them",
    "messages": "messages of content parts: a data format, and the bodies of requests",
    "metrics": "metrics of a run, and of the server",
}
"""Names of several modules outside of `cli`, and what these modules have in common. `cli` has one module per command,
named like the module that does the work."""


def imported_modules(path: Path) -> set[str]:
    """Modules of `vila` that a module imports at run time, inside functions too."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of one import cycle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_no_import_cycle() -> None:
    graph = {name: imported_modules(path) - {name} for name, path in MODULES.items()}
    assert not find_cycle(graph)


def test_a_cycle_is_found() -> None:
    assert set(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_a_module_name_means_one_idea() -> None:
    modules = defaultdict(list)
    for name, path in MODULES.items():
        if path.name != "__init__.py" and not name.startswith("vila.cli."):
            modules[path.stem].append(name)
    repeated = {stem: names for stem, names in modules.items() if len(names) > 1}
    unknown = {stem: names for stem, names in repeated.items() if stem not in SAME_IDEA}
    assert not unknown, "rename one of them, or give the common idea in SAME_IDEA"
    assert not SAME_IDEA.keys() - repeated.keys(), "remove from SAME_IDEA"


def test_every_module_has_a_docstring() -> None:
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}
    assert not [name for name, tree in trees.items() if tree.body and not ast.get_docstring(tree)]
