// Attention of decode rows, one query each, over the paged KV cache in bf16.
//
// A unit of work is one sequence and one key head: its keys' tiles are multiplied straight from
// the cache by the queries of the heads that share them, [16 keys, D] x [D, heads]; softmax over
// the whole context in float32; the values are added in float32. Nothing is gathered or copied.
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

// Queries as weight tiles [D / 32, 16 pairs of values, 16 heads, 2]; heads beyond are left as they
// are, their products are never read.
MANTA_TARGET void pack_queries(const Attention& a, const uint16_t* q, uint16_t* tiles) {
    for (long head = 0; head < a.heads; ++head)
        for (long pair = 0; pair < a.head_dim / 2; ++pair)
            std::memcpy(tiles + (pair * 16 + head) * 2, q + head * a.head_dim + pair * 2, 4);
}

// scores[head, key - start] = q . k for the tiles from `start` on.
MANTA_TARGET void multiply_keys(const Attention& a, long seq, long kv_head, long start, long stop,
                                const uint16_t* queries, float* products, float* scores,
                                long stride) {
    const __m512i column = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
        _mm512_set1_epi32(16));
    for (long key = start; key < stop; key += kKeys) {
        const uint16_t* keys = a.keys(seq, kv_head, key);
        _tile_zero(0);
        for (long step = 0; step < a.head_dim / 32; ++step) {
            _tile_loadd(4, keys + step * 32, a.head_dim * 2);
            _tile_loadd(6, queries + step * 512, 64);
            _tile_dpbf16ps(0, 4, 6);
        }
        float* product = products + (key - start) / kKeys % 2 * 256;
        _tile_stored(0, product, 64);
        for (long head = 0; head < a.heads; ++head)
            _mm512_storeu_ps(scores + head * stride + key - start,
                             _mm512_i32gather_ps(column, product + head, 4));
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

// sums[head, D] += shares[head, key] * v[key] for keys [start + first, start + last).
template <int kChunks>
MANTA_TARGET void add_values(const Attention& a, long seq, long kv_head, long start, long first,
                             long last, const float* shares, long stride, float* wide,
                             float* sums) {
    for (long tile = 0; tile < last; tile += kKeys) {
        const uint16_t* values = a.values(seq, kv_head, start + tile);
        const long from = std::max(first - tile, 0L), to = std::min(last - tile, kKeys);
        for (long at = from * kChunks; at < to * kChunks; ++at)
            _mm512_store_ps(wide + at * 16, widen(values + at * 16));
        for (long head = 0; head < a.heads; ++head) {
            float* sum = sums + head * kChunks * 16;
            __m512 total[kChunks];
            for (int chunk = 0; chunk < kChunks; ++chunk)
                total[chunk] = _mm512_load_ps(sum + chunk * 16);
            for (long key = from; key < to; ++key) {
                __m512 share = _mm512_set1_ps(shares[head * stride + tile + key]);
                for (int chunk = 0; chunk < kChunks; ++chunk)
                    total[chunk] = _mm512_fmadd_ps(
                        share, _mm512_load_ps(wide + (key * kChunks + chunk) * 16), total[chunk]);
            }
            for (int chunk = 0; chunk < kChunks; ++chunk)
                _mm512_store_ps(sum + chunk * 16, total[chunk]);
        }
    }
}

template <int kChunks>
MANTA_TARGET void attend(const Attention& a, long seq, long kv_head, Scratch& scratch) {
    const long dim = a.head_dim, first_key = a.first_key(seq), start = first_key / kKeys * kKeys;
    const long first = first_key - start, last = a.context_lens[seq] - start;
    const long stride = (last + kKeys - 1) / kKeys * kKeys;
    float* scores = reinterpret_cast<float*>(
        scratch.take((a.heads * stride + 2 * 256 + 16 * dim + (a.heads + kKeys) * dim) * 4));
    float* products = scores + a.heads * stride;
    uint16_t* queries = reinterpret_cast<uint16_t*>(products + 2 * 256);
    float* wide = products + 2 * 256 + 16 * dim;
    float* sums = wide + kKeys * dim;
    pack_queries(a, a.q + seq * a.q_stride + kv_head * a.heads * dim, queries);
    multiply_keys(a, seq, kv_head, start, start + last, queries, products, scores, stride);
    float totals[kTileRows];
    for (long head = 0; head < a.heads; ++head)
        totals[head] = soften(scores + head * stride, first, last, stride, a.scale);
    std::memset(sums, 0, a.heads * dim * sizeof(float));
    add_values<kChunks>(a, seq, kv_head, start, first, last, scores, stride, wide, sums);
    uint16_t* out = a.out + (seq * a.num_kv_heads + kv_head) * a.heads * dim;
    for (long at = 0; at < a.heads * dim; at += 16)
        round_to(out + at, _mm512_div_ps(_mm512_load_ps(sums + at),
                                         _mm512_set1_ps(totals[at / dim])));
}

using Attend = void (*)(const Attention&, long, long, Scratch&);

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

MANTA_TARGET void attend_all(const Attention& a, Attend attend_one, int threads) {
    long keys = 0;
    for (long seq = 0; seq < a.num_seqs; ++seq)
        keys += (a.context_lens[seq] - a.first_key(seq)) * a.num_kv_heads;
#pragma omp parallel num_threads(keys < kSerialKeys ? 1 : threads)
    {
        static thread_local Scratch scratch;
        TileConfig config = tile_config(kTileRows, 64);
        _tile_loadconfig(&config);
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < a.num_seqs * a.num_kv_heads; ++unit)
            attend_one(a, unit / a.num_kv_heads, unit % a.num_kv_heads, scratch);
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
