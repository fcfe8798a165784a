"""The rules of the house that can be counted: sizes, import circles, who knows BentoML, and how docstrings begin."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("models", "training", "export", "serving", "penumbra")
SUFFIXES = (".py", ".js", ".c", ".html", ".css", ".proto")
FILE_LINES, FUNCTION_LINES = 400, 40
PRODUCT_LINES, SERVING_LINES = 32_430, 17_010
"""Bounds. They went up once, by 245 and 120 lines: graphs in lanes, and faults in tuning and in jobs. The aim is 17,300
and 7,500."""


@cache
def product() -> tuple[Path, ...]:
    """Every file that ships, relative to the root; penumbra/ has the other folders again, as links."""
    found = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES}
    own = [path for path in found if not any(parent.is_symlink() for parent in path.parents)]
    return tuple(sorted(path.relative_to(ROOT) for path in own))


@cache
def num_lines(path: Path) -> int:
    return len((ROOT / path).read_text().splitlines())


@cache
def modules() -> dict[str, ast.Module]:
    """The syntax of every module by its name; a package has its folder's."""
    trees = {}
    for path in product():
        if path.suffix == ".py":
            parts = path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts
            name = ".".join(parts).removeprefix("penumbra.")
            trees[name if name == "penumbra" else f"penumbra.{name}"] = ast.parse((ROOT / path).read_text())
    return trees


def imports(name: str) -> set[str]:
    """Those of our modules that a module imports by name, inside of functions and for types too."""
    found = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {part if part in modules() else node.module for part in parts}
    return found & modules().keys() - {name}


def is_method(package: ast.Module) -> bool:
    """Whether a package has a METHOD: what lives in such a folder is the same for all, and its README says the rest."""
    return any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHOD" for node in package.body)


def test_no_file_of_the_product_is_longer_than_400_lines() -> None:
    assert [(str(path), num_lines(path)) for path in product() if num_lines(path) > FILE_LINES] == []


def test_no_function_is_longer_than_40_lines() -> None:
    long = [
        (name, node.name, length)
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    ]
    assert long == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: imports(name) for name in modules()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_one_file_of_the_server_names_bentoml() -> None:
    naming = {str(path) for path in product() if path.parts[0] == "serving" and "bentoml" in (ROOT / path).read_text()}
    assert naming == {"serving/service.py"}


def test_no_docstring_begins_with_of_and_leans_on_the_name_above_it() -> None:
    leaning = [
        (name, node.lineno, node.value.value)
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if str(node.value.value).lstrip().startswith("Of ")
    ]
    assert leaning == []


def test_every_package_but_a_methods_says_in_two_lines_or_more_what_lives_there() -> None:
    packages = {path.parent: ast.parse((ROOT / path).read_text()) for path in product() if path.name == "__init__.py"}
    others = {str(folder): tree for folder, tree in packages.items() if not is_method(tree)}
    short = {name for name, tree in others.items() if len((ast.get_docstring(tree) or "").splitlines()) < 2}
    assert short == set()


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in product() if path.suffix == ".py"}
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_the_product_keeps_within_its_lines() -> None:
    assert sum(map(num_lines, product())) <= PRODUCT_LINES
    assert sum(num_lines(path) for path in product() if path.parts[0] == "serving") <= SERVING_LINES
