"""The promises that the repository's own files make to each other."""

import ast
import configparser
import fnmatch
import importlib.metadata
import os
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dilbert_jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FOLDERS = {"dilbert_jax": ROOT / "dilbert_jax", "dilbert_jax.data": ROOT / "data"}


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def code_lines(markdown: str) -> list[str]:
    """The lines inside fenced code blocks."""
    inside, lines = False, []
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif inside:
            lines.append(line.removeprefix("$ "))
    return lines


def requirement_names(text: str) -> set[str]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def source_files() -> list[tuple[str, Path]]:
    """Every Python file that is installed, with the name of its package."""
    found = []
    for name, folder in PACKAGE_FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            below = path.parent.relative_to(folder).parts
            found.append((".".join((name, *below)), path))
    return found


@pytest.mark.parametrize(
    ("wanted", "pieces"),
    [
        ("configs/quickstart", ("pip install", "python train.py --config=configs/quickstart.py")),
        ("pytest", ("pip install", "[test]", "python -m pytest")),
    ],
)
def test_readme_has_one_line_commands_from_a_bare_clone(readme, setup_cfg, wanted, pieces):
    lines = [line for line in code_lines(readme) if wanted in line]
    assert lines, f"README.md has no code line with {wanted!r}"
    command = lines[0]
    assert command.startswith("python3 -m venv .venv && ")
    assert not command.endswith("\\"), "the command must fit one line"
    for piece in pieces:
        assert piece in command
    extras = re.findall(r"\.\[([\w,]+)\]", command)
    for extra in ",".join(extras).split(",") if extras else ():
        assert setup_cfg.has_option("options.extras_require", extra)


def test_files_that_markdown_links_to_exist():
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    documents += sorted((ROOT / "docs").rglob("*.md"))
    links = [
        (document.name, target)
        for document in documents
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert links == []


def test_every_experiment_opens_with_its_command():
    experiments = sorted(
        p for p in (ROOT / "configs").glob("*.py") if "def get_config" in p.read_text("utf-8")
    )
    assert "quickstart" in {path.stem for path in experiments}
    for path in experiments:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        opening = "\n\n".join(docstring.split("\n\n")[:2])
        assert f"python train.py --config=configs/{path.name}" in opening, path.name


def test_setup_cfg_lists_exactly_the_packages_that_exist(setup_cfg):
    listed = setup_cfg["options"]["packages"].split()
    assert len(listed) == len(set(listed))
    packages = {package for package, path in source_files()}
    assert set(listed) == packages
    for package, path in source_files():
        assert (path.parent / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_every_data_file_of_a_package_is_installed(setup_cfg):
    (patterns,) = setup_cfg["options.package_data"].values()
    packages = set(setup_cfg["options"]["packages"].split())
    forgotten = []
    for name, folder in PACKAGE_FOLDERS.items():
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            parts = path.relative_to(folder).parts
            owner = len(parts) - 1
            while owner and ".".join((name, *parts[:owner])) not in packages:
                owner -= 1
            inner = "/".join(parts[owner:])
            if path.suffix != ".py" and not any(
                fnmatch.fnmatch(inner, p.strip()) and inner.count("/") == p.count("/")
                for p in patterns.split(",")
            ):
                forgotten.append(str(path.relative_to(ROOT)))
    assert forgotten == []


def imported_modules(tree: ast.Module, nodes: list[ast.stmt] | None = None) -> set[str]:
    """Top-level names of absolute imports among `nodes`, by default anywhere in `tree`."""
    names = set()
    for node in ast.walk(tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_every_import_is_declared(setup_cfg):
    core = requirement_names(setup_cfg["options"]["install_requires"])
    extras = set().union(*(requirement_names(text) for text in setup_cfg["options.extras_require"].values()))
    owners = importlib.metadata.packages_distributions()
    own = {"dilbert_jax"} | sys.stdlib_module_names
    undeclared = []
    for _, path in source_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # The PyTorch side is of no use without its extra.
        needs_extra = "parity" in path.parts
        at_import = set() if needs_extra else imported_modules(tree, tree.body)
        for module in sorted(imported_modules(tree) - own):
            allowed = core if module in at_import else core | extras
            distributions = {canonicalize_name(d) for d in owners.get(module, [module])}
            if not distributions & allowed:
                undeclared.append(f"{path.relative_to(ROOT)}: {module}")
    assert undeclared == []


def test_core_is_free_of_tensorflow_and_torch(setup_cfg):
    core = requirement_names(setup_cfg["options"]["install_requires"])
    assert not core & {"tensorflow", "tensorflow-cpu", "torch", "torchvision"}


def test_version_is_the_same_everywhere(setup_cfg):
    assert setup_cfg["metadata"]["version"] == "attr: dilbert_jax.__version__"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", changelog, re.MULTILINE)
    assert released[0][0] == dilbert_jax.__version__
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == dilbert_jax.__version__
    assert re.search(r"^date-released: (\S+)$", citation, re.MULTILINE)[1] == released[0][1]


def test_public_ci_calls_the_same_script_on_the_declared_versions(setup_cfg):
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert "run: bash .ci/run" in workflow
    assert os.access(ROOT / ".ci/run", os.X_OK)
    versions = re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", workflow)[1])
    assert versions == re.findall(r"Python :: (3\.\d+)", setup_cfg["metadata"]["classifiers"])


def test_license_is_apache_2(setup_cfg):
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert setup_cfg["metadata"]["license"] == "Apache-2.0"
