"""Compiled passes on torch's own OpenMP threads, which spin when idle and would slow down a second pool."""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

MIN_ELEMENTS = 2**15  # per thread; starting one takes as long as passing over these


def over_rows(kernel: Callable[..., None], matrix: np.ndarray, *args: object) -> None:
    """Run kernel(first, last, matrix, *args) for a range of the rows on each thread."""
    rows = len(matrix)
    team = openmp()
    n_threads = min(torch.get_num_threads(), 1 + matrix.size // MIN_ELEMENTS)
    if n_threads == 1 or team is None:
        return kernel(0, rows, matrix, *args)

    errors: list[BaseException] = []  # ctypes would only print them

    def run(_: int | None) -> None:
        number, count = team.omp_get_thread_num(), team.omp_get_num_threads()
        try:
            kernel(rows * number // count, rows * (number + 1) // count, matrix, *args)
        except BaseException as error:
            errors.append(error)

    team.parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(run), None, n_threads, 0)
    if errors:
        raise errors[0]


@functools.cache
def _library() -> ctypes.PyDLL | None:
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        library = ctypes.PyDLL(str(path))
        if hasattr(library, "GOMP_parallel"):
            library.parallel = ctypes.CDLL(str(path)).GOMP_parallel  # pyright: ignore # without Python's lock, which `run` takes
            return library
    return None


_PID = os.getpid()


def openmp() -> ctypes.PyDLL | None:
    """The OpenMP library that torch has loaded; None if it is not GNU's, and in a forked child, without threads."""
    return _library() if os.getpid() == _PID else None
