// y = x @ ((q - zero) * scale) + bias with 4-bit weights, on AMX tiles, for any number of rows.
//
// Weights are read once per 128 rows and unpacked into the first-level cache group by group: by a
// table look-up to the bf16 of q, or by masks to the int8 of q - zero. The products of a group are
// summed in a tile and then scaled in float32:
//
//     bf16 rows   y += scale[n] * (sum_k x[m, k] * q[k, n] - zero[n] * sum_k x[m, k])
//     int8 rows   y += scale[n] * step[m] * sum_k xq[m, k] * (q[k, n] - zero[n]),  x = step * xq
//
// where step = max |x| / 127 over the row's group. No product is rounded, and a row's result does
// not depend on the rows beside it. kernels/cpu/int4.py packs the weights.
#include "tiles.h"

#include <omp.h>

#include <algorithm>

namespace manta {
namespace {

constexpr long kRowBlock = 128;    // rows that share one unpacking: their sums stay in the L1 cache
constexpr long kPrefetch = 4096;  // bytes of packed weights asked for ahead

struct Linear {
    const uint16_t* x;      // bf16 [M, K], rows x_stride apart
    const uint8_t* packed;  // [N / 32, steps, 2, 8 * inputs of a step]
    const float* scales;    // [N / 32, K / g, 2, 16]
    const uint8_t* zeros;   // [N / 32, K / g, 2, 16]
    const uint16_t* bias;   // bf16 [N] or null
    uint16_t* y;            // bf16 [M, N]
    long num_rows, num_inputs, num_outputs, x_stride, group_size;

    long groups() const { return num_inputs / group_size; }
    long pairs() const { return (num_outputs + 2 * kTileRows - 1) / (2 * kTileRows); }
};

// x as tiles, [groups, pairs of row blocks, steps, 2, 16, depth], and a number per row and group:
// the sum of its values, or (int8) the value of one step.
struct Rows {
    char* tiles;
    float* numbers;  // [row blocks * 16, groups]
    long depth;      // bytes of K per step
    long steps;      // per group
    long groups;
    long pairs;      // of row blocks

    char* tile(long row_block, long group, long step) const {
        long at = ((group * pairs + row_block / 2) * steps + step) * 2 + row_block % 2;
        return tiles + at * kTileRows * depth;
    }
};

MANTA_TARGET void pack_row_bf16(const Linear& linear, const Rows& rows, long row) {
    const uint16_t* from = linear.x + row * linear.x_stride;
    for (long group = 0; group < rows.groups; ++group) {
        __m512 sum = _mm512_setzero_ps();
        for (long step = 0; step < rows.steps; ++step, from += 32) {
            char* to = rows.tile(row / kTileRows, group, step) + row % kTileRows * 64;
            _mm512_store_si512(to, _mm512_loadu_si512(from));
            sum = _mm512_add_ps(sum, _mm512_add_ps(widen(from), widen(from + 16)));
        }
        rows.numbers[row * rows.groups + group] = _mm512_reduce_add_ps(sum);
    }
}

MANTA_TARGET void pack_row_int8(const Linear& linear, const Rows& rows, long row) {
    const uint16_t* from = linear.x + row * linear.x_stride;
    for (long group = 0; group < rows.groups; ++group) {
        __m512 most = _mm512_setzero_ps(), poison = most;  // NaN if a value is NaN or infinite
        for (long k = 0; k < linear.group_size; k += 16) {
            __m512 values = widen(from + k);
            most = _mm512_max_ps(most, _mm512_abs_ps(values));
            poison = _mm512_add_ps(poison, _mm512_sub_ps(values, values));
        }
        const float value = std::max(_mm512_reduce_max_ps(most) / 127.0f, 1e-30f) +
                            _mm512_reduce_add_ps(poison);
        const __m512 inverse = _mm512_set1_ps(1.0f / value);
        for (long step = 0; step < rows.steps; ++step) {
            char* to = rows.tile(row / kTileRows, group, step) + row % kTileRows * rows.depth;
            for (long k = 0; k < rows.depth; k += 16, from += 16) {
                __m512i values = _mm512_cvtps_epi32(_mm512_mul_ps(widen(from), inverse));
                _mm_store_si128(reinterpret_cast<__m128i*>(to + k),
                                _mm512_cvtsepi32_epi8(values));
            }
        }
        rows.numbers[row * rows.groups + group] = value;
    }
}

// 512 bytes of packed weights -> two tiles: two panels of one step, 32 inputs.
MANTA_TARGET inline void unpack_bf16(const uint8_t* packed, char* tiles) {
    // bf16 of 0..15, twice: the look-up uses 5 bits and the fifth is the next nibble's.
    alignas(64) static const uint16_t kValues[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i values = _mm512_load_si512(kValues);
#pragma GCC unroll 8
    for (long at = 0; at < 512; at += 64, tiles += 256) {
        __m512i words = _mm512_loadu_si512(packed + at);
        _mm_prefetch(reinterpret_cast<const char*>(packed) + at + kPrefetch, _MM_HINT_T0);
        _mm512_store_si512(tiles, _mm512_permutexvar_epi16(words, values));
        _mm512_store_si512(tiles + 64,
                           _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), values));
        _mm512_store_si512(tiles + 128,
                           _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), values));
        _mm512_store_si512(tiles + 192,
                           _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), values));
    }
}

// `bytes` of packed weights -> two panels of one step, less their zeros [2, 16].
MANTA_TARGET inline void unpack_int8(const uint8_t* packed, const uint8_t* zeros, char* tiles,
                                     long bytes) {
    const __m512i low = _mm512_set1_epi8(15), four_times = _mm512_set1_epi32(0x01010101);
    for (long panel = 0; panel < 2; ++panel) {
        __m128i zero = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros) + panel);
        const __m512i less = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(zero), four_times);
#pragma GCC unroll 8
        for (long at = 0; at < bytes / 2; at += 64, packed += 64, tiles += 128) {
            __m512i nibbles = _mm512_loadu_si512(packed);
            _mm_prefetch(reinterpret_cast<const char*>(packed) + kPrefetch, _MM_HINT_T0);
            __m512i first = _mm512_and_si512(nibbles, low);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), low);
            _mm512_store_si512(tiles, _mm512_sub_epi8(first, less));
            _mm512_store_si512(tiles + 64, _mm512_sub_epi8(second, less));
        }
    }
}

template <bool kInt8>
MANTA_TARGET inline void unpack(const uint8_t* packed, const uint8_t* zeros, char* tiles,
                                long bytes) {
    if constexpr (kInt8)
        unpack_int8(packed, zeros, tiles, bytes);
    else
        unpack_bf16(packed, tiles);
}

// A macro, because the intrinsics want tile numbers as literals.
#define MULTIPLY(c, a, b)                                  \
    do {                                                   \
        if constexpr (kInt8)                               \
            _tile_dpbssd(c, a, b);                         \
        else                                               \
            _tile_dpbf16ps(c, a, b);                       \
    } while (false)

// Add one step of a group to the products of row blocks `block` and (kTwo) the next, both panels.
template <bool kInt8, bool kTwo>
MANTA_TARGET inline void multiply_step(const Rows& rows, long block, long group, long step,
                                       const char* weights) {
    const char* x = rows.tile(block, group, step);
    const long tile = rows.depth * kTileRows;
    _tile_loadd(6, weights, 64);
    _tile_loadd(4, x, rows.depth);
    MULTIPLY(0, 4, 6);
    _tile_loadd(7, weights + tile, 64);
    MULTIPLY(1, 4, 7);
    if constexpr (kTwo) {
        _tile_loadd(5, x + tile, rows.depth);
        MULTIPLY(2, 5, 6);
        MULTIPLY(3, 5, 7);
    }
}

MANTA_TARGET inline void zero_products() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// -> [row, 2, 16]
template <bool kTwo>
MANTA_TARGET inline void store_products(char* products) {
    _tile_stored(0, products, 128);
    _tile_stored(1, products + 64, 128);
    if constexpr (kTwo) {
        _tile_stored(2, products + 2 * kTileBytes, 128);
        _tile_stored(3, products + 2 * kTileBytes + 64, 128);
    }
}

MANTA_TARGET void write_row(const Linear& linear, long row, long output, const float* sums) {
    for (long panel = 0; panel < 2 && output < linear.num_outputs; ++panel, output += kTileRows) {
        long count = std::min(kTileRows, linear.num_outputs - output);
        __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
        __m512 sum = _mm512_load_ps(sums + panel * kTileRows);
        __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum));
        if (linear.bias != nullptr) {
            __m256i bias = _mm256_maskz_loadu_epi16(mask, linear.bias + output);
            bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_add_ps(sum, widen(bias))));
        }
        _mm256_mask_storeu_epi16(linear.y + row * linear.num_outputs + output, mask, bits);
    }
}

// A thread's memory for one call: twice what the tiles read and write, so that unpacking the next
// group and adding up the last products go on while the tiles multiply.
struct Buffers {
    char* weights[2];   // unpacked, one group of two panels
    char* products[2];  // four tiles
    float* sums;        // [kRowBlock, 2 * 16]
};

// What the products of one group and two panels are scaled by.
struct Scales {
    __m512 scale[2], zero[2];

    MANTA_TARGET void load(const Linear& linear, long at) {
        for (long side = 0; side < 2; ++side) {
            scale[side] = _mm512_loadu_ps(linear.scales + (2 * at + side) * kTileRows);
            zero[side] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
                reinterpret_cast<const __m128i*>(linear.zeros + (2 * at + side) * kTileRows))));
        }
    }
};

// Products in memory that are not yet in the sums: [count, 2, 16], like the sums they go to.
struct Pending {
    Scales by;
    long count;
    const char* products;
    const float* numbers;  // of `Rows`
    float* sums;

    template <bool kInt8>
    MANTA_TARGET inline void add(long begin, long end, long groups) const {
#pragma GCC unroll 8
        for (long row = begin; row < end; ++row) {
            const __m512 number = _mm512_set1_ps(numbers[row * groups]);
            for (long side = 0; side < 2; ++side) {
                const char* from = products + row * 128 + side * 64;
                float* to = sums + row * 32 + side * 16;
                __m512 product, factor = by.scale[side];
                if constexpr (kInt8) {
                    product = _mm512_cvtepi32_ps(_mm512_load_si512(from));
                    factor = _mm512_mul_ps(factor, number);
                } else {
                    product = _mm512_fnmadd_ps(by.zero[side], number, _mm512_load_ps(from));
                }
                _mm512_store_ps(to, _mm512_fmadd_ps(factor, product, _mm512_load_ps(to)));
            }
        }
    }
};

// Where the next group's weights are read and unpacked to; null when there is nothing to unpack.
struct Unpacking {
    const uint8_t* packed;
    const uint8_t* zeros;
    char* tiles;
};

// One group of up to 32 rows times two panels. The tiles multiply one step while the vector units
// unpack a step of the next group and add a share of the last products: what is in flight at once
// has to fit the core's window, so the three are cut as finely as the steps.
template <bool kInt8, bool kTwo, int kSteps>
MANTA_TARGET inline __attribute__((always_inline)) void multiply_group(
    const Rows& rows, long block, long group, const char* weights, Unpacking next,
    const Pending& pending, char* products) {
    const long tile = 2 * rows.depth * kTileRows, packed_step = tile / (kInt8 ? 2 : 4);
    constexpr long kShare = 2 * kTileRows / kSteps;
    zero_products();
#pragma GCC unroll 8
    for (long step = 0; step < kSteps; ++step) {
        multiply_step<kInt8, kTwo>(rows, block, group, step, weights + step * tile);
        if (next.packed != nullptr)
            unpack<kInt8>(next.packed + step * packed_step, next.zeros, next.tiles + step * tile,
                          packed_step);
        if (pending.count == 2 * kTileRows)  // unrolled
            pending.add<kInt8>(step * kShare, (step + 1) * kShare, rows.groups);
        else
            pending.add<kInt8>(std::min(step * kShare, pending.count),
                               std::min((step + 1) * kShare, pending.count), rows.groups);
    }
    store_products<kTwo>(products);
}

// Rows [first, last) times two panels.
template <bool kInt8, int kSteps>
MANTA_TARGET void multiply_panels(const Linear& linear, const Rows& rows, long pair, long first,
                                  long last, const Buffers& buffers) {
    const long packed_group = linear.group_size * kTileRows;
    const uint8_t* packed = linear.packed + pair * rows.groups * packed_group;
    const uint8_t* zeros = linear.zeros + pair * rows.groups * 2 * kTileRows;
    std::memset(buffers.sums, 0, (last - first) * 2 * kTileRows * sizeof(float));
    Pending pending = {};
    long turn = 0;
    for (long step = 0; step < rows.steps; ++step)
        unpack<kInt8>(packed + step * packed_group / rows.steps, zeros,
                      buffers.weights[0] + step * 2 * rows.depth * kTileRows,
                      packed_group / rows.steps);
    for (long group = 0; group < rows.groups; ++group) {
        Scales scales;
        scales.load(linear, pair * rows.groups + group);
        for (long row = first; row < last; row += 2 * kTileRows, turn ^= 1) {
            Unpacking next = {};
            if (row == first && group + 1 < rows.groups)
                next = {packed += packed_group, zeros += 2 * kTileRows,
                        buffers.weights[(group + 1) % 2]};
            char* products = buffers.products[turn];
            if (row + kTileRows < last)
                multiply_group<kInt8, true, kSteps>(rows, row / kTileRows, group,
                                            buffers.weights[group % 2], next, pending, products);
            else
                multiply_group<kInt8, false, kSteps>(rows, row / kTileRows, group,
                                             buffers.weights[group % 2], next, pending, products);
            pending = {scales, std::min(2 * kTileRows, last - row), products,
                       rows.numbers + row * rows.groups + group,
                       buffers.sums + (row - first) * 2 * kTileRows};
        }
    }
    pending.add<kInt8>(0, pending.count, rows.groups);
    for (long row = first; row < last; ++row)
        write_row(linear, row, pair * 2 * kTileRows, buffers.sums + (row - first) * 2 * kTileRows);
}

template <bool kInt8>
MANTA_TARGET void multiply_all(const Linear& linear, const Rows& rows, long thread, long threads) {
    static thread_local Scratch scratch;
    const long unpacked = 2 * rows.steps * rows.depth * kTileRows;
    char* memory = scratch.take(2 * unpacked + 8 * kTileBytes + kRowBlock * 2 * kTileRows * 4);
    Buffers buffers{{memory, memory + unpacked},
                    {memory + 2 * unpacked, memory + 2 * unpacked + 4 * kTileBytes},
                    reinterpret_cast<float*>(memory + 2 * unpacked + 8 * kTileBytes)};
    const long pairs = linear.pairs();
    const long begin = pairs * thread / threads, end = pairs * (thread + 1) / threads;
    const auto multiply = rows.steps == 1   ? multiply_panels<kInt8, 1>
                          : rows.steps == 2 ? multiply_panels<kInt8, 2>
                          : rows.steps == 4 ? multiply_panels<kInt8, 4>
                                            : multiply_panels<kInt8, 8>;
    TileConfig config = tile_config(std::min(kTileRows, linear.num_rows), rows.depth);
    _tile_loadconfig(&config);
    for (long first = 0; first < linear.num_rows; first += kRowBlock) {
        long last = std::min(first + kRowBlock, linear.num_rows);
        for (long pair = begin; pair < end; ++pair)
            multiply(linear, rows, pair, first, last, buffers);
    }
    _tile_release();
}

Rows make_rows(const Linear& linear, bool int8) {
    static thread_local Scratch scratch;
    Rows rows;
    rows.groups = linear.groups();
    rows.depth = int8 ? (linear.group_size % 64 == 0 ? 64 : 32) : 64;
    rows.steps = linear.group_size * (int8 ? 1 : 2) / rows.depth;
    rows.pairs = (linear.num_rows + 2 * kTileRows - 1) / (2 * kTileRows);
    const long padded = rows.pairs * 2 * kTileRows;
    const size_t tiles = padded * linear.num_inputs * (int8 ? 1 : 2);
    const size_t numbers = padded * rows.groups;
    rows.tiles = scratch.take(tiles + numbers * sizeof(float));
    rows.numbers = reinterpret_cast<float*>(rows.tiles + tiles);
    return rows;
}

}  // namespace
}  // namespace manta

extern "C" void manta_int4_linear(const uint16_t* x, const uint8_t* packed, const float* scales,
                                  const uint8_t* zeros, const uint16_t* bias, uint16_t* y,
                                  long num_rows, long num_inputs, long num_outputs, long x_stride,
                                  long group_size, int int8, int threads) {
    using namespace manta;
    Linear linear{x,        packed,     scales,      zeros,    bias,      y,
                  num_rows, num_inputs, num_outputs, x_stride, group_size};
    Rows rows = make_rows(linear, int8);
#pragma omp parallel num_threads(threads)
    {
        long thread = omp_get_thread_num(), count = omp_get_num_threads();
        long begin = num_rows * thread / count, end = num_rows * (thread + 1) / count;
        for (long row = begin; row < end; ++row)
            (int8 ? pack_row_int8 : pack_row_bf16)(linear, rows, row);
#pragma omp barrier
        (int8 ? multiply_all<true> : multiply_all<false>)(linear, rows, thread, count);
    }
}
