"""Before the first step: many processes as one program, compiled programs kept from run to run, where the time goes.

A program of many processes runs the same lines in each. What they do together (a step, a checkpoint, a gathered
array) all of them must reach; files that all share are written by the first one. Where one ends, all end: no
computation can go on without its devices, and the same command continues from the last checkpoint.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax._src import distributed  # its barrier has no public name
from jax.experimental import multihost_utils

from ditmem_jax import cli
from ditmem_jax.errors import UserError

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where Slurm, Open MPI or a TPU pod does not tell."
)
PROCESSES = flags.DEFINE_integer(
    "processes", None, "Number of processes; 1 for one that joins no others.", lower_bound=1
)
PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.", lower_bound=0)
COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    None,
    "Folder of compiled programs, or 'off'. By default that of JAX_COMPILATION_CACHE_DIR, or "
    "ditmem_jax/xla in the user's folder of caches.",
)
PATIENCE = 3600  # seconds for the slowest process to read, search or compile
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead


# --- the program ------------------------------------------------------------------------------------------------


class Program:
    """The whole of a command, as a context: joins the other processes and keeps what is compiled.

    With several processes an error ends this one at once and without farewell, which would wait for the others; they
    notice within HEARTBEAT seconds.
    """

    def __enter__(self) -> "Program":
        keep_compiled(COMPILE_CACHE.value)
        join(COORDINATOR.value, PROCESSES.value, PROCESS.value)
        if jax.process_count() > 1:
            _tell_why_it_aborts()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, SystemExit) or jax.process_count() == 1:
            return
        if isinstance(error, jax.errors.JaxRuntimeError) and not cli.DEBUG.value:
            error = UserError(
                "a computation of all processes failed",
                found=str(error).splitlines()[0],
                fix="if another process has ended, see why; then start all again: the same command continues",
            )
        if isinstance(error, UserError) and not cli.DEBUG.value:
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _tell_why_it_aborts() -> None:
    """Ends an abort with a message. The runtime aborts, past all Python, when another process has ended."""

    def abort(_: int) -> None:
        error = UserError(
            "this process was aborted: another process of the program has ended or cannot be reached, or see above",
            fix="see why; then start all again: the same command continues",
        )
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _tell_why_it_aborts.handler = kind(abort)  # must live as long as the process
    ctypes.CDLL(None).signal(signal.SIGABRT, _tell_why_it_aborts.handler)


def keep_compiled(folder: str | None) -> None:
    """Keeps compiled programs in `folder`, see COMPILE_CACHE."""
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder)
    elif jax.config.jax_compilation_cache_dir is None:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(caches, "ditmem_jax", "xla")))


def keep_freed_memory() -> None:
    """Keeps glibc from giving freed memory back to the kernel; elsewhere it does nothing.

    On CPUs XLA allocates all that a step needs anew each time: for a small network hundreds of megabytes that the
    kernel would hand out zeroed, page by page. Kept, gradients of the tiny transformer over 64 clips took 0.20 s
    instead of 0.27 s on two cores. With large networks it costs more than it saves: arrays of gigabytes leave gaps
    that nothing fits, and the process grew to twice its size.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1)):
            mallopt(option, value)


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of the program; what is None is detected, and a program by itself joins none.

    Raises:
        UserError: if the arguments do not go together, or the others cannot be reached.
    """
    tasks = next(
        (os.environ[name] for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE") if name in os.environ), None
    )
    if processes == 1 or (processes is None and coordinator is None and tasks == "1"):
        return
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    named = any(value is not None for value in given.values())
    if process is not None and processes is not None and process >= processes:
        raise UserError(
            "no such process", expected=f"--process below --processes = {processes}", found=process
        )
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the loops
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError as error:  # nothing detected
        if named or "JAX_COORDINATOR_ADDRESS" in os.environ:
            raise UserError(
                "the processes cannot join",
                expected="--coordinator, --processes and --process together, or a cluster that tells them",
                found=", ".join(f"{name}={value}" for name, value in given.items() if value is not None),
                fix=str(error),
            ) from error
    except RuntimeError as error:
        raise UserError(
            "the processes cannot join",
            found=str(error).splitlines()[0],
            fix="start all of them within minutes; is the port of process 0 free, and open to the others? "
            "One that is to join no others takes --processes=1",
        ) from error


# --- what processes do together -----------------------------------------------------------------------------------


def leads() -> bool:
    """Whether this is the process that writes what all share."""
    return jax.process_index() == 0


def meet() -> None:
    """Waits until all processes are here.

    The devices have no part in it: what they do together fails if one of them keeps the others waiting for long.
    """
    if jax.process_count() > 1:
        distributed.global_state.client.wait_at_barrier(f"ditmem_jax {next(_meetings)}", PATIENCE * 1000)


_meetings = itertools.count()


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
    """The leading process runs the block before the others do. All must reach it."""
    if not leads():
        meet()
    yield
    if leads():
        meet()


def compiled(function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """A jitted function compiled for arguments, or their layouts, by all processes before any goes on."""
    program = function.lower(*arguments).compile()
    meet()
    return program


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process. All must ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


# --- where the time goes ------------------------------------------------------------------------------------------


class Phases:
    """Seconds from when it is made to the first step, by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, name: str) -> None:
        """What has happened since the last call, or since the beginning, was phase `name`."""
        now = time.perf_counter()
        self.seconds[name], self._since = now - self._since, now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s: {parts}"
