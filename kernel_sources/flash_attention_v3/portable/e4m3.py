"""float8_e4m3fn: bytes to and from wider floats where the hardware has no instruction for it, and factors of tensors.

Before compute capability 8.9 the pointers of e4m3 tensors are those of bytes.
"""

import triton
import triton.language as tl


@triton.jit
def widened(x, DTYPE: tl.constexpr):
    """e4m3 as DTYPE, which holds every value of it: native where x is of that type, else from x's bytes."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        magnitude = bits & 0x7F
        # float16 has the same fields a byte higher and an exponent 8 larger, subnormals included; 0x7E00 is its NaN.
        half = tl.where(magnitude == 0x7F, 0x7E00, magnitude << 7) | (bits & 0x80) << 8
        x = half.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0
    return x.to(DTYPE)


@triton.jit
def widened_by_fours(x, DTYPE: tl.constexpr, PURE: tl.constexpr):
    """`widened` of a tile on a device that has e4m3.

    bf16 by way of float32: those conversions run at four times the rate of float16's. An operation that is not pure
    stays in front of a change of layout: behind it, bytes of a column are loaded one at a time.
    """
    if tl.bfloat16 == DTYPE:
        wide = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, a, b;
            .reg .b32 pair;
            .reg .f32 c, d;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 pair, low;
            mov.b32 {a, b}, pair;
            cvt.f32.f16 c, a;
            cvt.f32.f16 d, b;
            cvt.rn.bf16x2.f32 $0, d, c;
            cvt.rn.f16x2.e4m3x2 pair, high;
            mov.b32 {a, b}, pair;
            cvt.f32.f16 c, a;
            cvt.f32.f16 d, b;
            cvt.rn.bf16x2.f32 $1, d, c;
            }""",
            "=r,=r,r", [x.to(tl.uint8, bitcast=True)], tl.bfloat16, PURE, 4,
        )  # fmt: skip
    else:
        wide = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r", [x.to(tl.uint8, bitcast=True)], tl.float16, PURE, 4,
        )  # fmt: skip
    return wide


@triton.jit
def narrowed(x):
    """float32 as bytes of e4m3, to nearest, ties to even; what is larger than 448 becomes 448, NaN stays."""
    bits = tl.abs(x).to(tl.uint32, bitcast=True)
    # Below 2^-6 a byte counts steps of 2^-9, which is what the sum with 2^14 leaves in its last bits.
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)
    byte = tl.where(tl.abs(x) < 0.015625, small, normal)
    byte = tl.where(tl.abs(x) >= 448.0, 0x7E, byte)
    byte = tl.where(x != x, 0x7F, byte)
    sign = x.to(tl.uint32, bitcast=True) >> 24 & 0x80
    return (byte | sign).to(tl.uint8)


@triton.jit
def as_element(x, DTYPE: tl.constexpr):
    """float32 as the elements of a tensor, e4m3 as bytes."""
    if tl.uint8 == DTYPE:
        return narrowed(x)
    return x.to(DTYPE)


@triton.jit
def load_descale(pointer, batch, head, stride_batch, stride_head, flags, bit):
    """The factor of one sequence's key/value head; 1 without the tensor."""
    offset = batch.to(tl.int64) * stride_batch + head * stride_head
    return tl.load(pointer + offset, mask=(flags & bit) != 0, other=1.0)


@triton.jit
def with_sign(x, factor):
    """x, its signs turned where the factor is negative: what is multiplied behind is the factor's size."""
    if x.dtype.primitive_bitwidth > 8:
        turned = tl.where(factor < 0.0, -x, x)
    else:
        flipped = x.to(tl.uint8, bitcast=True) ^ tl.where(factor < 0.0, 0x80, 0).to(tl.uint8)
        turned = flipped.to(x.dtype, bitcast=True)
    return turned
