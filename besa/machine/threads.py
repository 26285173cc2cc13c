"""Several threads at once: torch's own for compiled kernels, which numba's functions enter without Python."""

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType
from typing import no_type_check

import numpy as np
import torch

try:
    import numba
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic
except ImportError:  # numba trails new Python releases
    numba = None

THREAD = 2**15
"""Elements that take a thread as long as it takes to start one."""


def over_rows(kernel: Callable, rows: int, *args, work: int) -> None:
    """kernel(first, last, *args) for ranges of the rows, one per thread; `work`: elements to pass over, says how many.

    By torch's own threads, not numba's or Python's: torch's wait for their next work without giving up the processor,
    for longer than a kernel takes. They enter compiled code as it is, for Python lets in one at a time.

    Raises:
        MemoryError: a kernel found no room.
    """
    n = min(torch.get_num_threads(), 1 + work // THREAD)
    if (team := _team()) is not None or n == 1:
        failed = kernel(team or (0, 0, 0), n, 0, rows, args)
    else:
        edges = itertools.pairwise(rows * i // n for i in range(n + 1))
        failed = any(list(_pool().map(lambda edge: kernel((0, 0, 0), 1, *edge, args), edges)))
    if failed:
        raise MemoryError(f"no room for a pass over {rows} rows")


def sort_rows(matrix: np.ndarray) -> np.ndarray:
    """Each row from low to high, in place: with AVX-512, numpy takes a ninth to half of torch's time."""
    parts = np.array_split(matrix, min(torch.get_num_threads(), 1 + matrix.size // THREAD))
    list(_pool().map(lambda part: part.sort(axis=1), parts))
    return matrix


@functools.cache
def _team() -> tuple[int, int, int] | None:
    """What starts torch's OpenMP threads and says how many there are and which one this is; None: not found."""
    names = "GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num"
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        library = ctypes.CDLL(str(path))  # which is loaded already
        if all(hasattr(library, name) for name in names):
            return tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names)
    return None


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="besa")


if numba is not None:
    ADDRESS, INT, SHORT = ir.IntType(8).as_pointer(), ir.IntType(64), ir.IntType(32)

    @no_type_check
    def in_threads(kernel):
        """Compile kernel(first, last, *args) for `over_rows`, which calls it as (team, n, first, last, args).

        What comes back is not 0 where one of the n threads failed. numba keeps compiled functions by file, line and
        name, and only those without a closure: what enters is called what the kernel is, as if it stood there. What was
        kept counts as new until that file changes: change those with kernels along with this one.
        """

        @intrinsic
        def run(typingctx, team, n, first, last, args):
            def codegen(context, builder, signature, values):
                team, n, *task = values
                start, *asks = cgutils.unpack_tuple(builder, team)
                shared = cgutils.make_anonymous_struct(builder, [*asks, *task, INT(0)])
                shared = cgutils.alloca_once_value(builder, shared)
                call = _caller(context, builder, kernel, args)
                with builder.if_else(builder.icmp_signed("==", n, INT(1))) as (alone, together):
                    with alone:
                        call(builder, shared, *task[:2])
                    with together:
                        worker = _worker(builder.module, shared.type, call)
                        kind = ir.FunctionType(ir.VoidType(), [worker.type, ADDRESS, SHORT, SHORT])
                        rest = builder.bitcast(shared, ADDRESS), builder.trunc(n, SHORT), SHORT(0)
                        builder.call(builder.inttoptr(start, kind.as_pointer()), [worker, *rest])
                return builder.load(cgutils.gep_inbounds(builder, shared, 0, 5))

            return types.intp(team, n, first, last, args), codegen

        names = ("co_filename", "co_firstlineno", "co_name", "co_qualname")
        code = _enter.__code__.replace(**{name: getattr(kernel.__code__, name) for name in names})
        enter = FunctionType(code, {"run": run, "__name__": kernel.__module__}, kernel.__name__)
        return compiled(enter)

    @no_type_check
    def compiled(function, **options):
        """What numba makes of a function, which it keeps for later processes where it finds a folder to write to."""
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # neither beside the source nor in the home
            return numba.njit(nogil=True, **options)(function)

    @no_type_check
    def _enter(team, n, first, last, args):
        return run(team, n, first, last, args)

    @no_type_check
    def _caller(context, builder, kernel, args):
        """What writes a call of the kernel into a function, and down in `shared` that it failed."""
        signature = types.void(types.intp, types.intp, *args)
        compiled = context.compile_subroutine(builder, kernel, signature)

        def call(b, shared, first, last):
            arrays = cgutils.unpack_tuple(b, b.load(cgutils.gep_inbounds(b, shared, 0, 4)))
            values = [first, last, *arrays]
            status, _ = context.call_internal_no_propagate(b, compiled.fndesc, signature, values)
            with b.if_then(status.is_error):
                b.store(INT(1), cgutils.gep_inbounds(b, shared, 0, 5))

        return call

    @no_type_check
    def _worker(module, kind, call):
        """A C function of one address, as OpenMP calls it: a thread's range of the rows."""
        signature = ir.FunctionType(ir.VoidType(), [ADDRESS])
        worker = ir.Function(module, signature, module.get_unique_name("worker"))
        worker.linkage = "internal"
        b = ir.IRBuilder(worker.append_basic_block())
        shared = b.bitcast(worker.args[0], kind)
        *asks, first, last = (b.load(cgutils.gep_inbounds(b, shared, 0, k)) for k in range(4))
        ask = ir.FunctionType(SHORT, []).as_pointer()
        count, which = (b.zext(b.call(b.inttoptr(address, ask), []), INT) for address in asks)
        rows = b.sub(last, first)
        call(b, shared, *(b.add(first, b.sdiv(b.mul(rows, k), count)) for k in (which, b.add(which, INT(1)))))
        b.ret_void()
        return worker
