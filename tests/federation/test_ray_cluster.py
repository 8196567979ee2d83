"""The private Ray cluster is up when it is needed, and gone when the run is."""

import errno
import os
import sys
from pathlib import Path

import pytest
import ray

from fedpriv.errors import InputError
from fedpriv.federation.ray_cluster import (
    _environment_of_workers,
    cluster,
    ensure_started,
)
from fedpriv.runtime import RuntimeConfig

MALLOC = ("RAY_LD_PRELOAD_ON_WORKERS", "MALLOC_CONF")
PRELOADED = "RAY_preload_python_modules"


@pytest.fixture
def runtime():
    return RuntimeConfig(workers=2)


def test_workers_of_a_cluster_have_imported_all(runtime):
    @ray.remote
    def imported() -> tuple[bool, str]:
        return "fedpriv.federation.grids.ray" in sys.modules, Path("/proc/self/maps").read_text()

    with cluster(runtime):
        ensure_started(runtime)
        there, maps = ray.get(imported.remote())
        assert there
        assert "jemalloc" in maps
    assert not ray.is_initialized()


def test_a_failure_leaves_no_cluster(runtime):
    with pytest.raises(InputError), cluster(runtime):
        raise InputError("no such data")
    assert not ray.is_initialized()


def test_a_cluster_that_was_shut_down_is_started_again(runtime, monkeypatch):
    starts = []
    monkeypatch.setattr(ray, "init", lambda **arguments: starts.append(arguments))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    ensure_started(runtime)
    ensure_started(runtime)
    assert len(starts) == 2


def test_a_cluster_that_is_up_is_not_started_again(runtime, monkeypatch):
    starts = []
    monkeypatch.setattr(ray, "init", lambda **arguments: starts.append(arguments))
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(starts))
    with cluster(runtime):
        ensure_started(runtime)
        ensure_started(runtime)
    with cluster(runtime):  # somebody else's
        ensure_started(runtime)
    assert len(starts) == 1


def test_the_reason_for_no_cluster_is_told(runtime, monkeypatch):
    def fail(**_):
        raise RuntimeError("no ports left")

    monkeypatch.setattr(ray, "init", fail)
    with cluster(runtime), pytest.raises(InputError, match="no ports left; its logs"):
        ensure_started(runtime)


def failing(monkeypatch, error: Exception) -> None:
    def fail(**_):
        raise error

    monkeypatch.setattr(ray, "init", fail)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/ray"), ["/x/ray", "RAY_TMPDIR="]),
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left", "make room"]),
        (OSError(errno.EMFILE, "Too many open files"), ["Too many open files", "ulimit -n"]),
        (ValueError("one\ntwo"), ["not start: one; its logs", "session_latest"]),
        (RuntimeError(), ["RuntimeError", "session_latest"]),
    ],
)
def test_whatever_keeps_ray_from_starting_is_a_line_with_the_cure(
    error, words, runtime, monkeypatch
):
    failing(monkeypatch, error)
    with pytest.raises(InputError, match="Ray, which runs the simulated nodes") as caught:
        ensure_started(runtime)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_temporary_folder_too_long_for_a_socket_is_told(runtime, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(InputError, match="too long for a socket; name a short one") as caught:
        ensure_started(runtime)
    assert "\n" not in str(caught.value)
    assert not ray.is_initialized()


def test_a_cluster_that_cannot_be_joined_names_its_key(monkeypatch):
    failing(monkeypatch, ConnectionError("could not connect"))
    with pytest.raises(InputError, match=r"^runtime\.ray_address: 10\.0\.0\.9:1 cannot be joined"):
        ensure_started(RuntimeConfig(ray_address="10.0.0.9:1"))


def test_workers_may_preload_jemalloc_unless_somebody_preloads_another_library(
    runtime, monkeypatch
):
    for name in ("LD_PRELOAD", *MALLOC):
        monkeypatch.delenv(name, raising=False)
    with _environment_of_workers(runtime):
        assert os.environ["RAY_LD_PRELOAD_ON_WORKERS"] == "1"
        assert "dirty_decay_ms:60000" in os.environ["MALLOC_CONF"]
    assert not any(name in os.environ for name in MALLOC)
    monkeypatch.setenv("LD_PRELOAD", "")
    with _environment_of_workers(runtime):
        assert not any(name in os.environ for name in MALLOC)


def test_workers_find_modules_where_this_process_does(runtime, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.setattr(sys, "path", [*sys.path, "/only/here"])
    with _environment_of_workers(runtime):
        assert "/only/here" in os.environ["PYTHONPATH"].split(os.pathsep)
    assert os.environ["PYTHONPATH"] == "/before"


def test_processes_that_no_worker_will_take_over_import_nothing(runtime):
    with _environment_of_workers(runtime):
        assert "grids.ray" in os.environ[PRELOADED]
    with _environment_of_workers(runtime.model_copy(update={"threads_per_worker": 2})):
        assert PRELOADED not in os.environ


def test_workers_have_time_to_import_on_a_busy_machine(runtime, monkeypatch):
    name = "RAY_worker_register_timeout_seconds"
    monkeypatch.delenv(name, raising=False)
    with _environment_of_workers(runtime):
        assert int(os.environ[name]) > 60  # Ray's own, after which its start never ends
    monkeypatch.setenv(name, "30")
    with _environment_of_workers(runtime):
        assert os.environ[name] == "30"
