"""Compiled passes over packed rows: products with inputs, and rows made dense.

A row is read 64 columns at a time: a word of the mask, and as many values as it has bits. The kernels are numba
functions of vectors, which numba lacks: this file adds them as a type, with operations of an LLVM instruction or two.

- "vnni" (Ice Lake and later): VPEXPANDB spreads 64 codes to their columns, VPDPBUSD multiplies them by integers.
- "bf16" (Sapphire Rapids, Zen 4 and later): the same, and VDPBF16PS multiplies bfloat16 values.
- "avx2": a table has the permutation that spreads 8 values, for every 8 bits of a mask.
- "none": any other processor, or no numba; `PackedLinear` takes torch's operations.
"""

import ctypes
import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import no_type_check

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from besa import kernels as passes

WORD = 64  # columns of a word of the mask
LARGEST = 127 * 2**16  # input of integer products: integers of 24 bits, three signed digits of 8 bits
PREFETCH = 2048  # bytes; without prefetching, products take twice the time
WEIGHTS_PER_THREAD = 2**17
_PID = os.getpid()
_SET = (np.arange(256)[:, None] >> np.arange(8)) & 1
PERMUTATIONS = np.where(_SET == 1, _SET.cumsum(1) - 1, 128).astype(np.uint8)
"""For 8 bits of a mask, which of the next values each of 8 columns takes; 128: none."""
AVX2 = {"avx2", "fma", "f16c", "popcnt"}
VNNI = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512vbmi2", "avx512vnni"}


@functools.cache
def instructions() -> str:
    """Name the instruction set to compile for: "bf16", "vnni", "avx2" or "none"."""
    _, _, features = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()
    found = {name[1:] for name in features.split(",") if name.startswith("+")}
    if found >= VNNI:
        return "bf16" if "avx512bf16" in found else "vnni"
    return "avx2" if found >= AVX2 else "none"


class Task(ctypes.Structure):
    """Arguments of a kernel: counts, the bytes of a row of the output, addresses, and the step of integer inputs."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("row", "last_row", "rows_at_once", "words", "groups", "row_stride")],
        *[(name, ctypes.c_int64) for name in ("mask", "starts", "values", "scale", "zero_point", "bias")],
        *[(name, ctypes.c_int64) for name in ("inputs", "input_sums", "out", "permutations")],
        ("step", ctypes.c_double),
    ]


def run(kernel: Callable, task: Task, n_weights: int) -> None:
    """Run a kernel on torch's OpenMP threads, each of which takes the next rows until none are left."""
    n_threads = min(torch.get_num_threads(), 1 + n_weights // WEIGHTS_PER_THREAD)
    task.rows_at_once = max(1, (task.last_row - task.row) // (4 * n_threads))
    team = passes._openmp()
    if n_threads == 1 or team is None or os.getpid() != _PID:  # a forked child has no threads
        kernel(ctypes.byref(task))
    else:
        team.parallel(kernel, ctypes.byref(task), n_threads, 0)


def prefer_large_pages(tensor: torch.Tensor) -> None:
    """Ask Linux for pages of 2 MiB: with small ones a product takes a third longer."""
    if sys.platform == "linux":
        start, size = ctypes.c_void_p(tensor.data_ptr() & -4096), ctypes.c_size_t(tensor.nbytes)
        for advice in (14, 25):  # MADV_HUGEPAGE; MADV_COLLAPSE of what is in small pages already
            ctypes.CDLL(None).madvise(start, size, advice)


llvmlite.binding.initialize_native_asmparser()  # for the two instructions in `add_products`
SIZES = {"bf16": 2, "f16": 2, "f32": 4}
I1, I8, I16, I32, I64 = (ir.IntType(width) for width in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
ELEMENTS = {"i8": I8, "i16": I16, "i32": I32, "bf16": I16, "f16": I16, "f32": F32}
SCALARS = {"i64": (types.int64, I64), "f32": (types.float32, F32), "f16": (types.float32, F16)}
SCALARS |= {f"u{bits}": (getattr(types, f"uint{bits}"), ir.IntType(bits)) for bits in (8, 16, 32, 64)}


class Vector(types.Type):
    """Elements in one register, such as "32xbf16"."""

    def __init__(self, name: str) -> None:
        lanes, _, self.element = name.partition("x")
        self.llvm = ir.VectorType(ELEMENTS[self.element], int(lanes))
        super().__init__(name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, kind.llvm)


def _named(name):
    """Type of a name such as "u8" or "64xi8"."""
    return SCALARS[name.literal_value][0] if name.literal_value in SCALARS else Vector(name.literal_value)


@no_type_check
def operation(result):
    """Make a function that emits LLVM IR one for numba; `result` gives its type by those of its arguments."""

    def decorate(emit):
        def typing(typingctx, *kinds):
            signature = result(*kinds)(*kinds)
            return signature, lambda context, builder, _, args: emit(builder, signature, *args)

        _, _, *parameters = inspect.signature(emit).parameters.values()
        typing.__signature__ = inspect.Signature([inspect.Parameter("typingctx", 1), *parameters])
        typing.__name__ = typing.__qualname__ = emit.__name__
        return intrinsic(prefer_literal=True)(typing)

    return decorate


def _call(b, name, result, *arguments, **options):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments, **options)


def _splat(b, scalar, lanes):
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, I32(0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _like(vector, element):
    return ir.VectorType(element, vector.type.count)


def _all(kind, value):
    return ir.Constant(kind, [value] * kind.count)


@operation(lambda address, name: _named(name))
def load(b, signature, address, name):
    """A number or a vector from memory; float16 numbers become float32."""
    name = signature.args[1].literal_value
    kind = SCALARS[name][1] if name in SCALARS else signature.return_type.llvm
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return b.fpext(value, F32) if name == "f16" else value


@operation(lambda value, address: types.void)
def store(b, signature, value, address):
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 1


@operation(lambda address: types.void)
def prefetch(b, signature, address):
    _call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(address, I8.as_pointer()), I32(0), I32(3), I32(1))


@operation(lambda task, rows: types.int64)
def take(b, signature, task, rows):
    """Advance the first number of a task, for all threads; return what it was."""
    return b.atomic_rmw("add", b.bitcast(task, I64.as_pointer()), rows, "monotonic")


@operation(_named)
def zeros(b, signature, name):
    return ir.Constant(signature.return_type.llvm, None)


@operation(lambda bits: types.int64)
def count(b, signature, bits):
    """Number of ones."""
    return b.zext(_call(b, f"llvm.ctpop.i{bits.type.width}", bits.type, bits), I64)


@operation(lambda vector: types.float32)
def total(b, signature, vector):
    """Sum of all lanes."""
    return _call(b, f"llvm.vector.reduce.fadd.v{vector.type.count}f32", F32, F32(0.0), vector, fastmath=("reassoc",))


@operation(lambda pairs: Vector("64xi8"))
def nibbles(b, signature, pairs):
    """64 codes of 4 bits from 32 bytes."""
    wide = _like(pairs, I16)
    pairs = b.zext(pairs, wide)
    return b.bitcast(b.and_(b.or_(pairs, b.shl(pairs, _all(wide, 4))), _all(wide, 0x0F0F)), ir.VectorType(I8, 64))


@operation(lambda vector, bits, rest, permutations: vector)
def expand(b, signature, vector, bits, rest, permutations):
    """The next elements of `vector` where bits are one, elsewhere `rest`: a number, or 0 for zeros."""
    result, lanes, width = vector.type, vector.type.count, getattr(vector.type.element, "width", 32)
    kind = ir.VectorType(ir.IntType(width), lanes)
    vector = b.bitcast(vector, kind)
    rest = _splat(b, rest, lanes) if rest.type == kind.element else ir.Constant(kind, None)
    if lanes > 8:
        name = f"llvm.x86.avx512.mask.expand.v{lanes}i{width}"
        return b.bitcast(_call(b, name, kind, vector, rest, b.bitcast(bits, ir.VectorType(I1, lanes))), result)
    wide, address = _like(vector, I32), b.add(permutations, b.mul(b.zext(bits, I64), I64(lanes)))
    places = b.zext(b.load(b.inttoptr(address, _like(vector, I8).as_pointer())), wide)
    spread = _call(b, "llvm.x86.avx2.permd", wide, vector if width == 32 else b.zext(vector, wide), places)
    spread = spread if width == 32 else b.trunc(spread, kind)
    return b.bitcast(b.select(b.icmp_signed("<", places, _all(wide, 128)), spread, rest), result)


@operation(lambda sums, weights, inputs: sums)
def add_products(b, signature, sums, weights, inputs):
    """sums + weights inputs; of 8 bits four products go to an element, of 16 bits two."""
    if sums.type.count == weights.type.count:
        return _fma(b, weights, inputs, sums)
    name = "vpdpbusd" if sums.type.element == I32 else "vdpbf16ps"
    kind = ir.FunctionType(sums.type, [sums.type, weights.type, inputs.type])
    return b.asm(kind, f"{name} $3, $2, $0", "=v,0,v,v", [sums, weights, inputs], False)


@operation(lambda totals, low, middle, high, scale, shift: totals)
def add_scaled(b, signature, totals, low, middle, high, scale, shift):
    """totals + scale (sums - shift); the sums come in three digits."""
    kind = totals.type
    low, middle, high = (b.sitofp(digit, kind) for digit in (low, middle, high))
    base, scale, shift = _all(kind, 256.0), _splat(b, scale, kind.count), _splat(b, shift, kind.count)
    sums = _fma(b, _fma(b, high, base, middle), base, low)
    return _fma(b, b.fsub(sums, shift), scale, totals)


def _fma(b, x, y, z):
    return _call(b, f"llvm.fma.v{z.type.count}f32", z.type, x, y, z)


@operation(lambda values: Vector(f"{values.llvm.count}xf32"))
def widened(b, signature, values):
    """Values as float32."""
    element, floats, wide = signature.args[0].element, signature.return_type.llvm, _like(values, I32)
    if element == "f16":
        return b.fpext(b.bitcast(values, _like(values, F16)), floats)
    return b.bitcast(b.shl(b.zext(values, wide), _all(wide, 16)), floats) if element == "bf16" else values


@operation(lambda floats, name: _named(name))
def rounded(b, signature, floats, name):
    """float32 in another precision, to the nearest, ties to even."""
    kind = signature.return_type
    floats = floats if isinstance(floats.type, ir.VectorType) else _splat(b, floats, 1)
    if kind.element == "bf16" and kind.llvm.count == 16 and instructions() == "bf16":
        return b.asm(ir.FunctionType(kind.llvm, [floats.type]), "vcvtneps2bf16 $1, $0", "=v,v", [floats], False)
    if kind.element == "f16":
        return b.bitcast(b.fptrunc(floats, _like(floats, F16)), kind.llvm)
    if kind.element == "f32":
        return floats
    bits = b.bitcast(floats, _like(floats, I32))
    odd = b.and_(b.lshr(bits, _all(bits.type, 16)), _all(bits.type, 1))
    bits = b.add(b.add(bits, _all(bits.type, 0x7FFF)), odd)
    return b.trunc(b.lshr(bits, _all(bits.type, 16)), kind.llvm)


@operation(lambda codes, scale, zero_point: Vector(f"{codes.llvm.count}xf32"))
def decoded(b, signature, codes, scale, zero_point):
    """scale (codes - zero_point)."""
    floats, lanes = signature.return_type.llvm, codes.type.count
    shift = b.fneg(b.fmul(scale, b.uitofp(zero_point, F32)))  # exact, in 19 bits
    return _fma(b, b.uitofp(codes, floats), _splat(b, scale, lanes), _splat(b, shift, lanes))


def _compiled(function):
    """A C function of a task's address."""
    signature = types.void(types.CPointer(numba.from_dtype(np.dtype(Task))))
    compiled = numba.cfunc(signature, cache=True)(function)
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
    kernel.compiled = compiled  # stays alive as long
    return kernel


@numba.njit
@no_type_check
def _rows(tasks):
    """The rows of a task that no other thread takes."""
    task = numba.carray(tasks, 1)[0]
    first = take(tasks, task.rows_at_once)
    while first < task.last_row:
        for row in range(first, min(first + task.rows_at_once, task.last_row)):  # noqa: UP028 (unknown to numba)
            yield row
        first = take(tasks, task.rows_at_once)


@functools.cache
@no_type_check
def integer_kernel(code_bits, dtype):
    """Kernel for products of codes and an input that `split_inputs` wrote, plus a bias (vnni)."""
    size, out_name, is_paired = SIZES[dtype], f"1x{dtype}", code_bits == 4

    def kernel(tasks):
        task = numba.carray(tasks, 1)[0]
        words, stride, permutations = task.words, task.words * WORD, task.permutations
        for row in _rows(tasks):
            mask, values = task.mask + 8 * row * words, task.values + load(task.starts + 8 * row, "i64")
            inputs, totals = task.inputs, zeros("16xf32")
            for group in range(task.groups):
                place = row * task.groups + group
                zero_point, scale = load(task.zero_point + place, "u8"), load(task.scale + 2 * place, "f16")
                low = middle = high = zeros("16xi32")
                for _ in range(words // task.groups):
                    prefetch(values + PREFETCH)
                    prefetch(mask + PREFETCH)
                    bits = load(mask, "u64")
                    if is_paired:
                        codes = nibbles(load(values, "32xi8"))
                        values += (count(bits) + 1) >> 1
                    else:
                        codes = load(values, "64xi8")
                        values += count(bits)
                    codes = expand(codes, bits, zero_point, permutations)
                    low = add_products(low, codes, load(inputs, "64xi8"))
                    middle = add_products(middle, codes, load(inputs + stride, "64xi8"))
                    high = add_products(high, codes, load(inputs + 2 * stride, "64xi8"))
                    inputs += WORD
                    mask += 8
                shift = np.float32(zero_point) * load(task.input_sums + 4 * group, "f32")
                totals = add_scaled(totals, low, middle, high, scale, shift)
            product = total(totals) * task.step
            if task.bias != 0:
                product += total(widened(load(task.bias + row * size, out_name)))
            store(rounded(np.float32(product), out_name), task.out + row * task.row_stride)

    return _compiled(kernel)


@functools.cache
@no_type_check
def float_kernel(instructions, code_bits, dtype, is_product):
    """Kernel for products of values (code_bits 0) or codes and an input, plus a bias; or for dense rows.

    The input is float32, or bfloat16 if instructions and dtype (of values and of what is written) are "bf16".
    """
    is_code, is_paired, size = code_bits > 0, code_bits == 4, SIZES[dtype]
    is_bf16, stored_size = is_product and instructions == dtype == "bf16", 1 if is_code else size
    is_copy = is_bf16 or not (is_product or is_code)  # weights are spread in their own precision
    lanes = 8 if instructions == "avx2" else 64 // size if is_copy else 16
    stored_name, row_name, out_name = f"{lanes}x{'i8' if is_code else dtype}", f"{lanes}x{dtype}", f"1x{dtype}"
    inputs_name, inputs_size = (f"{lanes}xbf16", 64) if is_bf16 else (f"{lanes}xf32", 4 * lanes)
    mask_name, sums_name = f"u{lanes}", f"{min(lanes, 16)}xf32"

    def kernel(tasks):
        task = numba.carray(tasks, 1)[0]
        words, permutations = task.words, task.permutations
        room = np.empty(words * WORD + WORD if is_paired else 0, np.uint8)
        for row in _rows(tasks):
            start, end = load(task.starts + 8 * row, "i64"), load(task.starts + 8 * row + 8, "i64")
            mask, values = task.mask + 8 * row * words, task.values + stored_size * start
            inputs, out = task.inputs, task.out + row * task.row_stride
            sums = others = zeros(sums_name)
            if is_paired:
                for i in range(0, end - start, 32):
                    store(nibbles(load(values + i, "32xi8")), np.int64(room.ctypes.data) + 2 * i)
                values = np.int64(room.ctypes.data)
            for group in range(task.groups):
                if is_code:
                    place = row * task.groups + group
                    zero_point, scale = load(task.zero_point + place, "u8"), load(task.scale + 2 * place, "f16")
                for _ in range(words // task.groups):
                    prefetch(values + PREFETCH)
                    prefetch(values + PREFETCH + 64)
                    prefetch(mask + PREFETCH)
                    for _ in range(WORD // lanes):
                        bits, weights = load(mask, mask_name), load(values, stored_name)
                        if is_code:
                            spread = expand(decoded(weights, scale, zero_point), bits, 0, permutations)
                        elif is_copy:
                            spread = expand(weights, bits, 0, permutations)
                        else:
                            spread = expand(widened(weights), bits, 0, permutations)
                        if is_product:  # two sums take turns, for an addition waits for the one before
                            sums, others = others, add_products(sums, spread, load(inputs, inputs_name))
                            inputs += inputs_size
                        elif is_code:
                            store(rounded(spread, row_name), out)
                        else:
                            store(spread, out)
                        values += stored_size * count(bits)
                        mask += lanes // 8
                        out += 0 if is_product else size * lanes
                    if is_paired:
                        values += values & 1  # codes of the next word start a new byte
            if is_product:
                product = total(sums) + total(others)
                if task.bias != 0:
                    product += total(widened(load(task.bias + row * size, out_name)))
                store(rounded(product, out_name), out)

    return _compiled(kernel)


@functools.partial(numba.njit, cache=True, nogil=True)
@no_type_check
def split_inputs(x, digits, sums):
    """Write a float32 input as integers in three digits, the lowest first, and 1/16 of their sum for every group.

    Returns their step, and the addresses of what is written.
    """
    columns, n_groups = len(x), len(sums)
    largest, integers = np.int32(0), np.zeros(digits.shape[1], np.int32)
    for bits in x.view(np.int32):  # without their sign, in the order of the numbers
        largest = max(largest, bits & np.int32(0x7FFFFFFF))
    step = np.full(1, largest, np.int32).view(np.float32)[0] / np.float32(LARGEST)
    step = np.float32(1) if step == 0 else step
    for j in range(columns):
        integers[j] = np.int32(np.rint(x[j] / step))
    for j in range(len(integers)):  # with all digits raised by 128, they are the bytes of a number
        raised = np.uint32(integers[j] + 0x808080)
        for digit in range(3):
            digits[digit, j] = np.int8((raised >> np.uint32(8 * digit)) ^ np.uint32(128))
    for group in range(n_groups):
        sums[group] = integers[columns // n_groups * group : columns // n_groups * (group + 1)].sum() / 16
    return step, digits.ctypes.data, sums.ctypes.data
