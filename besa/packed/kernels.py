"""Compiled passes over packed rows: products with inputs, and rows made dense.

A row is read 64 columns at a time: a word of the mask, and as many values as it has bits. The kernels are numba
functions of vectors, which numba lacks: this file adds them as a type, with operations of a few LLVM instructions.

- "vnni" (Ice Lake and later): VPEXPANDB spreads 64 codes to their columns, VPDPBUSD multiplies them by integers.
- "bf16" (Sapphire Rapids, Zen 4 and later): the same, and VDPBF16PS multiplies bfloat16 values.
- "avx2": a table has the permutation that spreads 8 values, for every 8 bits of a mask.
- "none": any other processor; `PackedLinear` takes torch's operations.
"""

import ctypes
import functools
import inspect
import sys
import threading
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

from besa.threads import openmp

WORD = 64  # columns of a word of the mask
DIGITS = {"bf16": 2, "f16": 2, "f32": 3}  # integer products round inputs to integers of so many signed bytes
PREFETCH = 8192  # bytes to read ahead, to the second cache; without, products take twice the time
WEIGHTS_PER_THREAD = 2**17
PAGE = 2**21
_LOCK, _room = threading.Lock(), torch.empty(0, dtype=torch.uint8)
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
    """Arguments of a kernel. `stride`: bytes between outputs of tokens, or between dense rows."""

    _COUNTS = "row last_row rows_at_once words groups stride mask_ahead values_ahead"
    _ADDRESSES = "mask starts values scale zero_point inputs input_sums steps out permutations"
    _fields_ = [(name, ctypes.c_int64) for names in (_COUNTS, _ADDRESSES) for name in names.split()]


def run(kernel: Callable, task: Task, n_weights: int) -> None:
    """Run a kernel on torch's OpenMP threads, each of which takes the next rows until none are left."""
    n_threads = min(torch.get_num_threads(), 1 + n_weights // WEIGHTS_PER_THREAD)
    task.rows_at_once = 2 * max(1, (task.last_row - task.row) // (8 * n_threads))  # pairs
    team = openmp()
    if n_threads == 1 or team is None:
        kernel(ctypes.byref(task))
    else:
        team.parallel(kernel, ctypes.byref(task), n_threads, 0)


def in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor into memory that copies share, in pages of 2 MiB on Linux: products take a quarter less time."""
    global _room
    with _LOCK:
        if tensor.nbytes > len(_room):
            size = max(2**25, tensor.nbytes + -tensor.nbytes % PAGE)
            _room = torch.empty(size + PAGE, dtype=torch.uint8)
            _room = _room[-_room.data_ptr() % PAGE :][:size]
        copy, _room = _room[: tensor.nbytes], _room[tensor.nbytes + -tensor.nbytes % 64 :]
    copy = copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    if sys.platform == "linux":
        start, end = copy.data_ptr() & -PAGE, copy.data_ptr() + copy.nbytes + PAGE - 1 & -PAGE
        for advice in (14, 25):  # MADV_HUGEPAGE; MADV_COLLAPSE of what is in small pages already
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    return copy


llvmlite.binding.initialize_native_asmparser()  # for instructions that LLVM has no operation for
SIZES = {"i8": 1, "bf16": 2, "f16": 2, "f32": 4, "i32": 4}
I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
ELEMENTS = {"i8": I8, "i16": I16, "i32": I32, "bf16": I16, "f16": I16, "f32": F32}
SCALARS = {"i64": (types.int64, I64), "f32": (types.float32, F32), "f16": (types.float32, F16)}
SCALARS |= {f"u{bits}": (getattr(types, f"uint{bits}"), ir.IntType(bits)) for bits in (8, 16, 32, 64)}


class Vector(types.Type):
    """Elements in one register, such as "32xbf16", or in several: "6x16xi32"."""

    def __init__(self, name: str) -> None:
        *registers, lanes, self.element = name.split("x")
        self.llvm = ir.VectorType(ELEMENTS[self.element], int(lanes))
        for number in registers:
            self.llvm = ir.ArrayType(self.llvm, int(number))
        super().__init__(name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, kind.llvm)


def _named(name):
    """Type of what `load` returns for a name."""
    name = name.literal_value.replace("i4", "i8")
    return SCALARS[name][0] if name in SCALARS else Vector(name)


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
    first = b.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, I32(0))
    return b.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _like(vector, element):
    return ir.VectorType(element, vector.type.count)


def _all(kind, value):
    return ir.Constant(kind, [value] * kind.count)


@operation(lambda address, name: _named(name))
def load(b, signature, address, name):
    """A number or a vector from memory; float16 numbers become float32.

    "i4" are codes, two a byte, which become bytes; their addresses count half bytes, "64xi4" starts at a byte.
    """
    name = signature.args[1].literal_value
    if name.endswith("xi4"):
        lanes, half = signature.return_type.llvm.count, b.and_(address, I64(1))
        kind = ir.IntType(4 * lanes if lanes == WORD else 8 * lanes)
        pairs = b.load(b.inttoptr(b.lshr(address, I64(1)), kind.as_pointer()), align=1)
        if lanes < WORD:
            pairs = b.trunc(b.lshr(pairs, b.zext(b.shl(half, I64(2)), kind)), ir.IntType(4 * lanes))
        pairs = b.zext(b.bitcast(pairs, ir.VectorType(I8, lanes // 2)), ir.VectorType(I16, lanes // 2))
        codes = b.and_(b.or_(pairs, b.shl(pairs, _all(pairs.type, 4))), _all(pairs.type, 0x0F0F))
        return b.bitcast(codes, signature.return_type.llvm)
    kind = SCALARS[name][1] if name in SCALARS else signature.return_type.llvm
    value = b.load(b.inttoptr(address, kind.as_pointer()), align=1)
    return b.fpext(value, F32) if name == "f16" else value


@operation(lambda address, bits, name: types.int64)
def advance(b, signature, address, bits, name):
    """Address of the values of the next bits; `name` is that for `load`."""
    kept = b.zext(_call(b, f"llvm.ctpop.i{bits.type.width}", bits.type, bits), I64)
    return b.add(address, b.mul(kept, I64(SIZES.get(signature.args[2].literal_value.split("x")[1], 1))))


@operation(lambda value, address, dtype: types.void)
def store(b, signature, value, address, dtype):
    """Write a number or vectors; one of float32 is rounded to dtype, ties to even."""
    dtype = signature.args[2].literal_value
    if dtype != "f32" and value.type.element == F32:
        bits = b.bitcast(value, _like(value, I32))  # of bfloat16, the upper half
        odd = b.and_(b.lshr(bits, _all(bits.type, 16)), _all(bits.type, 1))
        bits = b.lshr(b.add(bits, b.add(odd, _all(bits.type, 0x7FFF))), _all(bits.type, 16))
        value = b.fptrunc(value, _like(value, F16)) if dtype == "f16" else b.trunc(bits, _like(value, I16))
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


@operation(lambda address: types.void)
def prefetch(b, signature, address):
    _call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(address, I8.as_pointer()), I32(0), I32(2), I32(1))


@operation(lambda task, rows: types.int64)
def take(b, signature, task, rows):
    """Advance the first number of a task, for all threads; return what it was."""
    return b.atomic_rmw("add", b.bitcast(task, I64.as_pointer()), rows, "monotonic")


@operation(_named)
def zeros(b, signature, name):
    return ir.Constant(signature.return_type.llvm, None)


@operation(lambda vector: types.float32)
def total(b, signature, vector):
    return _call(b, f"llvm.vector.reduce.fadd.v{vector.type.count}f32", F32, F32(0.0), vector, fastmath=("reassoc",))


@operation(lambda values, bits, scale, zero_point, permutations, name: _named(name))
def spread(b, signature, values, bits, scale, zero_point, permutations, name):
    """The next weights where bits are one, elsewhere 0; named "i8", the next codes, elsewhere zero_point."""
    source, target = signature.args[0].element, signature.return_type
    lanes, width = target.llvm.count, SIZES[target.element] * 8
    if target.element == "f32":
        if source[0] == "i":  # scale (code - zero_point)
            shift = b.fneg(b.fmul(scale, b.uitofp(zero_point, F32)))  # exact, in 19 bits
            values = _fma(b, b.uitofp(values, target.llvm), _splat(b, scale, lanes), _splat(b, shift, lanes))
        elif source == "bf16":
            values = b.shl(b.zext(values, _like(values, I32)), _all(_like(values, I32), 16))
        elif source == "f16":
            values = b.fpext(b.bitcast(values, _like(values, F16)), target.llvm)
    kind = ir.VectorType(ir.IntType(width), lanes)
    values = b.bitcast(values, kind)
    rest = _splat(b, zero_point, lanes) if target.element == "i8" else ir.Constant(kind, None)
    if lanes > 8:  # LLVM's own operation would read the values from memory, which takes long
        text, emitted = f"vpexpand{' bw d'[width // 8]} $1, $0 {{$2}}", ir.FunctionType(kind, [kind, bits.type, kind])
        return b.bitcast(b.asm(emitted, text, "=v,v,^Yk,0", [values, bits, rest], False), target.llvm)
    wide, address = ir.VectorType(I32, 8), b.add(permutations, b.mul(b.zext(bits, I64), I64(lanes)))
    places = b.zext(b.load(b.inttoptr(address, ir.VectorType(I8, 8).as_pointer())), wide)
    values = _call(b, "llvm.x86.avx2.permd", wide, values, places)
    return b.bitcast(b.select(b.icmp_signed("<", places, _all(wide, 128)), values, rest), target.llvm)


@operation(lambda sums, weights, others, inputs: sums)
def add_products(b, signature, sums, weights, others, inputs):
    """Add the products of two vectors of weights and each vector of inputs; the second half of sums is of `others`."""
    kind, n_inputs = sums.type.element, sums.type.count // 2
    n_bytes = weights.type.count * SIZES[signature.args[1].element]
    for number in range(n_inputs):
        x = b.load(b.inttoptr(b.add(inputs, I64(n_bytes * number)), weights.type.as_pointer()), align=1)
        for place, vector in ((number, weights), (number + n_inputs, others)):
            total = b.extract_value(sums, place)
            if kind.count == x.type.count:
                total = _fma(b, vector, x, total)
            else:  # of 8 bits four products go to an element, of 16 bits two
                emitted = ir.FunctionType(kind, [kind, x.type, x.type])
                name = "vpdpbusd" if kind.element == I32 else "vdpbf16ps"
                total = b.asm(emitted, f"{name} $3, $2, $0", "=v,0,v,v", [total, vector, x], False)
            sums = b.insert_value(sums, total, place)
    return sums


@operation(lambda totals, sums, scales, zero_points, input_sums: totals)
def add_scaled(b, signature, totals, sums, scales, zero_points, input_sums):
    """Add scale (sums - zero_point input_sums) to the totals; the sums come in digits, the lowest first."""
    kind, n_tokens, n_digits = totals.type.element, totals.type.count // 2, sums.type.count // totals.type.count
    for place in range(2 * n_tokens):
        digits = [b.sitofp(b.extract_value(sums, n_digits * place + digit), kind) for digit in range(n_digits)]
        value = functools.reduce(lambda high, low: _fma(b, high, _all(kind, 256.0), low), reversed(digits))
        of_input = b.load(b.inttoptr(b.add(input_sums, I64(4 * (place % n_tokens))), F32.as_pointer()))
        scale, zero_point = (b.extract_value(pair, place // n_tokens) for pair in (scales, zero_points))
        value = b.fsub(value, _splat(b, b.fmul(b.uitofp(zero_point, F32), of_input), kind.count))
        value = _fma(b, value, _splat(b, scale, kind.count), b.extract_value(totals, place))
        totals = b.insert_value(totals, value, place)
    return totals


def _fma(b, x, y, z):
    return _call(b, f"llvm.fma.v{z.type.count}f32", z.type, x, y, z)


def _compiled(function):
    """A C function of a task's address."""
    signature = types.void(types.CPointer(numba.from_dtype(np.dtype(Task))))
    compiled = numba.cfunc(signature, cache=True)(function)
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
    kernel.compiled = compiled  # stays alive as long
    return kernel


@numba.njit
@no_type_check
def _rows(tasks, step):
    """The rows of a task that no other thread takes, or the first ones of pairs."""
    task = numba.carray(tasks, 1)[0]
    first = take(tasks, task.rows_at_once)
    while first < task.last_row:
        for row in range(first, min(first + task.rows_at_once, task.last_row), step):  # noqa: UP028 (unknown to numba)
            yield row
        first = take(tasks, task.rows_at_once)


def vector_lanes(instructions, code_bits, dtype):
    """Columns that are multiplied at once: 64 of codes as integers, 32 of bfloat16, else 16 or 8 of float32."""
    return 8 if instructions == "avx2" else 64 if code_bits else 32 if instructions == dtype == "bf16" else 16


@functools.cache
@no_type_check
def product_kernel(instructions, code_bits, dtype, n_tokens):
    """Kernel for products (float32) of values (code_bits 0) or codes and some tokens.

    Inputs lie as (words, tokens, digits, 64) integers, or as (columns / lanes, tokens, lanes) floats. Two rows are
    multiplied at a time, for they share what is loaded of the inputs.
    """
    lanes, stored_size = vector_lanes(instructions, code_bits, dtype), 1 if code_bits else SIZES[dtype]
    is_integer, stored_name = lanes == WORD, f"{lanes}x{f'i{code_bits}' if code_bits else dtype}"
    weights_name = f"{lanes}x{'i8' if is_integer else 'bf16' if lanes == 32 else 'f32'}"
    n_sums, n_lanes, mask_name = 2 * n_tokens, min(lanes, 16), f"u{lanes}"
    total_name, totals_name = f"{n_lanes}xf32", f"{n_sums}x{n_lanes}xf32"
    sums_name = f"{DIGITS[dtype] * n_sums}x16xi32" if is_integer else totals_name
    inputs_step = n_tokens * (DIGITS[dtype] * WORD if is_integer else 4 * n_lanes)
    halves = int(code_bits == 4)  # of bytes are counted by addresses of values

    def kernel(tasks):
        task = numba.carray(tasks, 1)[0]
        words, groups, permutations = task.words, task.groups, task.permutations
        room = np.empty(n_sums * n_lanes, np.float32)
        scale, other_scale, zero, other_zero = np.float32(1), np.float32(1), np.uint8(0), np.uint8(0)
        for row in _rows(tasks, 2):
            other = min(row + 1, task.last_row - 1)
            mask, to_other, inputs = task.mask + 8 * row * words, 8 * (other - row) * words, task.inputs
            values = task.values + stored_size * load(task.starts + 8 * row, "i64") << halves
            others = task.values + stored_size * load(task.starts + 8 * other, "i64") << halves
            totals, sums = zeros(totals_name), zeros(sums_name)
            for group in range(groups):
                if code_bits:
                    place, other_place = row * groups + group, other * groups + group
                    scale, other_scale = load(task.scale + 2 * place, "f16"), load(task.scale + 2 * other_place, "f16")
                    zero, other_zero = load(task.zero_point + place, "u8"), load(task.zero_point + other_place, "u8")
                for _ in range(words // groups):
                    prefetch(mask + task.mask_ahead)
                    prefetch(mask + to_other + task.mask_ahead)
                    for line in range(0, WORD * stored_size, 64):
                        prefetch((values >> halves) + task.values_ahead + line)
                        prefetch((others >> halves) + task.values_ahead + line)
                    for _ in range(WORD // lanes):
                        bits, other_bits = load(mask, mask_name), load(mask + to_other, mask_name)
                        x, y = load(values, stored_name), load(others, stored_name)
                        x = spread(x, bits, scale, zero, permutations, weights_name)
                        y = spread(y, other_bits, other_scale, other_zero, permutations, weights_name)
                        sums = add_products(sums, x, y, inputs)
                        values, others = advance(values, bits, stored_name), advance(others, other_bits, stored_name)
                        mask += lanes // 8
                        inputs += inputs_step
                    values, others = values + (values & halves), others + (others & halves)  # each word starts a byte
                if is_integer:
                    input_sums = task.input_sums + 4 * n_tokens * group
                    totals = add_scaled(totals, sums, (scale, other_scale), (zero, other_zero), input_sums)
                    sums = zeros(sums_name)
            if not is_integer:
                totals = sums
            store(totals, np.int64(room.ctypes.data), "f32")
            for number in range(n_sums):
                token, column = number % n_tokens, row if number < n_tokens else other
                product = total(load(np.int64(room.ctypes.data) + 4 * n_lanes * number, total_name))
                if is_integer:
                    product *= load(task.steps + 4 * token, "f32")
                store(product, task.out + task.stride * token + 4 * column, "f32")

    return _compiled(kernel)


@functools.cache
@no_type_check
def dense_kernel(instructions, code_bits, dtype):
    """Kernel that writes dense rows in a precision."""
    lanes = 8 if instructions == "avx2" else 16 if code_bits else 64 // SIZES[dtype]
    row_size, stored_name = SIZES[dtype], f"{lanes}x{f'i{code_bits}' if code_bits else dtype}"
    stored_size = 1 if code_bits else row_size
    weights_name = f"{lanes}x{'f32' if code_bits or lanes == 8 else dtype}"
    mask_name, halves = f"u{lanes}", int(code_bits == 4)

    def kernel(tasks):
        task = numba.carray(tasks, 1)[0]
        scale, zero = np.float32(1), np.uint8(0)
        for row in _rows(tasks, 1):
            mask, out = task.mask + 8 * row * task.words, task.out + task.stride * row
            values = task.values + stored_size * load(task.starts + 8 * row, "i64") << halves
            for group in range(task.groups):
                if code_bits:
                    place = row * task.groups + group
                    scale, zero = load(task.scale + 2 * place, "f16"), load(task.zero_point + place, "u8")
                for _ in range(task.words // task.groups):
                    for _ in range(WORD // lanes):
                        bits = load(mask, mask_name)
                        x = spread(load(values, stored_name), bits, scale, zero, task.permutations, weights_name)
                        store(x, out, dtype)
                        values = advance(values, bits, stored_name)
                        mask += lanes // 8
                        out += lanes * row_size
                    values += values & halves  # each word starts a byte

    return _compiled(kernel)


@functools.partial(numba.njit, cache=True, nogil=True)
@no_type_check
def split_inputs(tokens, at_once, words, groups, n_digits):
    """Tokens (float32) as integers in digits, the lowest first; `at_once` may be more than there are.

    Returns digits (words, at_once, n_digits, 64), 1/16 of the integers' sums (groups, at_once), their units
    (at_once,), and the addresses of these arrays.
    """
    digits, integers = np.empty((words, at_once, n_digits, WORD), np.int8), np.zeros(words * WORD, np.int32)
    sums, steps = np.empty((groups, at_once), np.float32), np.empty(at_once, np.float32)
    for token in range(len(tokens)):
        columns, largest = tokens.shape[1], np.int32(0)
        for bits in tokens[token].view(np.int32):  # without their sign, in the order of the numbers
            largest = max(largest, bits & np.int32(0x7FFFFFFF))
        step = np.full(1, largest, np.int32).view(np.float32)[0] / np.float32(127 << 8 * (n_digits - 1))
        steps[token] = step = np.float32(1) if step == 0 else step
        for column in range(columns):
            integers[column] = np.int32(np.rint(tokens[token, column] / step))
        for word in range(words):
            for lane in range(WORD):  # with all digits raised by 128, they are the bytes of a number
                raised = np.uint32(integers[WORD * word + lane] + 0x808080)
                for digit in range(n_digits):
                    digits[word, token, digit, lane] = np.int8((raised >> np.uint32(8 * digit)) ^ np.uint32(128))
        for group in range(groups):
            sums[group, token] = integers[columns // groups * group : columns // groups * (group + 1)].sum() / 16
    return digits, sums, steps, digits.ctypes.data, sums.ctypes.data, steps.ctypes.data
