// Vectors as wide as the machine that this file is compiled for, in GCC's vector extensions; one source serves
// AVX-512, AVX2 and everything else. Sums keep one order whatever rows or columns stand beside each other.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE_ROWS = 12;  // rows of a 32-column tile: 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int TILE_ROWS = 3;  // 12 of 16 registers accumulate
#else
constexpr int LANES = 4;
constexpr int TILE_ROWS = 1;
#endif

typedef float VecF __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t VecI __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline VecF load(const float* p) { return *(const VecF*)p; }
static inline void store(float* p, VecF v) { *(VecF*)p = v; }
static inline VecF splat(float x) { return x - VecF{}; }
static inline VecI splat_int(int32_t x) { return x - VecI{}; }
static inline VecF larger(VecF a, VecF b) { return a > b ? a : b; }

static inline float sum_lanes(VecF v) {
  float total = 0.f;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

// e^x to 2 units in the last place; 0 below -87.
static inline VecF vec_exp(VecF x) {
  const VecF low = splat(-87.f), high = splat(88.f), magic = splat(12582912.f);  // 1.5 * 2^23 rounds
  const VecI is_tiny = x < low;
  x = is_tiny ? low : x;
  x = x > high ? high : x;
  const VecF n = (x * 1.44269504f + magic) - magic;
  VecF r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  VecF p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const VecF mantissa = p * r * r + r + 1.f;
  const VecI exponent = (__builtin_convertvector(n, VecI) + 127) << 23;
  const VecF result = mantissa * (VecF)exponent;
  return is_tiny ? VecF{} : result;
}

static inline VecF vec_silu(VecF x) { return x / (1.f + vec_exp(-x)); }

// sum + four products of unsigned x and signed w in each lane; exact.
static inline VecI dot4(VecI sum, uint32_t x, const uint8_t* w) {
#if defined(__AVX512VNNI__)
  return (VecI)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32((int)x), _mm512_loadu_si512(w));
#elif defined(__AVX2__)
  // Not maddubs: it saturates. Sixteen-bit products of widened bytes do not.
  const __m128i quad = _mm_set1_epi32((int)x);
  const __m256i wide_x = _mm256_cvtepu8_epi16(quad);
  const __m256i low = _mm256_madd_epi16(wide_x, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w)));
  const __m256i high = _mm256_madd_epi16(wide_x, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16))));
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
  return sum + (VecI)pairs;
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < 4; j++) sum[i] += (int32_t)((x >> (8 * j)) & 255) * (int8_t)w[4 * i + j];
  return sum;
#endif
}
