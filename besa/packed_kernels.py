"""The compiled passes over a packed projection: y = W x from its bits and values as they are, and its rows made dense.

A row is read 64 columns at a time, a word of the mask and as many values as it has bits: nothing but packed bytes comes
from memory. Two instruction sets, written as LLVM IR that numba compiles at first use and keeps in its cache, so that
nobody needs a compiler:

- avx512 (Sapphire Rapids, Zen 4 and later), for bfloat16 inputs: VPEXPANDW spreads 32 bfloat16 values to their columns,
  VPEXPANDB 64 codes of 4 bits, VDPBF16PS multiplies and sums. For several inputs, some rows at a time are spread into a
  cache, in tiles of 16 rows that meet 16 inputs at once.
- amx_bf16 (Sapphire Rapids and later): TDPBF16PS multiplies such a tile.
- avx2, for float32 inputs and any values: 8 bits of mask look up the permutation that spreads 8 values as float32.

Other processors have neither: `instructions` says "none".
"""

import contextlib
import ctypes
import functools
import itertools
import platform
import sys
from typing import no_type_check

import numpy as np

try:
    import llvmlite.binding
    import numba
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    from besa.machine.threads import compiled, in_threads
except ImportError:  # numba trails new Python releases
    numba = None

WORD = 64
"""Columns of one mask word."""
MOST_TOKENS = 16
"""Inputs that one pass over the packed bytes can multiply: their sums fill the registers."""
TILE, LINE = 16, 64
"""Rows of a tile register, bytes of each."""
PREFETCH = 2048  # bytes ahead; without it the product takes twice the time
AVX2 = {"avx2", "fma", "f16c", "popcnt"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512vbmi2", "avx512bf16"}


@functools.cache
def instructions() -> str:
    """What the processor offers that numba compiles for: "avx512", "avx2" or "none"."""
    if numba is None:
        return "none"
    return "avx512" if _features() >= AVX512 else "avx2" if _features() >= AVX2 else "none"


@functools.cache
def has_tiles() -> bool:
    """Whether there are tile registers for bfloat16, which Linux gives to a process that asks (ARCH_REQ_XCOMP_PERM)."""
    there = instructions() == "avx512" and {"amx-tile", "amx-bf16"} <= _features()
    asked = there and sys.platform == "linux" and platform.machine() == "x86_64"
    return asked and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0  # arch_prctl, for XTILEDATA


@functools.cache
def tile_shapes() -> np.ndarray | None:
    """What configures the tile registers: eight of 16 rows of 64 bytes; None where there are none."""
    if not has_tiles():
        return None
    shapes = np.zeros(64, np.uint8)
    shapes[0], shapes[16:32:2], shapes[48:56] = 1, LINE, TILE
    return shapes


def processor() -> str:
    """The processor's name, as LLVM knows it."""
    return _target()[1]


def _features() -> set[str]:
    return {name[1:] for name in _target()[2].split(",") if name.startswith("+")}


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
        """LLVM IR for both passes; addresses count bytes, loads and stores need no alignment."""

        def __init__(self, context, builder):
            self.context, self.b = context, builder

        def array(self, kind, value):
            """An array's address and its shape."""
            array = self.context.make_array(kind)(self.context, self.b, value)
            return self.b.bitcast(array.data, I8.as_pointer()), cgutils.unpack_tuple(self.b, array.shape)

        def at(self, address, offset, size=1):
            """The address `offset` elements of `size` bytes further on."""
            size = I64(size) if isinstance(size, int) else size
            return self.b.gep(address, [self.b.mul(offset, size)])

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
            """A constant, in every lane of a vector."""
            return ir.Constant(kind, [value] * kind.count if isinstance(kind, V) else value)

        def splat(self, scalar, count):
            undefined = ir.Constant(V(scalar.type, count), ir.Undefined)
            return self.b.shuffle_vector(
                self.b.insert_element(undefined, scalar, I32(0)), undefined, self.all(V(I32, count), 0)
            )

        def tile(self, name, *arguments):
            """An instruction on tile registers (amx_tile, amx_bf16)."""
            self.call(f"llvm.x86.{name}", ir.VoidType(), *arguments)
            return self.context.get_dummy_value()

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

        def add_pair(self, x, address, offset, sums):
            """The same with one pair of bfloat16 in memory for all lanes."""
            kind = ir.FunctionType(sums.type, [sums.type, x.type, address.type])
            line = f"vdpbf16ps {offset}($3){{1to16}}, $2, $0"
            return self.b.asm(kind, line, "=v,0,v,r,~{memory}", [sums, x, address], True)

        def like(self, kind, element):
            """The type of as many elements of another kind: a vector, or one."""
            return V(element, kind.count) if isinstance(kind, V) else element

        def widened(self, bits, kind):
            """Values in memory as float32: float16 (seen as int16), bfloat16 (uint16) or float32."""
            if kind == types.int16:
                return self.b.fpext(self.b.bitcast(bits, self.like(bits.type, F16)), self.like(bits.type, F32))
            if kind == types.uint16:
                bits = self.b.zext(bits, self.like(bits.type, I32))
                bits = self.b.shl(bits, self.all(bits.type, 16))
            return self.b.bitcast(bits, self.like(bits.type, F32))

        def rounded(self, floats, kind):
            """The way back, to the nearest, ties to even."""
            if kind == types.float32:
                return floats
            if kind == types.int16:
                return self.b.fptrunc(floats, self.like(floats.type, F16))
            bits = self.b.bitcast(floats, self.like(floats.type, I32))
            odd = self.b.and_(self.b.lshr(bits, self.all(bits.type, 16)), self.all(bits.type, 1))
            bits = self.b.add(self.b.add(bits, self.all(bits.type, 0x7FFF)), odd)
            return self.b.trunc(self.b.lshr(bits, self.all(bits.type, 16)), self.like(bits.type, I16))

    @no_type_check
    class _Row(_Builder):
        """One packed row on its way through: where its mask is, where its next value."""

        def __init__(self, context, builder, kinds, args):
            super().__init__(context, builder)
            mask, self.index, values, start, scale, zero_point, permutations = args
            self.kind = kinds[2].dtype
            self.is_code = self.kind in (types.uint8, types.int8)  # two codes a byte, one
            self.mask, (_, self.words) = self.array(kinds[0], mask)
            self.mask = self.at(self.mask, builder.mul(self.index, self.words), 8)
            self.values, _ = self.array(kinds[2], values)
            self.next = cgutils.alloca_once_value(builder, self.at(self.values, start, self.kind.bitwidth // 8))
            self.groups = I64(1)
            if self.is_code:
                self.scale, (_, self.groups) = self.array(kinds[4], scale)
                self.scale = self.at(self.scale, builder.mul(self.index, self.groups), 2)
                self.zero_point = self.at(self.array(kinds[5], zero_point)[0], builder.mul(self.index, self.groups))
            self.words_of_group = builder.udiv(self.words, self.groups)
            self.permutations = None if kinds[6] == types.none else self.array(kinds[6], permutations)[0]

        def enter_group(self, group):
            """Take the scale and zero-point of a group of columns; values have none."""
            if self.is_code:
                self.h = self.b.fpext(self.load(F16, self.at(self.scale, group, 2)), F32)
                self.z = self.load(I8, self.at(self.zero_point, group))

        @contextlib.contextmanager
        def each_group(self):
            """A loop over the groups of columns that share scale and zero-point; values are one group."""
            with cgutils.for_range(self.b, self.groups) as loop:
                self.enter_group(loop.index)
                yield loop.index

        @contextlib.contextmanager
        def each_word(self, group):
            """A loop over the words of a group's mask."""
            with cgutils.for_range(self.b, self.words_of_group) as loop:
                word = self.b.add(self.b.mul(group, self.words_of_group), loop.index)
                self.prefetch(word)
                yield word

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

        def prefetch(self, word):
            """The lines of mask and values that are needed some words from now."""
            self.prefetch_line(self.at(self.mask, word, 8), I64(PREFETCH))
            self.prefetch_values(I64(PREFETCH))

        def prefetch_values(self, ahead):
            """The values `ahead` bytes on."""
            self.prefetch_line(self.b.load(self.next), ahead)
            if self.kind.bitwidth > 8:  # a word may keep more than a line of them
                self.prefetch_line(self.b.load(self.next), self.b.add(ahead, I64(64)))

        def prefetch_line(self, address, ahead):
            self.call("llvm.prefetch.p0", ir.VoidType(), self.at(address, ahead), I32(0), I32(3), I32(1))

        def words32(self, word):
            """avx512: a word's columns as two vectors of 32 elements of 16 bits."""
            for half in range(2):
                bits = self.load(I32, self.at(self.mask, self.b.add(self.b.mul(word, I64(2)), I64(half)), 4))
                values = self.load(V(I16, 32), self.values_of(bits, 2))
                yield self.expand(values, bits, self.all(V(I16, 32), 0))

        def codes64(self, word, below, rest):
            """avx512: a word's 64 columns as bytes: codes and `below` bits that lie below them, `rest` where pruned."""
            eights = self.b.bitcast(self.b.zext(self.load(V(I32, 8), self.codes_of(word)), V(I64, 8)), V(I8, 64))
            fields = ir.Constant(V(I8, 64), [(4 * k - below) % 64 for k in range(8)] * 8)  # 8 bits from each code on
            codes = self.call("llvm.x86.avx512.pmultishift.qb.512", V(I8, 64), fields, eights)
            return self.expand(codes, self.load(I64, self.at(self.mask, word, 8)), rest)

        def codes32(self, word):
            """avx512: a word's 32 even, then its 32 odd columns as bfloat16 16 + code, 16 + zero-point where pruned.

            16 + code is 0x4180 | code << 3: no table, no conversion.
            """
            rest, pairs = self.splat(self.b.shl(self.z, I8(3)), 64), V(I16, 32)
            spread = self.b.bitcast(self.codes64(word, 3, rest), pairs)
            for part in (spread, self.b.lshr(spread, self.all(pairs, 8))):
                yield self.b.or_(self.b.and_(part, self.all(pairs, 0x0078)), self.all(pairs, 0x4180))

        def weights32(self, word, kind):
            """avx512: a word's columns as two vectors of 32 dense weights of 16 bits, looked up by their codes."""
            codes = ir.Constant(V(I32, 16), list(range(16)))
            table = self.b.sitofp(self.b.sub(codes, self.splat(self.b.zext(self.z, I32), 16)), V(F32, 16))
            table = self.rounded(self.b.fmul(table, self.splat(self.h, 16)), kind)
            twice = ir.Constant(V(I32, 32), [*range(16)] * 2)
            table = self.b.shuffle_vector(self.b.bitcast(table, V(I16, 16)), ir.Constant(V(I16, 16), None), twice)
            spread, nothing = self.codes64(word, 0, self.all(V(I8, 64), 0)), self.all(V(I16, 32), 0)
            for half in range(2):
                columns = ir.Constant(V(I32, 32), [*range(32 * half, 32 * half + 32)])
                codes = self.b.zext(self.b.shuffle_vector(spread, spread, columns), V(I16, 32))
                weights = self.call("llvm.x86.avx512.permvar.hi.512", V(I16, 32), table, codes)  # reads 5 bits: twice
                bits = self.load(I32, self.at(self.mask, self.b.add(self.b.mul(word, I64(2)), I64(half)), 4))
                yield self.b.select(self.b.bitcast(bits, V(ir.IntType(1), 32)), weights, nothing)

        def lanes8(self, word, to_float):
            """avx2: a word's columns as eight vectors of 8 int32: floats, or values' bits, or code - zero-point."""
            lanes, before = V(I32, 8), I64(0)
            codes = self.codes_of(word) if self.kind == types.uint8 else None
            for part in range(8):
                bits = self.load(I8, self.at(self.mask, self.b.add(self.b.mul(word, I64(8)), I64(part))))
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
                else:
                    values = self.load(V(I16, 8), self.values_of(bits, 2))
                    floats = self.b.bitcast(self.widened(values, self.kind), lanes)
                    values = floats if to_float else self.b.zext(values, lanes)
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
                yield from self.weights32(word, kind) if self.is_code else self.words32(word)
            elif not self.is_code:
                for lanes in self.lanes8(word, False):
                    yield lanes if kind == types.float32 else self.b.trunc(lanes, V(I16, 8))
            else:
                for floats in self.floats8(word):
                    yield self.rounded(self.b.fmul(floats, self.splat(self.h, 8)), kind)

    @no_type_check
    class _Products(_Row):
        """A row's products with some inputs: sums in vectors, one over the groups and a few within."""

        def __init__(self, context, builder, kinds, args, xs, x_sums):
            super().__init__(context, builder, kinds, args)
            (kind, xs), (sums_kind, x_sums) = xs, x_sums
            self.is_bfloat16 = kind.dtype.dtype == types.uint16
            self.xs = [self.array(kind.dtype, builder.extract_value(xs, k))[0] for k in range(kind.count)]
            self.x_sums = None if sums_kind == types.none else self.array(sums_kind, x_sums)[0]
            zero = self.all(V(F32, 16 if self.is_bfloat16 else 8), 0.0)
            n_partial = 2 if kind.count <= 4 else 1  # a sum waits for the one before
            self.totals, self.offsets, *self.partial = (
                [cgutils.alloca_once_value(builder, start) for _ in self.xs]
                for start in (zero, F32(0.0), *[zero] * n_partial)
            )

        def run(self):
            """The products, float32."""
            vectors = self.floats8 if not self.is_bfloat16 else self.codes32 if self.is_code else self.words32
            with self.each_group() as group:
                for slot in itertools.chain(*self.partial):
                    self.b.store(ir.Constant(slot.type.pointee, None), slot)
                with self.each_word(group) as word:
                    for part, w in enumerate(vectors(word)):
                        self.add(word, part, w)
                for k in range(len(self.xs)):
                    self.close(group, k)
            for total, offset in zip(self.totals, self.offsets):
                sums = self.b.load(total)
                name = f"llvm.vector.reduce.fadd.v{sums.type.count}f32"
                yield self.call(name, F32, self.b.load(offset), sums, fastmath=("reassoc",))

        def add(self, word, part, w):
            """A word's part of the weights, times every input."""
            size = w.type.count * (2 if self.is_bfloat16 else 4)
            place = self.b.add(self.b.mul(word, I64(WORD // w.type.count)), I64(part))
            for x, slot in zip(self.xs, self.partial[part % len(self.partial)]):
                chunk = self.load(w.type, self.at(x, place, size))
                self.b.store(self.multiply_add(chunk, w, self.b.load(slot)), slot)

        def close(self, group, k):
            """A group's sum goes to input k's total, times the scale where there is one."""
            total = functools.reduce(self.b.fadd, [self.b.load(slots[k]) for slots in self.partial])
            if self.is_code:
                h = self.splat(self.h, total.type.count)
                total = self.multiply_add(total, h, self.b.load(self.totals[k]))
            self.b.store(total, self.totals[k])
            if self.is_code and self.is_bfloat16:  # 16 + zero-point too much for every column
                place = self.b.add(self.b.mul(I64(k), self.groups), group)
                shift = self.b.fadd(self.b.uitofp(self.z, F32), F32(16.0))
                more = self.b.fmul(self.b.fmul(self.h, shift), self.load(F32, self.at(self.x_sums, place, 4)))
                self.b.store(self.b.fsub(self.b.load(self.offsets[k]), more), self.offsets[k])

    @intrinsic
    @no_type_check
    def _multiply_row(typingctx, mask, row, values, start, scale, zero_point, permutations, xs, x_sums, bias, out):
        """A row of out (rows, inputs) becomes its products with `xs`, a tuple, plus its bias, rounded once."""
        signature = types.void(mask, row, values, start, scale, zero_point, permutations, xs, x_sums, bias, out)

        def codegen(context, builder, signature, args):
            row = _Products(context, builder, signature.args, args[:7], (xs, args[7]), (x_sums, args[8]))
            memory = context.make_array(out)(context, builder, args[10])
            place, (by_row, by_input) = (
                builder.bitcast(memory.data, I8.as_pointer()),
                cgutils.unpack_tuple(builder, memory.strides),
            )
            place, size = row.at(place, row.index, by_row), out.dtype.bitwidth // 8
            for k, product in enumerate(row.run()):
                if bias != types.none:
                    kind = F32 if out.dtype == types.float32 else I16
                    more = row.load(kind, row.at(row.array(bias, args[9])[0], row.index, size))
                    product = builder.fadd(product, row.widened(more, out.dtype))
                row.store(row.rounded(product, out.dtype), row.at(place, by_input, k))
            return context.get_dummy_value()

        return signature, codegen

    @intrinsic
    @no_type_check
    def _unpack_row(typingctx, mask, row, values, start, scale, zero_point, permutations, out):
        """A row of `out`, whole words, becomes the dense row: values as they are, codes as h (Q - z), rounded once."""
        signature = types.void(mask, row, values, start, scale, zero_point, permutations, out)

        def codegen(context, builder, signature, args):
            row = _Row(context, builder, signature.args, args[:7])
            memory, (_, columns) = row.array(out, args[7])
            size = out.dtype.bitwidth // 8
            memory = row.at(memory, builder.mul(row.index, columns), size)
            with row.each_group() as group, row.each_word(group) as word:
                for n, part in enumerate(row.dense(word, out.dtype)):
                    place = builder.add(builder.mul(word, I64(WORD)), I64(n * part.type.count))
                    row.store(part, row.at(memory, place, size))
            return context.get_dummy_value()

        return signature, codegen

    @intrinsic
    @no_type_check
    def _spread(typingctx, mask, row, values, at, scale, zero_point, group, first, last, ahead, line):
        """Words `first` to `last` of a row, dense, go to its `line` of tiles, (words * 2, 32) of them; the next index.

        `ahead`: bytes from here to the values that are needed after all rows of the tiles have had their turn.
        """
        signature = types.int64(mask, row, values, at, scale, zero_point, group, first, last, ahead, line)

        def codegen(context, builder, signature, args):
            kinds = *signature.args[:6], types.none
            row = _Row(context, builder, kinds, [*args[:6], None])
            group, first, last, ahead, line = args[6:]
            line, _ = row.array(signature.args[10], line)
            row.enter_group(group)
            row.prefetch_line(row.at(row.mask, first, 8), I64(64))
            with cgutils.for_range(builder, builder.sub(last, first)) as loop:
                row.prefetch_values(ahead)
                for half, part in enumerate(row.dense(builder.add(first, loop.index), types.uint16)):
                    place = builder.add(builder.mul(loop.index, I64(2)), I64(half))
                    row.store(part, row.at(line, place, TILE * LINE))
            bytes_on = builder.sub(builder.ptrtoint(builder.load(row.next), I64), builder.ptrtoint(row.values, I64))
            return builder.udiv(bytes_on, I64(row.kind.bitwidth // 8))

        return signature, codegen

    @intrinsic
    @no_type_check
    def _open_tiles(typingctx, shapes):
        """Set this thread's tile registers up."""
        return types.void(shapes), lambda context, builder, signature, args: _Builder(context, builder).tile(
            "ldtilecfg", _Builder(context, builder).array(shapes, args[0])[0]
        )

    @intrinsic
    @no_type_check
    def _close_tiles(typingctx):
        """Give this thread's tile registers back."""
        return types.void(), lambda context, builder, signature, args: _Builder(context, builder).tile("tilerelease")

    @intrinsic
    @no_type_check
    def _multiply_tiles(typingctx, tiles, xs, first, n, sums, lanes, shapes):
        """sums (2, lanes, 16, 16) += `n` of both rows of tiles times those of xs (lanes, columns / 2, 16) from `first`.

        `lanes`: a tuple of as many elements, one or two; `shapes`: None where there are no tile registers.
        """
        multiply = _in_vectors if shapes == types.none else _in_tiles

        def codegen(context, builder, signature, args):
            b, (_, _, first, n, _, _, _) = _Builder(context, builder), args
            (tiles, (_, of_row, *_)), (x, (_, pairs, _)) = (b.array(signature.args[k], args[k]) for k in (0, 1))
            memory, _ = b.array(signature.args[4], args[4])
            sums = [b.at(memory, I64(k), TILE * LINE) for k in range(2 * lanes.count)]
            weights = [b.at(tiles, builder.mul(I64(i), of_row), TILE * LINE) for i in range(2)]
            lines = [b.at(x, builder.mul(I64(j), pairs), LINE) for j in range(lanes.count)]
            multiply(b, n, weights, [b.at(line, first, TILE * LINE) for line in lines], sums)
            return context.get_dummy_value()

        return types.void(tiles, xs, first, n, sums, lanes, shapes), codegen

    @no_type_check
    def _in_tiles(b, n, weights, inputs, sums):
        """amx_bf16: of eight registers 4 take sums, 2 weights, 2 inputs."""
        sums = [(I8(k), address) for k, address in enumerate(sums)]
        weights, inputs = ([(I8(k + i), a) for i, a in enumerate(some)] for k, some in ((4, weights), (6, inputs)))
        for register, address in sums:
            b.tile("tileloadd64", register, address, I64(LINE))
        with cgutils.for_range(b.b, n) as loop:
            for register, address in [*weights, *inputs]:
                b.tile("tileloadd64", register, b.at(address, loop.index, TILE * LINE), I64(LINE))
            for k, ((w, _), (x, _)) in enumerate(itertools.product(weights, inputs)):
                b.tile("tdpbf16ps", I8(k), w, x)
        for register, address in sums:
            b.tile("tilestored64", register, address, I64(LINE))

    @no_type_check
    def _in_vectors(b, n, weights, inputs, sums):
        """avx512: 16 registers take the sums of a tile, a row each; a pair of weights meets those of 16 inputs."""
        for total, (w, x) in zip(sums, itertools.product(weights, inputs)):
            rows = [b.at(total, I64(i), LINE) for i in range(TILE)]
            slots = [cgutils.alloca_once_value(b.b, b.load(V(F32, 16), row)) for row in rows]
            with cgutils.for_range(b.b, n) as loop:
                tile, pairs = (b.at(address, loop.index, TILE * LINE) for address in (w, x))
                for pair in range(TILE):
                    chunk = b.load(V(I16, 32), b.at(pairs, I64(pair), LINE))
                    for i, slot in enumerate(slots):
                        b.store(b.add_pair(chunk, tile, i * LINE + 4 * pair, b.b.load(slot)), slot)
            for row, slot in zip(rows, slots):
                b.store(b.b.load(slot), row)

    @intrinsic
    @no_type_check
    def _store_tile(typingctx, sums, out, row, rows, first, inputs):
        """Up to 16 rows and 16 inputs of `out` (rows, inputs) become sums (16, 16), from `row` and input `first` on."""

        def codegen(context, builder, signature, args):
            b, (sums, out, row, rows, first, inputs) = _Builder(context, builder), args
            sums, _ = b.array(signature.args[0], sums)
            memory = context.make_array(signature.args[1])(context, builder, out)
            by_row, by_input = cgutils.unpack_tuple(builder, memory.strides)
            place = b.at(b.at(builder.bitcast(memory.data, I8.as_pointer()), row, by_row), first, by_input)
            lines = [b.rounded(b.load(V(F32, 16), b.at(sums, I64(i), LINE)), types.uint16) for i in range(TILE)]
            halves = [ir.Constant(V(I32, 16), [k // 2 + k % 2 * TILE + half for k in range(TILE)]) for half in (0, 8)]
            for _ in range(4):  # halves of lines and of registers change places until a line is an input
                pairs = itertools.product(zip(lines[:8], lines[8:]), halves)
                lines = [builder.shuffle_vector(*pair, half) for pair, half in pairs]
            there = ir.Constant(V(I64, 16), list(range(TILE)))
            there = builder.icmp_signed("<", there, b.splat(rows, TILE))
            for j, line in enumerate(lines):
                with builder.if_then(builder.icmp_signed("<", I64(j), inputs)):
                    address = builder.bitcast(b.at(place, by_input, j), line.type.as_pointer())
                    b.call("llvm.masked.store.v16i16.p0", ir.VoidType(), line, address, I32(1), there)
            return context.get_dummy_value()

        return types.void(sums, out, row, rows, first, inputs), codegen

    @in_threads
    @no_type_check
    def multiply(first, last, mask, starts, scale, zero_point, bias, out, values, permutations, xs, x_sums):
        """out = W xs + bias; out is (rows, inputs)."""
        for row in range(first, last):
            _multiply_row(mask, row, values, starts[row], scale, zero_point, permutations, xs, x_sums, bias, out)

    @compiled
    @no_type_check
    def _ahead(at, start, later, word, step):
        """How far on the values lie that are needed next: what a step took so far, or where a `later` row starts."""
        return later - at if later else (at - start) // max(word, 1) * step

    @compiled
    @no_type_check
    def _store_tiles(sums, out, top, n):
        """`n` rows of `out` (rows, inputs) from `top` on become sums (pairs of tiles, passes, 2, lanes, 16, 16)."""
        for i in range(0, n, TILE):
            for k in range(sums.shape[1]):
                for j in range(sums.shape[3]):
                    first, tile = (k * sums.shape[3] + j) * TILE, sums[i // TILE // 2, k, i // TILE % 2, j]
                    _store_tile(tile, out, top + i, n - i, first, out.shape[1] - first)

    @in_threads
    @no_type_check
    def multiply_tiles(
        first_row, last_row, mask, starts, scale, zero_point, bias, out, values, shapes, xs, lanes, block, step
    ):
        """out = W xs + bias in bfloat16, by tiles of 16 rows and of 16 inputs; out is (rows, inputs).

        xs: inputs as pairs of columns, uint32 (passes, lanes, columns / 2, 16); lanes: a tuple of as many elements.
        block, step: rows, words of each, that are dense at a time and multiplied with all inputs.
        """
        rows, words = mask.shape
        words_of_group = words if scale is None else words // scale.shape[1]
        room = np.empty((block // TILE * 2 * step + 1) * TILE * TILE, np.uint32)
        tiles = room[-(room.ctypes.data // 4) % TILE :][: room.size - TILE * TILE]  # whole cache lines
        tiles = tiles.reshape(block // TILE, 2 * step, TILE, TILE)
        sums = np.empty((block // TILE // 2, len(xs), 2, len(lanes), TILE, TILE), np.float32)
        bits, at = sums.view(np.uint32), np.empty(block, np.int64)
        if shapes is not None:
            _open_tiles(shapes)
        for top in range(first_row, last_row, block):
            n = min(block, last_row - top)
            at[:n] = starts[top : top + n]
            sums[:] = 0
            if bias is not None:
                for i in range(n):
                    bits[i // TILE // 2, :, i // TILE % 2, :, i % TILE] = np.uint32(bias[top + i]) << np.uint32(16)
            for first in range(0, words, words_of_group):
                for word in range(first, first + words_of_group, step):
                    last, group = min(word + step, first + words_of_group), first // words_of_group
                    for i in range(n):
                        row, line = top + i, tiles[i // TILE, :, i % TILE]
                        later = starts[min(row + block, rows - 1)] if last == words else 0
                        ahead = _ahead(at[i], starts[row], later, word, step) * values.itemsize
                        at[i] = _spread(mask, row, values, at[i], scale, zero_point, group, word, last, ahead, line)
                    for k in range(len(xs)):
                        for i in range(-(-n // (2 * TILE))):
                            pair = tiles[2 * i : 2 * i + 2]
                            _multiply_tiles(pair, xs[k], 2 * word, 2 * (last - word), sums[i, k], lanes, shapes)
            _store_tiles(sums, out, top, n)
        if shapes is not None:
            _close_tiles()

    @in_threads
    @no_type_check
    def unpack(first, last, mask, starts, scale, zero_point, out, values, permutations):
        """out = W, in whole words."""
        for row in range(first, last):
            _unpack_row(mask, row, values, starts[row], scale, zero_point, permutations, out)

    @functools.partial(compiled, fastmath={"reassoc"})
    @no_type_check
    def inputs_of_codes(tokens, n_inputs, n_words, n_groups):
        """Inputs for bfloat16 products with codes: of each word the even columns, then the odd ones; sums by group.

        Tokens are bfloat16 seen as uint16; there are zeros behind the last token and the last column.
        """
        n_tokens, columns = tokens.shape
        xs, sums = np.zeros((n_inputs, n_words * WORD), np.uint16), np.zeros((n_inputs, n_groups), np.float32)
        for k in range(n_tokens):
            for j in range(columns):
                word, place = j // WORD, j % WORD
                xs[k, word * WORD + place % 2 * (WORD // 2) + place // 2] = tokens[k, j]
            bits = np.empty(columns, np.uint32)
            for j in range(columns):
                bits[j] = np.uint32(tokens[k, j]) << np.uint32(16)
            x = bits.view(np.float32)
            for group in range(n_groups):
                total = np.float32(0)
                for j in range(group * columns // n_groups, (group + 1) * columns // n_groups):
                    total += x[j]
                sums[k, group] = total
        return xs, sums
