// The decoder's steps between its products, in bf16 with float32 inside, one pass over each row.
#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace manta {
namespace {

constexpr long kSerialValues = 65536;  // fewer are done by one thread: waking another costs more

inline int threads_for(long values, int threads) { return values < kSerialValues ? 1 : threads; }

// The lanes of a row's last 16 values that exist.
MANTA_TARGET inline __mmask16 lanes(long left) {
    return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

MANTA_TARGET inline __m512 load(const uint16_t* bf16, __mmask16 mask) {
    return widen(_mm256_maskz_loadu_epi16(mask, bf16));
}

MANTA_TARGET inline void store(uint16_t* bf16, __mmask16 mask, __m512 values) {
    _mm256_mask_storeu_epi16(bf16, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

MANTA_TARGET inline __m512 rounded(__m512 values) {
    return widen(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

MANTA_TARGET void norm_row(const uint16_t* x, const uint16_t* weight, uint16_t* out, long size,
                           float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < size; i += 16) {
        __m512 value = load(x + i, lanes(size - i));
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(size);
    __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        __m512 normed = rounded(_mm512_mul_ps(load(x + i, mask), factor));
        store(out + i, mask, _mm512_mul_ps(normed, load(weight + i, mask)));
    }
}

MANTA_TARGET void add_row(const uint16_t* x, const uint16_t* y, uint16_t* sum, long size) {
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        store(sum + i, mask, _mm512_add_ps(load(x + i, mask), load(y + i, mask)));
    }
}

// Values i and i + half of one head turn by one angle.
MANTA_TARGET void rotate_head(uint16_t* x, const uint16_t* cos, const uint16_t* sin, long half) {
    for (long i = 0; i < half; i += 16) {
        __mmask16 mask = lanes(half - i);
        __m512 first = load(x + i, mask), second = load(x + half + i, mask);
        __m512 turned = _mm512_mul_ps(second, load(sin + i, mask));
        store(x + i, mask, _mm512_fmadd_ps(first, load(cos + i, mask), turned));
        turned = _mm512_mul_ps(first, load(sin + half + i, mask));
        store(x + half + i, mask, _mm512_fmadd_ps(second, load(cos + half + i, mask), turned));
    }
}

MANTA_TARGET void silu_mul_row(const uint16_t* gate_up, uint16_t* out, long size) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        __m512 gate = load(gate_up + i, mask);
        // sigmoid by e^-|x|, which never overflows
        __m512 power = exp512(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(gate)));
        __mmask16 negative = _mm512_cmp_ps_mask(gate, _mm512_setzero_ps(), _CMP_LT_OQ);
        __m512 upper = _mm512_mask_mov_ps(one, negative, power);
        __m512 silu = _mm512_mul_ps(gate, _mm512_div_ps(upper, _mm512_add_ps(one, power)));
        store(out + i, mask, _mm512_mul_ps(rounded(silu), load(gate_up + size + i, mask)));
    }
}

}  // namespace
}  // namespace manta

using namespace manta;

// Renamed with every change of a signature or of the packed weights: a library compiled from other
// sources must not be called.
extern "C" void manta_abi_1() {}

// In place: x [tokens, heads, size], tokens x_stride apart; weight [heads, size].
extern "C" void manta_rms_norm_heads(uint16_t* x, const uint16_t* weight, long num_tokens,
                                     long heads, long size, long x_stride, float eps,
                                     int threads) {
#pragma omp parallel for num_threads(threads_for(num_tokens * heads * size, threads))
    for (long token = 0; token < num_tokens; ++token)
        for (long head = 0; head < heads; ++head) {
            uint16_t* row = x + token * x_stride + head * size;
            norm_row(row, weight + head * size, row, size, eps);
        }
}

// sum = x + residual, out = norm(sum); all [rows, size].
extern "C" void manta_add_rms_norm(const uint16_t* x, const uint16_t* residual,
                                   const uint16_t* weight, uint16_t* sum, uint16_t* out,
                                   long num_rows, long size, float eps, int threads) {
#pragma omp parallel for num_threads(threads_for(num_rows * size, threads))
    for (long row = 0; row < num_rows; ++row) {
        add_row(x + row * size, residual + row * size, sum + row * size, size);
        norm_row(sum + row * size, weight, out + row * size, size, eps);
    }
}

// In place: x [tokens, heads, head_dim], tokens x_stride apart; cos, sin [tokens, rotary].
extern "C" void manta_rope(uint16_t* x, const uint16_t* cos, const uint16_t* sin, long num_tokens,
                           long heads, long head_dim, long rotary, long x_stride, int threads) {
#pragma omp parallel for num_threads(threads_for(num_tokens * heads * rotary, threads))
    for (long token = 0; token < num_tokens; ++token)
        for (long head = 0; head < heads; ++head)
            rotate_head(x + token * x_stride + head * head_dim, cos + token * rotary,
                        sin + token * rotary, rotary / 2);
}

// gate_up [rows, 2 * size] -> [rows, size].
extern "C" void manta_silu_mul(const uint16_t* gate_up, uint16_t* out, long num_rows, long size,
                               int threads) {
#pragma omp parallel for num_threads(threads_for(num_rows * size, threads))
    for (long row = 0; row < num_rows; ++row)
        silu_mul_row(gate_up + row * 2 * size, out + row * size, size);
}

// kv [tokens, heads, head_dim], tokens kv_stride apart -> cache [blocks, heads, block_size,
// head_dim] at slot_mapping[token] = block * block_size + offset. One head's values are copied
// as bytes.
extern "C" void manta_store_kv(const char* kv, char* cache, const int32_t* slot_mapping,
                               long num_tokens, long heads, long head_bytes, long kv_stride,
                               long block_size) {
    for (long token = 0; token < num_tokens; ++token) {
        long block = slot_mapping[token] / block_size, offset = slot_mapping[token] % block_size;
        for (long head = 0; head < heads; ++head)
            std::memcpy(cache + ((block * heads + head) * block_size + offset) * head_bytes,
                        kv + token * kv_stride + head * head_bytes, head_bytes);
    }
}
