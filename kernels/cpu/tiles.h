// AMX tiles: the shapes this project multiplies with, and leave to use them.
//
// Tiles 0-3 accumulate (two row blocks times two output panels), 4-5 hold rows, 6-7 hold weights.
// A kernel is compiled for its instruction set whatever the compiler's target, and called only
// after `_has_instructions` in __init__.py said yes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#define MANTA_TARGET                                                                             \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,"    \
                          "amx-bf16,amx-int8")))

namespace manta {

constexpr long kTileRows = 16;    // rows of an accumulator, outputs of a panel
constexpr long kTileBytes = 1024;  // 16 rows of 64 bytes

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// `rows` rows of x and `depth` bytes of K per multiplication; 4 bytes of depth per weight row.
inline TileConfig tile_config(long rows, long depth) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        bool weights = tile >= 6, inputs = tile == 4 || tile == 5;
        config.rows[tile] = static_cast<uint8_t>(weights ? depth / 4 : rows);
        config.row_bytes[tile] = static_cast<uint16_t>(inputs ? depth : 64);
    }
    return config;
}

MANTA_TARGET inline __m512 widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

MANTA_TARGET inline __m512 widen(const uint16_t* bf16) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16)));
}

MANTA_TARGET inline void round_to(uint16_t* bf16, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bf16),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
}

// e^x for x <= 0, -inf included, to 2 units in the last place.
MANTA_TARGET inline __m512 exp512(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // e^-104 rounds to 0; a NaN of x stays
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 y = _mm512_set1_ps(1.0f / 720);
    for (float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(term));
    return _mm512_scalef_ps(y, n);
}

// Memory of one thread that grows to the largest call and is kept for the next.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    char* take(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 4095) / 4096 * 4096;
            data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
            if (data_ == nullptr) std::abort();
        }
        return data_;
    }

  private:
    char* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace manta
