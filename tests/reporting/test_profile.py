import io
import json

from in_process import InProcessGrid, train_small
from rich.console import Console

from fedpriv.reporting.profile import Profile
from fedpriv.training.spans import Span, Stopwatch


def text_of(profile: Profile) -> str:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(profile.table())
    return capture.get()


def test_a_stopwatch_records_what_is_finished_and_nothing_when_off():
    on, off = Stopwatch(on=True), Stopwatch(on=False)
    for watch in (on, off):
        with watch.measure("outer"), watch.measure("inner"):
            pass
    assert [span.name for span in on.spans] == ["inner", "outer"]
    inner, outer = on.spans
    assert outer.start <= inner.start <= inner.end <= outer.end
    assert off.spans == []


def test_the_table_gives_the_mean_round_and_what_lies_between_server_and_workers():
    profile = Profile()
    for first in (0.0, 10.0):
        server = [
            Span("draw and ask", first - 1, first),
            Span("draw noise", first, first + 2),
            Span("wait for workers", first + 2, first + 3),
        ]
        profile.add(server, [[Span("data", first, first + 1)], [Span("data", first, first + 2.5)]])
    rows = [line.split() for line in text_of(profile).splitlines()]
    assert ["server", "draw", "noise", "2000.0", "50.0%"] in rows
    assert ["server", "wait", "for", "workers", "1000.0", "25.0%"] in rows
    assert ["worker", "0", "data", "1000.0", "25.0%"] in rows
    assert ["between", "messages", "500.0", "12.5%"] in rows


def test_a_run_is_profiled_where_that_is_asked_for(tmp_path):
    directory, prepared = train_small(tmp_path / "run", runtime__profile=True, rounds=2)
    events = json.loads(directory.trace.read_text())["traceEvents"]
    names = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert set(names) == {"server", "worker 0", "worker 1"}
    spans = [event for event in events if event["ph"] == "X"]
    begins = [event["ts"] for event in spans]
    assert min(begins) >= 0
    # In microseconds: nothing that is timed here takes an hour, and training takes some.
    assert (
        0 < sum(event["dur"] for event in spans if event["name"] == "forward and backward") < 3.6e9
    )
    by_worker = {event["name"] for event in spans if event["tid"] == names["worker 1"]}
    assert by_worker == {"data", "forward and backward", "clip and sum"}
    by_server = [event["name"] for event in spans if event["tid"] == names["server"]]
    assert by_server == 2 * [
        "draw and ask", "draw noise", "wait for workers", "add up", "noise and ledger",
        "server step", "evaluate", "write",
    ]  # fmt: skip
    assert "forward and backward" in text_of(prepared.profile)


def test_without_being_asked_nothing_is_recorded_and_the_run_is_the_same(tmp_path):
    _, one = train_small(tmp_path / "one", runtime__profile=True)
    plain, two = train_small(tmp_path / "two")
    assert not plain.trace.exists()
    assert one.server.parameters().equal(two.server.parameters())


def test_a_deployment_does_not_say_how_long_its_users_took(tmp_path):
    _, prepared = train_small(
        tmp_path / "run", InProcessGrid(), runtime__profile=True, runtime__deployment=True, rounds=1
    )
    assert "worker" not in text_of(prepared.profile).replace("wait for workers", "")
