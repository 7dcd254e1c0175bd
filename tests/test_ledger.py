"""The paper ledger names what exists: decisions, equations, fields, tests and functions, and every default."""

import importlib
import pathlib
import re

import pytest

from dilbert_jax.config import default_config

TESTS = pathlib.Path(__file__).parent
LEDGER = TESTS.parent / "docs" / "paper_ledger.md"
LAST_SECTION = "## All switches"


def flat_defaults() -> dict[str, object]:
    config = default_config().to_dict()
    sections = {name: value for name, value in config.items() if isinstance(value, dict)}
    return {f"{section}.{field}": v for section, fields in sections.items() for field, v in fields.items()}


def generated_section() -> str:
    """Every field with its default, as the ledger's last section lists them."""
    text = LEDGER.read_text(encoding="utf-8")
    head = text[text.index(LAST_SECTION) :].split("| field |")[0]
    rows = [f"| `{name}` | {value!r} |" for name, value in flat_defaults().items()]
    return head + "\n".join(["| field | default |", "|---|---|", *rows]) + "\n"


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    parts = re.split(r"^## ", LEDGER.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {part.splitlines()[0]: part for part in parts}


def rows(section: str) -> list[list[str]]:
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def column(section: str, name: str) -> list[str]:
    heading = next(line for line in section.splitlines() if line.startswith("| "))
    index = [cell.strip() for cell in heading.strip("|").split("|")].index(name)
    return [row[index] for row in rows(section)]


def test_every_decision_equation_table_and_figure_has_its_row(sections):
    assert [row[0] for row in rows(sections["Decisions"])] == [f"D{i}" for i in range(1, 23)]
    assert [row[0] for row in rows(sections["Equations"])] == [f"({i})" for i in range(1, 17)]
    items = [f"Table {n}" for n in ("IV", "V", "VI", "VII")] + [f"Figure {n}" for n in range(7, 11)]
    assert [row[0] for row in rows(sections["Tables and figures"])] == items
    assert {"MLM", "MDC", "MOC", "CMM"} <= {row[0] for row in rows(sections["Tasks"])}


@pytest.mark.parametrize("section", ["Decisions", "Decisions of this project", "Tasks", "Settings"])
def test_fields_exist(sections, section):
    defaults = flat_defaults()
    for cell in column(sections[section], "field"):
        names = re.findall(r"`([^`]+)`", cell)
        assert names or cell.startswith("–"), cell
        assert not [name for name in names if name not in defaults]


@pytest.mark.parametrize("section", ["Decisions", "Decisions of this project", "Equations", "Tasks"])
def test_tests_exist(sections, section):
    for cell in column(sections[section], "test"):
        names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cell)
        assert names, cell
        for file, name in names:
            source = (TESTS / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file} holds no {name}"


def test_functions_exist(sections):
    for cell in column(sections["Equations"], "code"):
        module, name = cell.strip("`").rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), name))


def test_every_switch_of_the_losses_has_a_row(sections):
    named = set(re.findall(r"`([\w.]+)`", "".join(v for k, v in sections.items() if k != LAST_SECTION[3:])))
    losses = {name for name in flat_defaults() if name.startswith("loss.")}
    assert losses <= named


def test_the_list_of_switches_is_todays():
    text = LEDGER.read_text(encoding="utf-8")
    assert text[text.index(LAST_SECTION) :] == generated_section(), "run: python tests/test_ledger.py"


if __name__ == "__main__":
    whole = LEDGER.read_text(encoding="utf-8")
    LEDGER.write_text(whole[: whole.index(LAST_SECTION)] + generated_section(), encoding="utf-8")
