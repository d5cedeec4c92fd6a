"""The stores of the compiled backend by themselves: its static functions behind doors."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from mpcore.backends import _c_command, _c_compiler

_DOORS = """
#define SIZE(i) (n - (i) < TILE ? n - (i) : TILE)
void round_all_randomly(const float *from, uint16_t *to, int64_t n, const uint32_t *words,
                        int shift) {
    round_randomly(from, to, n, words, shift);
}
void encode_row(const float *from, uint8_t *to, int64_t n, const uint32_t *words, int shift,
                int is_signed, float *scales) {
    for (int64_t i = 0; i < n; i += TILE)
        scales[i / TILE] = encode_block(from + i, to + i, SIZE(i), words + i, shift, is_signed);
}
void decode_row(const uint8_t *from, float *to, int64_t n, int is_signed, const float *scales) {
    for (int64_t i = 0; i < n; i += TILE)
        (is_signed ? decode_int8 : decode_uint8)(from + i, to + i, SIZE(i), scales[i / TILE]);
}
"""


@cache
def _library():
    return _c_compiler.load(f'#include "{_c_command.SOURCE}"\n{_DOORS}')


def _places(*tensors):
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _words(bits, shift):
    """Words that hold bits in one half, and others in the other one."""
    other = 0x5A5A << (16 - shift)
    return ((bits.long() << shift) | other).to(torch.uint32)


def round_randomly(value, bits, shift=16):
    """`mpcore.stores.rounding.round_randomly` in C."""
    to, words = torch.empty(value.shape, dtype=torch.bfloat16), _words(bits, shift)
    places = _places(value, to)
    count = ctypes.c_int64(value.numel())
    _library().round_all_randomly(*places, count, *_places(words), shift)
    return to


def encode_blocks(value, dtype, bits, shift=16):
    """`mpcore.stores.blocks.encode_blocks` in C, of contiguous rows."""
    rows, row = value.shape
    codes, words = torch.empty(value.shape, dtype=dtype), _words(bits, shift)
    scales = torch.empty(rows, -(-row // 256))
    is_signed = int(dtype == torch.int8)
    for i in range(rows):
        places = _places(value[i], codes[i])
        given = ctypes.c_int64(row), *_places(words[i]), shift, is_signed
        _library().encode_row(*places, *given, *_places(scales[i]))
    return codes, scales


def decode_blocks(codes, scales):
    """`mpcore.stores.blocks.decode_blocks` in C, of contiguous rows."""
    values = torch.empty(codes.shape)
    is_signed = int(codes.dtype == torch.int8)
    for i in range(len(codes)):
        places = _places(codes[i], values[i])
        given = ctypes.c_int64(codes.shape[1]), is_signed
        _library().decode_row(*places, *given, *_places(scales[i]))
    return values
