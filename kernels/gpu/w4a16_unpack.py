"""Device functions over the words of kernels/gpu/w4a16_pack.py: where they are, what they hold."""

import triton
import triton.language as tl

TILE = tl.constexpr(64)  # inputs and outputs of a tile
TILE_WORDS = tl.constexpr(512)
ROW_WORDS = tl.constexpr(8)
SCALE_COLUMNS = tl.constexpr(256)

_UNPACK = """{
    .reg .b32 t1, t2, t3, a, b, c, d;
    shr.u32 t1, $8, 4;
    shr.u32 t2, $8, 8;
    shr.u32 t3, $8, 12;
    lop3.b32 a, $8, 0x000f000f, BASE, 0xea;
    lop3.b32 b, t1, 0x000f000f, BASE, 0xea;
    lop3.b32 c, t2, 0x000f000f, BASE, 0xea;
    lop3.b32 d, t3, 0x000f000f, BASE, 0xea;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    mov.b32 {$4, $5}, c;
    mov.b32 {$6, $7}, d;
}"""
# A 16-bit float whose mantissa step is 1 takes a nibble as its low bits: one lop3, two values.
UNPACK_BF16 = tl.constexpr(_UNPACK.replace("BASE", "0x43004300"))  # 128 + q
UNPACK_FP16 = tl.constexpr(_UNPACK.replace("BASE", "0x64006400"))  # 1024 + q
EIGHT_HALVES = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r")


@triton.jit
def output_of(rows, pid_n, N, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Rows of a program's block -> outputs; GATED: half of them are in each half of the matrix."""
    if GATED:
        HALF: tl.constexpr = BLOCK_N // 2
        offs_n = rows // HALF * (N // 2) + pid_n * HALF + rows % HALF
    else:
        offs_n = pid_n * BLOCK_N + rows
    return offs_n


@triton.jit
def row_offsets(offs_n, N, K):
    """Offsets of the first words of these outputs; beyond the last tile it is read again."""
    row_tiles = tl.minimum(offs_n // TILE, tl.cdiv(N, TILE) - 1)
    return row_tiles * (tl.cdiv(K, TILE) * TILE_WORDS) + offs_n % TILE * ROW_WORDS


@triton.jit
def step_offset(step, BLOCK_K: tl.constexpr):
    """Offset, within a row, of the words of BLOCK_K inputs."""
    if BLOCK_K < TILE:
        offset = step // 2 * TILE_WORDS + step % 2 * (ROW_WORDS // 2)
    else:
        offset = step * (BLOCK_K // TILE * TILE_WORDS)
    return offset


@triton.jit
def column_offsets(BLOCK_K: tl.constexpr):
    cols = tl.arange(0, BLOCK_K // 8)
    return cols // ROW_WORDS * TILE_WORDS + cols % ROW_WORDS


@triton.jit
def unpack_int4(words, dtype: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K / 8] words -> [BLOCK_N, BLOCK_K] of dtype, without leaving registers.

    q in float32, 128 + q in bf16 and 1024 + q in fp16.
    """
    if dtype == tl.float32:
        a0 = (words & 15).to(tl.float32)
        a1 = ((words >> 16) & 15).to(tl.float32)
        b0 = ((words >> 4) & 15).to(tl.float32)
        b1 = ((words >> 20) & 15).to(tl.float32)
        c0 = ((words >> 8) & 15).to(tl.float32)
        c1 = ((words >> 24) & 15).to(tl.float32)
        d0 = ((words >> 12) & 15).to(tl.float32)
        d1 = ((words >> 28) & 15).to(tl.float32)
    elif dtype == tl.bfloat16:
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            UNPACK_BF16, EIGHT_HALVES, [words], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1
        )
    else:
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            UNPACK_FP16, EIGHT_HALVES, [words], dtype=(tl.float16,) * 8, is_pure=True, pack=1
        )
    s0 = tl.join(tl.join(a0, a1), tl.join(b0, b1))
    s1 = tl.join(tl.join(c0, c1), tl.join(d0, d1))
    # [n, w, lane, pair, h, s] -> [n, w, s, h, lane, pair]
    fragments = tl.reshape(tl.join(s0, s1), (BLOCK_N, BLOCK_K // 32, 4, 2, 2, 2))
    return tl.reshape(tl.permute(fragments, (0, 1, 5, 4, 2, 3)), (BLOCK_N, BLOCK_K))


@triton.jit
def per_input(values, BLOCK_K: tl.constexpr):
    """[BLOCK_N, groups] -> [BLOCK_N, BLOCK_K], each value for its group's inputs."""
    BLOCK_N: tl.constexpr = values.shape[0]
    groups: tl.constexpr = values.shape[1]
    spread = tl.broadcast_to(values[:, :, None], (BLOCK_N, groups, BLOCK_K // groups))
    return tl.reshape(spread, (BLOCK_N, BLOCK_K))


@triton.jit
def centre(weight, zero):
    """What `unpack_int4` gave -> q - zero, exact; zero uint8 [BLOCK_N, groups], or None for 8."""
    sixteen: tl.constexpr = 128.0 if weight.dtype == tl.bfloat16 else 1024.0
    base: tl.constexpr = 0.0 if weight.dtype == tl.float32 else sixteen
    if zero is None:
        centred = weight - (base + 8.0)
    else:
        zero = (base + zero.to(tl.float32)).to(weight.dtype)
        centred = weight - per_input(zero, weight.shape[1])
    return centred
