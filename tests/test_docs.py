"""What README and docs say exists: links, commands with their options, keys, errors, scripts."""

import importlib.util
import re
import textwrap
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from in_process import small_config
from torch import nn

import fedpriv
from fedpriv import experiment
from fedpriv.cli import app
from fedpriv.components import KINDS
from fedpriv.config import ExperimentConfig
from fedpriv.config_files import parse_config
from fedpriv.sections import Section

ROOT = Path(fedpriv.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
HOOK = DOCS / "hooks" / "config_reference.py"
_CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
_STARTS = re.compile(r"(?:^|&& |\$ |\.venv/bin/|`)fedpriv (?=[a-z])(.*)", re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_of(page: Path) -> str:
    """Return what stands in code, a command to a line."""
    whole = "\n".join(_CODE.findall(text_of(page)))
    return re.sub(r"\\\n\s*", " ", whole.replace("\\|", "|"))


def commands_of(page: Path) -> list[str]:
    """Return what follows `fedpriv` in each command of a page."""
    return [
        re.split(r" && | # | \| |`|\s{2,}#", line)[0] for line in _STARTS.findall(code_of(page))
    ]


def config_reference():
    spec = importlib.util.spec_from_file_location("config_reference", HOOK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrong_with(command: str) -> str:
    """Return what in a command there is not: a word of it, or an option; "" where all is well."""
    found = [typer.main.get_command(app)]
    for word in command.replace("[", " ").replace("]", " ").split():
        if all(hasattr(each, "commands") for each in found):
            names = word.split("|")
            if missing := [name for name in names if name not in found[0].commands]:
                return f"no command {missing[0]}"
            found = [found[0].commands[name] for name in names]
        elif word.startswith("--"):
            option = word.partition("=")[0]
            known = {each for one in found for p in one.params for each in p.opts} | {"--help"}
            if option not in known:
                return f"no option {option}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_within_the_project_leads_somewhere(page):
    prose = _CODE.sub("", text_of(page))
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose)]
    local = [link for link in links if link and "://" not in link]
    made = DOCS / config_reference().PAGE
    gone = [link for link in local if (page.parent / link).resolve() != made]
    assert [link for link in gone if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_exists_with_its_options(page):
    wrong = {command: wrong_with(command) for command in commands_of(page)}
    assert {command: why for command, why in wrong.items() if why} == {}


def test_commands_are_found_and_wrong_ones_are_told():
    assert sum(len(commands_of(page)) for page in PAGES) > 40
    assert wrong_with("run configs/vit_digits.yaml --set rounds=2 --profile") == ""
    assert wrong_with("run CONFIG --sett rounds=2") == "no option --sett"
    assert wrong_with("config show|validat CONFIG") == "no command validat"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_and_target_that_code_names_exists(page):
    code = code_of(page)
    named = re.findall(r"(?<![\w./-])(?:simulations|configs|docker|tests)/[\w/.-]*\w", code)
    assert [name for name in named if not (ROOT / name).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    asked = set(re.findall(r"(?:^|`)make ([a-z-]+)", code, re.MULTILINE))
    assert asked <= targets


def test_the_tutorials_are_shown_whole():
    """A formatter of Python would take the mark of a file on one line for an expression."""
    text = text_of(DOCS / "tutorials.md")
    shown = re.findall(r"^--8<--\n(tutorials/\w+\.py)\n--8<--$", text, re.MULTILINE)
    assert sorted(shown) == sorted(f"tutorials/{each.name}" for each in DOCS.glob("tutorials/*.py"))


def sections_of(model: type[Section]) -> set[type[Section]]:
    """Return a class of options and all those below it."""
    found, left = set(), [model]
    while left:
        one = left.pop()
        if isinstance(one, type) and issubclass(one, Section) and one not in found:
            found.add(one)
            left += [field.annotation for field in one.model_fields.values()]
        left += getattr(one, "__args__", ())
    return found


def test_the_config_reference_has_every_key_and_component():
    page = config_reference().page()
    keys = {key for one in sections_of(ExperimentConfig) for key in one.model_fields}
    assert {"noise_multiplier", "cache_mib", "warmup_rounds"} <= keys
    for kind in (each for each in KINDS.values() if each.registered):
        for name in kind.registered:
            assert f"`{kind.key}: {{{kind.name_key}: {name}}}`" in page
            for one in sections_of(kind.find(name).options):
                keys |= set(one.model_fields)
    assert [key for key in sorted(keys) if f"| `{key}` |" not in page] == []
    assert "| `seed` | integer ≥ 0, < 2^63 |" in page
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_errors_of_the_faq_are_those_of_the_code():
    whole = "".join(text_of(path) for path in sorted((ROOT / "fedpriv").rglob("*.py")))
    said = re.sub(r"\"\s*\n\s*f?\"", "", whole)
    errors = re.findall(r"^### `(.*)`$", text_of(DOCS / "faq.md"), re.MULTILINE)
    parts = [part.strip() for error in errors for part in error.split("…") if part.strip()]
    assert len(errors) > 8
    assert [part for part in parts if part not in said] == []


def network(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[1] ** 2, classes))


@pytest.mark.parametrize("page", ["flower", "opacus"])
def test_an_experiment_for_those_who_come_from_elsewhere_is_one(page):
    text = text_of(DOCS / "coming_from" / f"{page}.md")
    (code,) = re.findall(r"```python\n(    import fedpriv\n.*?)    run = ", text, re.DOTALL)
    names = {"network": network}
    exec(textwrap.dedent(code), names)
    assert names["experiment"].config.privacy.noise_multiplier > 0


def test_a_config_for_those_who_come_from_elsewhere_is_one():
    text = text_of(DOCS / "coming_from" / "pfl.md")
    (code,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    document = yaml.safe_load(textwrap.dedent(code))
    assert parse_config({**document, "model": {"name": network}}).privacy.noise_multiplier == 3.03


def test_the_privacy_library_is_shown_whole_and_its_example_is_right(capsys):
    text = text_of(DOCS / "reference" / "privacy.md")
    missing = [name for name in fedpriv.privacy.__all__ if f".{name}\n" not in text]
    assert missing == ["ACCOUNTANTS", "MECHANISMS", "SPLITS"]  # tables
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.strip() == re.findall(r"# (8\.\d+)", code)[0]


def test_the_mechanism_of_the_page_on_extending_is_one(tmp_path):
    text = text_of(DOCS / "extending.md")
    (code,) = re.findall(r"```python\n([^`]*class LoudStart.*?)```", text, re.DOTALL)
    (named,) = re.findall(r"```yaml\n([^`]*LoudStart.*?)```", text, re.DOTALL)
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    mechanism = yaml.safe_load(named)["privacy"]["mechanism"]
    config = small_config(code=str(tmp_path), privacy__mechanism=mechanism, rounds=40)
    plan = experiment.prepare(config).plan  # its noise is drawn on trial
    source = plan.mechanism.noise(plan.sizes, plan.randomness, lambda round_: 0)
    loud, usual = (source.draw(r, 0, plan.mechanism.gaussian).std() for r in (1, 2))
    assert 1.3 < loud / usual < 1.7


def test_extras_whose_installation_was_measured_are_there():
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    measured = re.findall(r"^\| `fedpriv\[([\w-]+)\]` \|", text_of(DOCS / "speed.md"), re.MULTILINE)
    assert len(measured) > 5
    assert set(measured) <= set(project["optional-dependencies"])
