"""Many processes as one program: joining them, and what they do together.

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
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its barrier has no public name
from jax.experimental import multihost_utils

from ditmem_jax.errors import UserError

PATIENCE = 3600  # seconds for the slowest process to read, search or compile
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead


# --- the program ------------------------------------------------------------------------------------------------


class Program:
    """The processes of a command, as a context: joins the others on entry; see `join` for the arguments.

    With several processes an error ends this one at once and without farewell, which would wait for the others; they
    notice within HEARTBEAT seconds.

    Args:
        debug: show the traceback behind an error.
    """

    def __init__(
        self,
        coordinator: str | None = None,
        processes: int | None = None,
        process: int | None = None,
        *,
        debug: bool = False,
    ):
        self._given, self._debug = (coordinator, processes, process), debug

    def __enter__(self) -> "Program":
        join(*self._given)
        if jax.process_count() > 1:
            _explain_aborts()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, SystemExit) or jax.process_count() == 1:
            return
        if isinstance(error, jax.errors.JaxRuntimeError) and not self._debug:
            error = UserError(
                "a computation of all processes failed",
                found=str(error).splitlines()[0],
                fix="if another process has ended, see why; then start all again: the same command continues",
            )
        if isinstance(error, UserError) and not self._debug:
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _explain_aborts() -> None:
    """Ends an abort with a message. The runtime aborts, past all Python, when another process has ended."""

    def abort(_: int) -> None:
        error = UserError(
            "this process was aborted: another process of the program has ended or cannot be reached, or see above",
            fix="see why; then start all again: the same command continues",
        )
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _explain_aborts.handler = kind(abort)  # must live as long as the process
    ctypes.CDLL(None).signal(signal.SIGABRT, _explain_aborts.handler)


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


def is_primary() -> bool:
    """Return True in the process that writes what all share."""
    return jax.process_index() == 0


def barrier() -> None:
    """Waits until all processes are here.

    The devices have no part in it: what they do together fails if one of them keeps the others waiting for long.
    """
    if jax.process_count() > 1:
        distributed.global_state.client.wait_at_barrier(f"ditmem_jax {next(_meetings)}", PATIENCE * 1000)


_meetings = itertools.count()


@contextlib.contextmanager
def primary_first() -> Iterator[None]:
    """The leading process runs the block before the others do. All must reach it."""
    if not is_primary():
        barrier()
    yield
    if is_primary():
        barrier()


def any_process(flag: bool) -> bool:
    """Return True if `flag` is true in any process. All must ask."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())
