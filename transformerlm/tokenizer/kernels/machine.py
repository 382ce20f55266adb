"""What machines can do and Python has no word for: loads and stores at an address, bit counts, 64 bytes at once.

Kernels see text as an address and an offset, because what they do most is read 8 or 64 bytes that start anywhere.
Nothing here checks bounds: every caller reads from buffers that go on for `PADDING` bytes after the text.

Masks are `uint64` throughout. Mixing them with signed integers would silently turn both into floats (Numba follows
NumPy there), so offsets and shifts enter through `bit` and `low_bits`, and constants are spelled `np.uint64`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import config as numba_config
from numba.extending import intrinsic as numba_intrinsic

from transformerlm.tokenizer.readiness import cache_directory

config: Any = numba_config
Array: TypeAlias = Any
"""A NumPy array. Numba infers its type; NumPy's annotations do not tell a number from an array of them."""

PADDING = 128
"""Bytes that must be readable after the end of a text: a block of 64 and the two words of a key, with room to spare."""

ZERO = np.uint64(0)
ONE = np.uint64(1)
ALL_BITS = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
HALF = np.uint64(32)

# Odd numbers of no pattern. The high bits of a product with one depend on all bits of the other factor.
MIX_1 = np.uint64(0x9E3779B97F4A7C15)
MIX_2 = np.uint64(0xD6E8FEB86659FD93)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use, keep the result on disk, and let go of the interpreter's lock while running."""
    return _compiled(function, counts_references=True)


def inner_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that only kernels call, for each character or word: one that makes no arrays.

    Numba counts references to the arrays that are arguments of a call, with atomic additions that cost more than most
    of these functions do. `_nrt=False` leaves that out; `np.empty` is then refused.
    """
    return _compiled(function, counts_references=False)


def _compiled(function: Callable[..., Any], counts_references: bool) -> Callable[..., Any]:
    # Numba asks where to keep it when a function is decorated; those of other packages keep their place.
    others = config.CACHE_DIR
    config.CACHE_DIR = str(cache_directory())
    try:
        options: dict[str, Any] = {"cache": True, "nogil": True, "boundscheck": False, "error_model": "numpy"}
        options["_nrt"] = counts_references
        return njit(**options)(function)
    finally:
        config.CACHE_DIR = others


def intrinsic(definition: Callable[..., Any]) -> Callable[..., Any]:
    """A function of kernels that is written as LLVM instructions; `definition` takes Numba's types of the arguments."""
    return numba_intrinsic(definition)


_bit = ir.IntType(1)
_byte = ir.IntType(8)
_word = ir.IntType(64)


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType())


def _load(width: int, result: Any) -> Any:
    def make(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = builder.load(_at(builder, arguments[0]), align=1, typ=ir.IntType(width))
            return value if width == 64 else builder.zext(value, _word)

        return result(types.int64), generate

    return make


def _store(width: int) -> Any:
    def make(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = arguments[1] if width == 64 else builder.trunc(arguments[1], ir.IntType(width))
            builder.store(value, _at(builder, arguments[0]), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.uint64 if width == 64 else types.int64), generate

    return make


load_byte = intrinsic(_load(8, types.int64))
"""`load_byte(address) -> int64`, 0 to 255."""
load_word = intrinsic(_load(64, types.uint64))
"""`load_word(address) -> uint64`: 8 bytes, the first one lowest (on little-endian machines)."""
store_16 = intrinsic(_store(16))
store_32 = intrinsic(_store(32))
store_word = intrinsic(_store(64))


@intrinsic
def copy_16_bytes(typing_context: Any, target: Any, source: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = builder.load(_at(builder, arguments[1]), align=1, typ=ir.VectorType(_word, 2))
        builder.store(vector, _at(builder, arguments[0]), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at `address`, which will be needed soon."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        shape = ir.FunctionType(ir.VoidType(), [ir.PointerType(), number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [ir.PointerType()], shape)
        # 0: to be read, 3: to be kept, 1: data
        builder.call(function, [_at(builder, arguments[0]), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def lowest_bit(typing_context: Any, mask: Any) -> Any:
    """The number of the lowest set bit; 64 if there is none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], _bit(0))

    return types.int64(types.uint64), generate


@intrinsic
def highest_bit(typing_context: Any, mask: Any) -> Any:
    """The number of the highest set bit; -1 if there is none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sub(_word(63), builder.ctlz(arguments[0], _bit(0)))

    return types.int64(types.uint64), generate


@intrinsic
def count_bits(typing_context: Any, mask: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def bit(typing_context: Any, number: Any) -> Any:
    """The mask with one bit set; `number` is 0 to 63."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.shl(_word(1), arguments[0])

    return types.uint64(types.int64), generate


@intrinsic
def as_mask(typing_context: Any, number: Any) -> Any:
    """The same 64 bits without a sign."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]

    return types.uint64(types.int64), generate


@intrinsic
def as_number(typing_context: Any, mask: Any) -> Any:
    """The same 64 bits as a signed number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]

    return types.int64(types.uint64), generate


@kernel
def low_bits(count: int) -> np.uint64:
    """The mask of the lowest `count` bits, 0 to 63."""
    return bit(count) - ONE


@intrinsic
def classify_64_bytes(typing_context: Any, address: Any) -> Any:
    """What the 64 bytes at `address` are, a bit for each: letters, digits, spaces, white space, apostrophes, leads.

    Only ASCII is told apart here: of a longer character the first byte is one of the leads, the others are nothing.
    """
    result = types.UniTuple(types.uint64, 6)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(_byte, 64)
        text = builder.load(_at(builder, arguments[0]), align=1, typ=vector)

        def all_of(value: int) -> Any:
            return ir.Constant(vector, [value] * 64)

        def within(values: Any, first: str, last: str) -> Any:
            # One comparison does for a range: what lies below `first` wraps around to large numbers.
            offset = builder.sub(values, all_of(ord(first)))
            return builder.bitcast(builder.icmp_unsigned("<=", offset, all_of(ord(last) - ord(first))), _word)

        letters = within(builder.or_(text, all_of(0x20)), "a", "z")  # 0x20 makes capitals small
        digits = within(text, "0", "9")
        spaces = within(text, " ", " ")
        white = builder.or_(spaces, within(text, "\t", "\r"))
        apostrophes = within(text, "'", "'")
        leads = builder.bitcast(builder.icmp_unsigned(">=", text, all_of(0xC2)), _word)
        return context.make_tuple(builder, result, [letters, digits, spaces, white, apostrophes, leads])

    return result(types.int64), generate


@intrinsic
def equal_bytes(typing_context: Any, address: Any, value: Any) -> Any:
    """Which of the 64 bytes at `address` are `value`, a bit for each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(_byte, 64)
        text = builder.load(_at(builder, arguments[0]), align=1, typ=vector)
        wanted = builder.insert_element(
            ir.Constant(vector, ir.Undefined), builder.trunc(arguments[1], _byte), ir.IntType(32)(0)
        )
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64)
        wanted = builder.shuffle_vector(wanted, ir.Constant(vector, ir.Undefined), lanes)
        return builder.bitcast(builder.icmp_unsigned("==", text, wanted), _word)

    return types.uint64(types.int64, types.int64), generate
