"""The Ray cluster of a simulation. Its start takes seconds, which others may use."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import ray
import torch

from fedpriv.disk import has_no_room
from fedpriv.errors import InputError
from fedpriv.runtime import RuntimeConfig

_IMPORTED_BY_WORKERS = ("fedpriv.federation.grids.ray",)
# Set by this package: without it Ray hides all GPUs from whoever takes no share of one.
_SHOWN_GPUS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
# For so many seconds a worker may import; by default for 60, which a busy machine takes at times.
_PATIENCE = "RAY_worker_register_timeout_seconds"
_TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
# One thread, as there is one cluster a process. It lives as long as the process does: the kernel
# ends Ray's processes with the thread that started them.
_thread = ThreadPoolExecutor(1, "ray-start")


@contextmanager
def cluster(runtime: RuntimeConfig) -> Iterator[None]:
    """Start the cluster, which `ensure_started` waits for; shut it down when the body has ended."""
    start = _thread.submit(_start, runtime)
    try:
        yield
    finally:
        wait([start])
        ray.shutdown()


def ensure_started(runtime: RuntimeConfig) -> None:
    """Return when the cluster is up, which is started where it is not.

    Raises:
        InputError: it cannot be, with the reason and the cure.
    """
    try:
        _thread.submit(_start, runtime).result()
    except Exception as error:  # Ray raises many kinds: of Python, its own, and of gRPC
        raise InputError(_why_not(runtime, error)) from error
    # Ray has put a handler of its own, which ends the process, in the place of Python's.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _why_not(runtime: RuntimeConfig, error: Exception) -> str:
    """Say in a line why Ray does not start, and what to do about it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "/tmp")
    if runtime.ray_address is not None:
        cure = (
            "write the address of a cluster that is up and has this Ray "
            f"({ray.__version__}), such as 10.0.0.1:6379, or null to start one here"
        )
        return f"runtime.ray_address: {runtime.ray_address} cannot be joined ({lines[0]}); {cure}"
    if "AF_UNIX" in str(error):
        why = "the path of its temporary folder is too long for a socket"
        cure = "name a short one, such as RAY_TMPDIR=/tmp"
    elif isinstance(error, OSError) and error.errno in _TOO_MANY_FILES:
        why, cure = str(error.strerror), "allow more: ulimit -n 65536"
    elif has_no_room(error):
        why, cure = f"{folder}: {lines[0]}", "make room, or name another: RAY_TMPDIR=/tmp"
    elif isinstance(error, OSError) and error.filename is not None:
        why = f"{error.filename}: {error.strerror}"
        cure = f"it writes below {name}={folder}; name another: RAY_TMPDIR=/tmp"
    else:
        why = lines[0]
        cure = (
            f"its logs, in {folder}/ray/session_latest/logs, may say more; memory, /dev/shm, "
            "processes (ulimit -u) and open files (ulimit -n) are what it is often short of"
        )
    return f"Ray, which runs the simulated nodes, does not start: {why}; {cure}"


def _start(runtime: RuntimeConfig) -> None:
    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    with _environment_of_workers(runtime):
        ray.init(**_arguments(runtime))


def _arguments(runtime: RuntimeConfig) -> dict[str, Any]:
    """Return the arguments of `ray.init`: a private cluster unless one is named.

    Without an address Ray would silently join any cluster that it finds on this machine.
    """
    where: dict[str, Any]
    if runtime.ray_address is None:
        where = {"address": "local", "num_cpus": runtime.workers * runtime.threads_per_worker}
        if runtime.gpus_per_worker:  # Ray would look for them, and does not always find them
            where["num_gpus"] = torch.cuda.device_count()
    else:
        # Its processes did not inherit ours.
        inherited = {"PYTHONPATH": _module_paths(), _SHOWN_GPUS: os.environ[_SHOWN_GPUS]}
        where = {"address": runtime.ray_address, "runtime_env": {"env_vars": inherited}}
    return where | {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}


def _module_paths() -> str:
    return os.pathsep.join(sys.path)


@contextmanager
def _environment_of_workers(runtime: RuntimeConfig) -> Iterator[None]:
    """Set what processes that Ray starts here inherit: their modules, and jemalloc.

    Ray starts a process for every CPU at once, of which Flower's actors take as many as there are
    workers. Where that is all of them, they import what they need before they are asked for it.

    Ray's wheels bring jemalloc along. It hands out the memory that was freed last, which the
    processor's caches still hold, and is told to keep it for a minute, pieces of 8 MiB and more
    too: a twentieth of a small model's time, a tenth of that of uneven users. Pieces of different
    sizes are not joined before they are given back, so that where sizes vary, as those of speech
    do, keeping all for ever would hold twice what is needed. Whoever preloads a library of their
    own, or has set jemalloc up, is left alone.
    """
    wanted = {"PYTHONPATH": _module_paths()}
    # Whoever starts a cluster waits for its first workers; those that are given up never come.
    if _PATIENCE not in os.environ:
        wanted[_PATIENCE] = "600"
    if runtime.threads_per_worker == 1:
        wanted["RAY_preload_python_modules"] = ",".join(_IMPORTED_BY_WORKERS)
    malloc = {
        "RAY_LD_PRELOAD_ON_WORKERS": "1",
        "MALLOC_CONF": "dirty_decay_ms:60000,muzzy_decay_ms:-1,oversize_threshold:0",
    }
    if "LD_PRELOAD" not in os.environ and not malloc.keys() & os.environ:
        wanted |= malloc
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
