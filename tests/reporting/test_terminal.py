"""User text is printed as it is, in any encoding; numbers are never cut, however narrow it is."""

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from fedpriv.privacy import planning
from fedpriv.privacy.composition import merge
from fedpriv.reporting import budget, ledgers, terminal
from fedpriv.reporting.progress import ProgressLines
from fedpriv.reporting.summary import seed_model_table, summary_table
from fedpriv.reporting.terminal import Column, FittedTable, in_a_shell, one_line, print_lines

NASTY = ["a[lr=0.1]", "[red]x[/red]", "[/]", "a\\[b]", ":fire:", "a b", "-x", "naïve ε", "$HOME"]
PRIVACY = {
    "delta": 1e-5,
    "noise_multiplier": 1.1,
    "sampling": {"kind": "poisson", "expected_cohort": 100},
    "clipping": {"kind": "per_layer", "bound": 0.5},
}
WIDTHS = [200, 80, 60, 45, 30, 20, 14]


def shown(renderable, width: int) -> str:
    # A console as a caller may have made it: with markup.
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*(?:e[-+]?\d+)?", text)


def assert_fits(renderable) -> None:
    """Each number that is shown is whole, as it is where there is room."""
    whole = set(numbers(shown(renderable, 300)))
    for width in WIDTHS:
        narrow = shown(renderable, width)
        assert "…" not in narrow
        assert set(numbers(narrow)) <= whole, narrow


def test_no_number_breaks_in_a_summary_and_epsilon_stays(make_run) -> None:
    runs = [make_run(), make_run("b", privacy=None)]
    table = summary_table(runs)
    # The labels of two runs of one name hold the names of their folders, which may be folded.
    table._rows = [((Text("tiny"), *cells[1:]), style) for cells, style in table._rows]
    assert_fits(table)
    epsilons = re.findall(r"\d+\.\d{3}\b", shown(table, 300))
    assert len(epsilons) == 2
    for width in WIDTHS:
        assert all(word in shown(table, width) for word in (*epsilons, "privacy"))


def test_no_number_breaks_in_a_ledger_or_a_merge(make_run) -> None:
    paths = [make_run(), make_run("b", rounds=7)]
    opened = [ledgers.open_ledger(path) for path in paths]
    bill = opened[0].account.bill(1e-5)
    tables = [
        ledgers.ledger_table(opened[0], bill),
        ledgers.merged_table(merge([each.account for each in opened], None)),
    ]
    for group in tables:
        _, table, *_ = group.renderables  # the heading names the path
        rows = [[Text("run") if "/" in c.plain else c for c in cells] for cells, _ in table._rows]
        table._rows = [(tuple(cells), "") for cells in rows]
        assert_fits(table)


def test_no_number_breaks_in_plans() -> None:
    question = planning.BudgetQuestion(
        population=1_000_000,
        deltas=(1e-9,),
        rounds=1000,
        cohort=1234.5,
        noise_multiplier=1.25,
        epsilon=None,
        sampling="poisson",
        adjacency=None,
        solve=None,
    )
    plan = budget.plan_table(planning.answer(question))
    assert_fits(plan)
    measures = {"held_out": {"wer": 0.123, "cer": 0.045, "words": 12_345}}
    assert_fits(seed_model_table(measures, "outside"))


def test_columns_go_from_the_end_and_are_named() -> None:
    run, epsilon = Column("run", text=True, kept=True), Column("ε", kept=True)
    table = FittedTable(run, epsilon, Column("a"), Column("b"))
    table.row("name", "12.345", "1111111", "2222222")
    assert "2222222" in shown(table, 40)
    narrow = shown(table, 22)
    assert "2222222" not in narrow
    assert "1111111" in narrow
    assert "(too narrow for: b)" in " ".join(narrow.split())
    assert "ε: 12.345" in shown(table, 9)


@pytest.mark.parametrize("name", NASTY)
def test_no_name_is_read_as_markup(name) -> None:
    table = FittedTable(Column(name, text=True), Column(name), title=name)
    table.row(name, name)
    assert shown(table, 200).count(name) == 5
    to = Console(width=300, file=io.StringIO())
    print_lines(to, name)
    assert to.file.getvalue() == name + "\n"


def test_no_path_is_read_as_markup(make_run) -> None:
    path = make_run("[lr=0.1] [red]x[] :fire: ε", privacy={**PRIVACY, "accountants": ["rdp"]})
    console = Console(width=300, file=io.StringIO())
    opened = ledgers.open_ledger(path)
    console.print(ledgers.ledger_table(opened, opened.account.bill(1e-5)), soft_wrap=True)
    console.print(ledgers.verified_lines(ledgers.verify(path)), soft_wrap=True)
    ProgressLines(console).say(f"see {path}")
    assert console.file.getvalue().count(str(path)) == 3


@pytest.mark.parametrize("name", [*NASTY, "it's", "two\nlines", "tab\there", "back\\slash\n'"])
def test_a_path_in_a_command_is_what_the_shell_reads(name) -> None:
    printed = in_a_shell(Path(name))
    assert one_line(printed) == printed
    script = f"printf %s {printed}"
    read = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode()
    assert Path(read) == Path(name)
    assert not read.startswith("-")


def test_plain_paths_need_no_quotes() -> None:
    assert in_a_shell(Path("runs/vit-digits/1")) == "runs/vit-digits/1"


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", b"epsilon = 1 - 2, na\\xefve caf\\udce9"),
        ("latin-1", b"epsilon = 1 - 2, na\xefve caf\\udce9"),
        ("utf-8", "ε = 1 – 2, naïve caf\\udce9".encode()),
    ],
)
def test_any_text_goes_to_any_encoding(encoding, printed) -> None:
    """In a process of its own: the streams of this one are pytest's."""
    code = (
        "from fedpriv.reporting import terminal as t; t.let_print_anything();"
        "import os; text = 'ε = 1 – 2, naïve ' + os.fsdecode(b'caf\\xe9');"
        "t.print_lines(t.console(), text); t.print_lines(t.console(stderr=True), text); print(text)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [printed, printed]
    assert done.stderr.splitlines() == [printed]


def test_columns_are_as_wide_as_what_is_spelled() -> None:
    table = FittedTable(Column("ε"), Column("b"))
    table.row("1", "2")
    console = Console(width=80, file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    console.print(table)
    console.file.flush()
    head, _, row = console.file.buffer.getvalue().decode().splitlines()
    assert head.replace("|", " ").split() == ["epsilon", "b"]
    assert row.index("2") == head.index("b")


def test_files_get_whole_lines_and_terminals_their_width(monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal.console().width == 400
    monkeypatch.setenv("COLUMNS", "33")
    assert terminal.console().width == 33
    for useless in ("0", "", "wide"):
        monkeypatch.setenv("COLUMNS", useless)
        assert terminal.console().width == 400


PLAN = "budget plan --population 1000 --cohort 10 --rounds 9 --noise-multiplier 9 --delta 1e-5"


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "fedpriv", *arguments],
        capture_output=True,
        env={**os.environ, **environment},
    )


def test_what_is_inherited_ends_no_command() -> None:
    """A notebook's backend, warnings as errors, no home, a dumb terminal, and no UTF-8."""
    inherited = {
        "MPLBACKEND": "module://not.installed",
        "PYTHONWARNINGS": "error",
        "HOME": "/nonexistent",
        "TERM": "dumb",
        "NO_COLOR": "1",
        "LC_ALL": "C",
        "COLUMNS": "0",
        "PYTHONIOENCODING": "ascii",
        "OMP_NUM_THREADS": "many",
    }
    done = command(inherited, *PLAN.split())
    assert done.returncode == 0, done.stderr
    assert b"epsilon by RDP" in done.stdout


def test_a_working_directory_that_is_gone_is_a_line(tmp_path) -> None:
    (tmp_path / "gone").mkdir()
    script = f'cd gone; rmdir ../gone; "{sys.executable}" -m fedpriv {PLAN}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: the working directory is gone")
    assert len(done.stderr.splitlines()) == 1


def test_what_takes_its_time_says_so_once_where_there_is_no_terminal(monkeypatch) -> None:
    """And what does not says nothing, nor anything after it is over."""
    console = Console(file=io.StringIO())
    with terminal.working(console, "computing ε"):
        pass
    monkeypatch.setattr(terminal, "_SHORT", 0.01)
    with pytest.raises(ValueError), terminal.working(console, "computing"):
        raise ValueError
    assert console.file.getvalue() == ""
    with terminal.working(console, "reading [the] run"):
        until = time.monotonic() + 30
        while not console.file.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert console.file.getvalue() == "reading [the] run …\n"
