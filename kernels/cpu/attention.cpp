// Attention of decode rows, one query each, over the paged KV cache in bf16.
//
// A unit of work is one sequence and some of its key heads, whose keys lie side by side in a block:
// tiles of keys are multiplied straight from the cache by the queries of the heads that share them,
// [16 keys, D] x [D, heads]; softmax over the whole context and sums of values in float32. Nothing
// is gathered or copied, and blocks are read in order, which is what the memory is fast at.
#include <omp.h>

#include <algorithm>
#include <limits>

#include "tiles.h"

namespace manta {
namespace {

constexpr long kKeys = 16;           // keys per tile; block_size is a multiple
constexpr long kSerialKeys = 512;  // a step with less work is done by one thread

struct Attention {
    const uint16_t* q;    // bf16 [S, Hkv, heads, D], rows q_stride apart
    const uint16_t* cache;  // bf16 [num_blocks, 2 * Hkv, block_size, D]
    const int32_t* block_tables;  // [S, table_stride]
    const int32_t* context_lens;  // [S]
    uint16_t* out;                // bf16 [S, Hkv, heads, D]
    long num_seqs, num_kv_heads, heads, head_dim, block_size, q_stride, table_stride, window;
    float scale;

    long first_key(long seq) const {
        return window > 0 ? std::max(0L, context_lens[seq] - window) : 0;
    }
    // The keys (values) of positions [position / 16 * 16, + 16) of a sequence.
    const uint16_t* keys(long seq, long head, long position) const {
        long block = block_tables[seq * table_stride + position / block_size];
        long offset = position % block_size / kKeys * kKeys;
        return cache + ((block * 2 * num_kv_heads + head) * block_size + offset) * head_dim;
    }
    const uint16_t* values(long seq, long head, long position) const {
        return keys(seq, head, position) + num_kv_heads * block_size * head_dim;
    }
};

// The queries of key heads [kv_first, kv_last) of one sequence, which read the keys of positions
// [start + first, start + last). Key head h's queries are rows h * heads ... of everything below.
struct Unit {
    long seq, kv_first, kv_last;
    long start, first, last;  // start is the first of a tile
    long stride;              // of a row of scores: `last` in whole tiles
};

// Queries as weight tiles [kv heads, D / 32, 16 pairs of values, 16 heads, 2]; what lies behind the
// heads there are is never read back.
MANTA_TARGET void pack_queries(const Attention& a, const Unit& unit, uint16_t* tiles) {
    const uint16_t* q = a.q + unit.seq * a.q_stride + unit.kv_first * a.heads * a.head_dim;
    for (long kv_head = unit.kv_first; kv_head < unit.kv_last; ++kv_head) {
        for (long head = 0; head < a.heads; ++head, q += a.head_dim)
            for (long pair = 0; pair < a.head_dim / 2; ++pair)
                std::memcpy(tiles + (pair * 16 + head) * 2, q + pair * 2, 4);
        tiles += a.head_dim / 32 * kTileBytes / 2;
    }
}

// scores[head, key - start] = q . k
MANTA_TARGET void multiply_keys(const Attention& a, const Unit& unit, const uint16_t* queries,
                                float* products, float* scores) {
    const __m512i column = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set1_epi32(16));
    const long query_tiles = a.head_dim / 32 * kTileBytes / 2;
    for (long tile = 0; tile < unit.last; tile += kKeys) {
        for (long kv_head = unit.kv_first; kv_head < unit.kv_last; ++kv_head) {
            const long at = kv_head - unit.kv_first;
            const uint16_t* keys = a.keys(unit.seq, kv_head, unit.start + tile);
            _tile_zero(0);
            for (long step = 0; step < a.head_dim / 32; ++step) {
                _tile_loadd(4, keys + step * 32, a.head_dim * 2);
                _tile_loadd(6, queries + at * query_tiles + step * 512, 64);
                _tile_dpbf16ps(0, 4, 6);
            }
            float* product = products + at % 2 * 256;
            _tile_stored(0, product, 64);
            for (long head = 0; head < a.heads; ++head)
                _mm512_storeu_ps(scores + (at * a.heads + head) * unit.stride + tile,
                                 _mm512_i32gather_ps(column, product + head, 4));
        }
    }
}

// In place: e^(scale * (score - the largest)), 0 outside [first, last); -> their sum.
MANTA_TARGET float soften(float* scores, long first, long last, long padded, float scale) {
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 most = lowest, sum = _mm512_setzero_ps();
    for (long key = 0; key < padded; key += kKeys) {
        __m512i position = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(key)));
        __mmask16 seen =
            _mm512_cmpge_epi32_mask(position, _mm512_set1_epi32(static_cast<int>(first))) &
            _mm512_cmplt_epi32_mask(position, _mm512_set1_epi32(static_cast<int>(last)));
        __m512 score = _mm512_mask_loadu_ps(lowest, seen, scores + key);
        _mm512_storeu_ps(scores + key, score);
        most = _mm512_max_ps(most, score);
    }
    const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(most)), by = _mm512_set1_ps(scale);
    for (long key = 0; key < padded; key += kKeys) {
        __m512 share = exp512(
            _mm512_mul_ps(by, _mm512_sub_ps(_mm512_loadu_ps(scores + key), peak)));
        _mm512_storeu_ps(scores + key, share);
        sum = _mm512_add_ps(sum, share);
    }
    return _mm512_reduce_add_ps(sum);
}

// sums[head, D] += shares[head, key] * v[key]
template <int kChunks>
MANTA_TARGET void add_values(const Attention& a, const Unit& unit, const float* shares,
                             float* wide, float* sums) {
    for (long tile = unit.first / kKeys * kKeys; tile < unit.last; tile += kKeys) {
        const long from = std::max(unit.first - tile, 0L), to = std::min(unit.last - tile, kKeys);
        for (long kv_head = unit.kv_first; kv_head < unit.kv_last; ++kv_head) {
            const uint16_t* values = a.values(unit.seq, kv_head, unit.start + tile);
            for (long at = from * kChunks; at < to * kChunks; ++at)
                _mm512_store_ps(wide + at * 16, widen(values + at * 16));
            for (long head = 0; head < a.heads; ++head) {
                const long row = (kv_head - unit.kv_first) * a.heads + head;
                const float* share = shares + row * unit.stride + tile;
                float* sum = sums + row * kChunks * 16;
                __m512 total[kChunks];
                for (int chunk = 0; chunk < kChunks; ++chunk)
                    total[chunk] = _mm512_load_ps(sum + chunk * 16);
                for (long key = from; key < to; ++key)
                    for (int chunk = 0; chunk < kChunks; ++chunk)
                        total[chunk] = _mm512_fmadd_ps(
                            _mm512_set1_ps(share[key]),
                            _mm512_load_ps(wide + (key * kChunks + chunk) * 16), total[chunk]);
                for (int chunk = 0; chunk < kChunks; ++chunk)
                    _mm512_store_ps(sum + chunk * 16, total[chunk]);
            }
        }
    }
}

template <int kChunks>
MANTA_TARGET void attend(const Attention& a, const Unit& unit, Scratch& scratch) {
    const long dim = a.head_dim, rows = (unit.kv_last - unit.kv_first) * a.heads;
    const long query_floats = (unit.kv_last - unit.kv_first) * dim / 32 * kTileBytes / 4;
    float* scores = reinterpret_cast<float*>(scratch.take(
        (rows * unit.stride + 2 * 256 + query_floats + (kKeys + rows) * dim + rows) * 4));
    float* products = scores + rows * unit.stride;
    float* queries = products + 2 * 256;
    float* wide = queries + query_floats;
    float* sums = wide + kKeys * dim;
    float* totals = sums + rows * dim;
    pack_queries(a, unit, reinterpret_cast<uint16_t*>(queries));
    multiply_keys(a, unit, reinterpret_cast<uint16_t*>(queries), products, scores);
    for (long row = 0; row < rows; ++row)
        totals[row] = soften(scores + row * unit.stride, unit.first, unit.last, unit.stride,
                             a.scale);
    std::memset(sums, 0, rows * dim * sizeof(float));
    add_values<kChunks>(a, unit, scores, wide, sums);
    uint16_t* out = a.out + (unit.seq * a.num_kv_heads + unit.kv_first) * a.heads * dim;
    for (long at = 0; at < rows * dim; at += 16)
        round_to(out + at, _mm512_div_ps(_mm512_load_ps(sums + at),
                                         _mm512_set1_ps(totals[at / dim])));
}

using Attend = void (*)(const Attention&, const Unit&, Scratch&);

Attend attend_for(long head_dim) {
    switch (head_dim) {
        case 32: return attend<2>;
        case 64: return attend<4>;
        case 96: return attend<6>;
        case 128: return attend<8>;
        case 256: return attend<16>;
        default: return nullptr;
    }
}

// Part `part` of `parts` of a sequence's heads.
Unit make_unit(const Attention& a, long seq, long part, long parts) {
    const long first_key = a.first_key(seq), start = first_key / kKeys * kKeys;
    const long last = a.context_lens[seq] - start;
    return {seq,
            a.num_kv_heads * part / parts,
            a.num_kv_heads * (part + 1) / parts,
            start,
            first_key - start,
            last,
            (last + kKeys - 1) / kKeys * kKeys};
}

MANTA_TARGET void attend_all(const Attention& a, Attend attend_one, int threads) {
    long keys = 0;
    for (long seq = 0; seq < a.num_seqs; ++seq)
        keys += (a.context_lens[seq] - a.first_key(seq)) * a.num_kv_heads;
    if (keys < kSerialKeys) threads = 1;
    // Whole sequences if there are some for every thread.
    const long parts = std::min(a.num_kv_heads, (2 * threads - 1) / a.num_seqs + 1);
#pragma omp parallel num_threads(threads)
    {
        static thread_local Scratch scratch;
        TileConfig config = tile_config(kTileRows, 64);
        _tile_loadconfig(&config);
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < a.num_seqs * parts; ++unit)
            attend_one(a, make_unit(a, unit / parts, unit % parts, parts), scratch);
        _tile_release();
    }
}

}  // namespace
}  // namespace manta

// window 0: every key is seen.
extern "C" void manta_decode_attention(const uint16_t* q, const uint16_t* cache,
                                       const int32_t* block_tables, const int32_t* context_lens,
                                       uint16_t* out, long num_seqs, long num_kv_heads, long heads,
                                       long head_dim, long block_size, long q_stride,
                                       long table_stride, long window, float scale, int threads) {
    using namespace manta;
    Attention attention{q,        cache,        block_tables, context_lens, out,
                        num_seqs, num_kv_heads, heads,        head_dim,     block_size,
                        q_stride, table_stride, window,       scale};
    attend_all(attention, attend_for(head_dim), threads);
}
