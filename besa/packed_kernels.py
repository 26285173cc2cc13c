"""The compiled passes over a packed projection: y = W x from its bits and values as they are, and its rows made dense.

A row is read 64 columns at a time, a word of the mask and as many values as it has bits: nothing but packed bytes comes
from memory. Two instruction sets, written as LLVM IR that numba compiles at first use and keeps in its cache, so that
nobody needs a compiler:

- avx512 (Sapphire Rapids, Zen 4 and later), for bfloat16 inputs: VPEXPANDW spreads 32 bfloat16 values to their columns,
  VPEXPANDB 64 codes of 4 bits, VDPBF16PS multiplies and sums.
- avx2, for float32 inputs and any values: 8 bits of mask look up the permutation that spreads 8 values as float32.

Other processors have neither: `instructions` says "none".
"""

import functools
import itertools
from typing import no_type_check

import numpy as np

try:
    import llvmlite.binding
    import numba
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic
except ImportError:  # numba trails new Python releases
    numba = None

WORD = 64
"""Columns of one mask word."""
MOST_TOKENS = 16
"""Inputs that one pass over the packed bytes can multiply: their sums fill the registers."""
PREFETCH = 2048  # bytes ahead; without it the product takes twice the time
AVX2 = {"avx2", "fma", "f16c", "popcnt"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512vbmi2", "avx512bf16"}


@functools.cache
def instructions() -> str:
    """What the processor offers that numba compiles for: "avx512", "avx2" or "none"."""
    if numba is None:
        return "none"
    features = {name[1:] for name in _target()[2].split(",") if name.startswith("+")}
    return "avx512" if features >= AVX512 else "avx2" if features >= AVX2 else "none"


def processor() -> str:
    """The processor's name, as LLVM knows it."""
    return _target()[1]


def _target() -> tuple[str, str, str]:
    """Triple, processor and features."""
    return numba.core.registry.cpu_target.target_context.codegen().magic_tuple()


@functools.cache
def permutations() -> np.ndarray:
    """For 8 bits of mask, which of the next values each of 8 columns takes; -1 where none: (256, 8), int32."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return np.where(bits == 1, bits.cumsum(1) - 1, -1).astype(np.int32)


if numba is not None:
    llvmlite.binding.initialize_native_asmparser()  # for the one line of assembler

    I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
    F16, F32, V = ir.HalfType(), ir.FloatType(), ir.VectorType

    @no_type_check
    class _Builder:
        """LLVM IR for both passes: addresses count bytes, loads and stores need no alignment."""

        def __init__(self, context, builder):
            self.context, self.b = context, builder

        def array(self, kind, value):
            """An array's address and its shape."""
            array = self.context.make_array(kind)(self.context, self.b, value)
            return self.b.bitcast(array.data, I8.as_pointer()), cgutils.unpack_tuple(self.b, array.shape)

        def at(self, address, offset, size=1):
            """The address `offset` elements of `size` bytes further on."""
            return self.b.gep(address, [self.b.mul(offset, I64(size))])

        def load(self, kind, address):
            value = self.b.load(self.b.bitcast(address, kind.as_pointer()))
            value.align = 1
            return value

        def store(self, value, address):
            self.b.store(value, self.b.bitcast(address, value.type.as_pointer())).align = 1

        def call(self, name, result, *arguments, **flags):
            kind = ir.FunctionType(result, [argument.type for argument in arguments])
            return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments, **flags)

        def all(self, kind, value):
            return ir.Constant(kind, [value] * kind.count)

        def splat(self, scalar, count):
            undefined = ir.Constant(V(scalar.type, count), ir.Undefined)
            return self.b.shuffle_vector(
                self.b.insert_element(undefined, scalar, I32(0)), undefined, self.all(V(I32, count), 0)
            )

        def ones(self, bits):
            count = self.call(f"llvm.ctpop.i{bits.type.width}", bits.type, bits)
            return count if bits.type == I64 else self.b.zext(count, I64)

        def expand(self, vector, bits, rest):
            """The next elements of a vector go where bits are one, `rest` stays elsewhere (avx512_vbmi2)."""
            kind = vector.type
            name = f"llvm.x86.avx512.mask.expand.v{kind.count}i{kind.element.width}"
            return self.call(name, kind, vector, rest, self.b.bitcast(bits, V(ir.IntType(1), kind.count)))

        def multiply_add(self, x, w, sums):
            """sums + x w: of float32, or pairs of bfloat16 summed in float32 (avx512_bf16)."""
            if x.type.element == F32:
                return self.call(f"llvm.fma.v{x.type.count}f32", x.type, x, w, sums)
            kind = ir.FunctionType(sums.type, [sums.type, x.type, w.type])
            return self.b.asm(kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [sums, x, w], False)

    @no_type_check
    class _Row(_Builder):
        """One packed row on its way through: where its mask is, where its next value."""

        def __init__(self, context, builder, kinds, args):
            super().__init__(context, builder)
            mask, index, values, start, scale, zero_point, permutations = args
            self.kind = kinds[2].dtype
            self.is_code = self.kind in (types.uint8, types.int8)  # two codes a byte, one
            self.mask, (_, self.words) = self.array(kinds[0], mask)
            self.mask = self.at(self.mask, builder.mul(index, self.words), 8)
            values, _ = self.array(kinds[2], values)
            self.next = cgutils.alloca_once_value(builder, self.at(values, start, self.kind.bitwidth // 8))
            self.scale, (_, self.groups) = self.array(kinds[4], scale)
            self.scale = self.at(self.scale, builder.mul(index, self.groups), 2)
            self.zero_point, _ = self.array(kinds[5], zero_point)
            self.zero_point = self.at(self.zero_point, builder.mul(index, self.groups))
            self.permutations = None if kinds[6] == types.none else self.array(kinds[6], permutations)[0]

        def enter(self, group):
            """Scale and zero-point of the group of columns that comes next."""
            self.h = self.b.fpext(self.load(F16, self.at(self.scale, group, 2)), F32)
            self.z = self.load(I8, self.at(self.zero_point, group))

        def values_of(self, bits, size):
            """The address of the next values, of `size` bytes each, which are as many as bits are one."""
            address = self.b.load(self.next)
            self.b.store(self.at(address, self.ones(bits), size), self.next)
            return address

        def codes_of(self, word):
            """The same for two codes a byte."""
            address, count = self.b.load(self.next), self.ones(self.load(I64, self.at(self.mask, word, 8)))
            self.b.store(self.at(address, self.b.lshr(self.b.add(count, I64(1)), I64(1))), self.next)
            return address

        def prefetch(self):
            far = self.at(self.b.load(self.next), I64(PREFETCH))
            self.call("llvm.prefetch.p0", ir.VoidType(), far, I32(0), I32(3), I32(1))

        def words32(self, word):
            """avx512: a word's columns as two vectors of 32 elements of 16 bits."""
            for half in range(2):
                bits = self.load(I32, self.at(self.mask, self.b.add(self.b.mul(word, I64(2)), I64(half)), 4))
                self.prefetch()
                values = self.load(V(I16, 32), self.values_of(bits, 2))
                yield self.expand(values, bits, self.all(V(I16, 32), 0))

        def codes32(self, word):
            """avx512: a word's 32 even, then its 32 odd columns as bfloat16 16 + code, 16 + zero-point where pruned.

            16 + code is 0x4180 | code << 3, so codes become bfloat16 without a table.
            """
            bits = self.load(I64, self.at(self.mask, word, 8))
            self.prefetch()
            pairs = self.b.zext(self.load(V(I8, 32), self.codes_of(word)), V(I16, 32))  # codes 2 i + 1 and 2 i
            low = self.b.and_(self.b.shl(pairs, self.all(pairs.type, 3)), self.all(pairs.type, 0x00FF))
            high = self.b.and_(self.b.shl(pairs, self.all(pairs.type, 7)), self.all(pairs.type, 0xFF00))
            codes = self.b.bitcast(self.b.or_(low, high), V(I8, 64))
            rest = self.splat(self.b.shl(self.z, I8(3)), 64)
            spread = self.b.bitcast(self.expand(codes, bits, rest), pairs.type)
            for part in (spread, self.b.lshr(spread, self.all(pairs.type, 8))):
                part = self.b.and_(part, self.all(pairs.type, 0x0078))
                yield self.b.or_(part, self.all(pairs.type, 0x4180))

        def lanes8(self, word, to_float):
            """avx2: a word's columns as eight vectors of 8 int32: floats, or values' bits, or code - zero-point."""
            lanes, before = V(I32, 8), I64(0)
            codes = self.codes_of(word) if self.kind == types.uint8 else None
            for part in range(8):
                bits = self.load(I8, self.at(self.mask, self.b.add(self.b.mul(word, I64(8)), I64(part))))
                if part % 4 == 0:
                    self.prefetch()
                if self.kind == types.uint8:
                    eight = self.load(I64, self.at(codes, self.b.lshr(before, I64(1))))
                    odd = self.b.shl(self.b.and_(before, I64(1)), I64(2))
                    eight = self.splat(self.b.trunc(self.b.lshr(eight, odd), I32), 8)
                    values = self.b.lshr(eight, ir.Constant(lanes, list(range(0, 32, 4))))
                    values = self.b.and_(values, self.all(lanes, 15))
                    before = self.b.add(before, self.ones(bits))
                elif self.kind == types.float32:
                    values = self.load(lanes, self.values_of(bits, 4))
                elif self.kind == types.int8:
                    values = self.b.zext(self.load(V(I8, 8), self.values_of(bits, 1)), lanes)
                elif self.kind == types.int16 and to_float:
                    values = self.b.fpext(self.load(V(F16, 8), self.values_of(bits, 2)), V(F32, 8))
                    values = self.b.bitcast(values, lanes)
                else:
                    values = self.b.zext(self.load(V(I16, 8), self.values_of(bits, 2)), lanes)
                    if to_float:
                        values = self.b.shl(values, self.all(lanes, 16))
                if self.is_code:
                    values = self.b.sub(values, self.splat(self.b.zext(self.z, I32), 8))
                places = self.load(lanes, self.at(self.permutations, self.b.zext(bits, I64), 32))
                spread = self.call("llvm.x86.avx2.permd", lanes, values, places)
                nothing = self.b.icmp_signed("<", places, self.all(lanes, 0))
                yield self.b.select(nothing, self.all(lanes, 0), spread)

        def floats8(self, word):
            """The same as float32, codes without their scale."""
            for lanes in self.lanes8(word, True):
                yield self.b.sitofp(lanes, V(F32, 8)) if self.is_code else self.b.bitcast(lanes, V(F32, 8))

        def dense(self, word, kind):
            """A word's columns as elements of the dense row."""
            if self.permutations is None:
                yield from self.words32(word)
            elif not self.is_code:
                for lanes in self.lanes8(word, False):
                    yield lanes if kind == types.float32 else self.b.trunc(lanes, V(I16, 8))
            else:
                for floats in self.floats8(word):
                    yield self.rounded(self.b.fmul(floats, self.splat(self.h, 8)), kind)

        def rounded(self, floats, kind):
            """float32 to the nearest float16 (seen as int16) or bfloat16 (uint16), ties to even."""
            if kind == types.float32:
                return floats
            if kind == types.int16:
                return self.b.fptrunc(floats, V(F16, 8))
            bits = self.b.bitcast(floats, V(I32, 8))
            odd = self.b.and_(self.b.lshr(bits, self.all(bits.type, 16)), self.all(bits.type, 1))
            bits = self.b.add(self.b.add(bits, self.all(bits.type, 0x7FFF)), odd)
            return self.b.trunc(self.b.lshr(bits, self.all(bits.type, 16)), V(I16, 8))

    @intrinsic
    @no_type_check
    def _row_dots(typingctx, mask, row, values, start, scale, zero_point, permutations, xs, x_sums):
        """A row's products with the inputs `xs`, a tuple of arrays: a tuple of float32."""
        signature = types.UniTuple(types.float32, xs.count)(
            mask, row, values, start, scale, zero_point, permutations, xs, x_sums
        )

        def codegen(context, builder, signature, args):
            row = _Row(context, builder, signature.args, args[:7])
            inputs = [row.array(xs.dtype, builder.extract_value(args[7], k))[0] for k in range(xs.count)]
            is_bfloat16 = xs.dtype.dtype == types.uint16
            vectors = row.floats8 if not is_bfloat16 else row.codes32 if row.is_code else row.words32
            sums_kind = V(F32, 16 if is_bfloat16 else 8)
            zero, n_partial = row.all(sums_kind, 0.0), 2 if xs.count <= 4 else 1  # a sum waits for the one before
            totals = [cgutils.alloca_once_value(builder, zero) for _ in inputs]
            partial = [[cgutils.alloca_once_value(builder, zero) for _ in range(n_partial)] for _ in inputs]
            rest = [cgutils.alloca_once_value(builder, F32(0.0)) for _ in inputs]
            groups = row.groups if row.is_code else I64(1)
            n_words = builder.udiv(row.words, groups)
            with cgutils.for_range(builder, groups) as outer:
                if row.is_code:
                    row.enter(outer.index)
                for slot in itertools.chain(*partial):
                    builder.store(zero, slot)
                with cgutils.for_range(builder, n_words) as inner:
                    word = builder.add(builder.mul(outer.index, n_words), inner.index)
                    for n, w in enumerate(vectors(word)):
                        for slots, x in zip(partial, inputs):
                            width = 32 if is_bfloat16 else 8
                            part = builder.add(builder.mul(word, I64(WORD // width)), I64(n))
                            kind = V(I16, 32) if is_bfloat16 else V(F32, 8)
                            chunk = row.load(kind, row.at(x, part, 64 if is_bfloat16 else 32))
                            slot = slots[n % n_partial]
                            builder.store(row.multiply_add(chunk, w, builder.load(slot)), slot)
                for k, slots in enumerate(partial):
                    total = functools.reduce(builder.fadd, [builder.load(slot) for slot in slots])
                    if row.is_code:
                        total = row.multiply_add(total, row.splat(row.h, sums_kind.count), builder.load(totals[k]))
                    builder.store(total, totals[k])
                    if row.is_code and is_bfloat16:
                        at, _ = row.array(x_sums, args[8])
                        x_sum = row.load(F32, row.at(at, builder.add(builder.mul(I64(k), groups), outer.index), 4))
                        shift = builder.fadd(builder.uitofp(row.z, F32), F32(16.0))
                        more = builder.fmul(builder.fmul(row.h, shift), x_sum)
                        builder.store(builder.fsub(builder.load(rest[k]), more), rest[k])
            name = f"llvm.vector.reduce.fadd.v{sums_kind.count}f32"
            dots = [
                row.call(name, F32, builder.load(more), builder.load(total), fastmath=("reassoc",))
                for total, more in zip(totals, rest)
            ]
            return context.make_tuple(builder, signature.return_type, dots)

        return signature, codegen

    @intrinsic
    @no_type_check
    def _unpack_row(typingctx, mask, row, values, start, scale, zero_point, permutations, out):
        """A row of `out`, whole words, becomes the dense row: values as they are, codes as h (Q - z), rounded once."""
        signature = types.void(mask, row, values, start, scale, zero_point, permutations, out)

        def codegen(context, builder, signature, args):
            row = _Row(context, builder, signature.args, args[:7])
            at, (_, columns) = row.array(out, args[7])
            size = out.dtype.bitwidth // 8
            at = row.at(at, builder.mul(args[1], columns), size)
            groups = row.groups if row.is_code else I64(1)
            n_words = builder.udiv(row.words, groups)
            with cgutils.for_range(builder, groups) as outer:
                if row.is_code:
                    row.enter(outer.index)
                with cgutils.for_range(builder, n_words) as inner:
                    word = builder.add(builder.mul(outer.index, n_words), inner.index)
                    for n, part in enumerate(row.dense(word, out.dtype)):
                        place = builder.add(builder.mul(word, I64(WORD)), I64(n * part.type.count))
                        row.store(part, row.at(at, place, size))
            return context.get_dummy_value()

        return signature, codegen

    @numba.njit(nogil=True, cache=True)
    @no_type_check
    def unpack(mask, starts, scale, zero_point, out, values, permutations):
        """out = W, in whole words."""
        for row in range(mask.shape[0]):
            _unpack_row(mask, row, values, starts[row], scale, zero_point, permutations, out)

    @numba.njit(nogil=True, cache=True)
    @no_type_check
    def product(mask, starts, scale, zero_point, out, values, permutations, xs, x_sums):
        """out = W xs."""
        for row in range(mask.shape[0]):
            dots = _row_dots(mask, row, values, starts[row], scale, zero_point, permutations, xs, x_sums)
            for k in range(len(dots)):
                out[row, k] = dots[k]
