// State in bfloat16, and in eight or ten bits.
#pragma once

#include "layout.h"

namespace learnedopt {

// As many elements as a vector has lanes, whatever their size.
template <class E>
struct Lanes {
  typedef E Vec __attribute__((vector_size(WIDTH<float> * sizeof(E)), aligned(alignof(E)), may_alias));
};

inline Vec<float> load_bf16(const uint16_t* p) {
  const auto narrow = *reinterpret_cast<const Lanes<uint16_t>::Vec*>(p);
  return bit_cast<Vec<float>>(__builtin_convertvector(narrow, Ints) << 16);
}

// Rounds to nearest, half to even, in the upper half of each lane.
inline Ints round_to_bf16(Vec<float> x) {
  const Ints bits = bit_cast<Ints>(x);
  const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (x == x ? rounded : Ints{} + 0x7fc00000) & ~0xffff;
}

inline void store_bf16(uint16_t* p, Ints rounded) {
  *reinterpret_cast<Lanes<uint16_t>::Vec*>(p) = __builtin_convertvector(rounded >> 16, Lanes<uint16_t>::Vec);
}

// Bytes, with a sign or without; GCC takes the general conversions apart, lane by lane.
template <class E>
inline Ints load_bytes(const E* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return Ints(std::is_signed_v<E> ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#else
  return __builtin_convertvector(*reinterpret_cast<const typename Lanes<E>::Vec*>(p), Ints);
#endif
}

// Of each number its lowest eight bits.
template <class E>
inline void store_bytes(E* p, Ints numbers) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(numbers)));
#else
  *reinterpret_cast<typename Lanes<E>::Vec*>(p) = __builtin_convertvector(numbers, typename Lanes<E>::Vec);
#endif
}

// How many bytes the lower bits of a vector of ten-bit codes take: those of four units share one.
constexpr int low_bytes(int units) { return (units + 3) / 4; }

// The square root of numbers that are not negative, within a few units in the last place; faster than the exact one.
inline Vec<float> fast_square_root(Vec<float> x) {
#if defined(__AVX512F__)
  x = Vec<float>(_mm512_max_ps(__m512(x), __m512(broadcast(1e-30f))));
  const Vec<float> y = Vec<float>(_mm512_rsqrt14_ps(__m512(x))), root = x * y;
  return root + root * (0.5f - 0.5f * root * y);
#else
  for (int lane = 0; lane < WIDTH<float>; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
#endif
}

// Vectors of units in eight or ten bits. The vectors of one lane each: a code per unit, its lower bits elsewhere if it
// has ten, and one scale.
class Codes {
 public:
  Codes(int hidden, bool fine) : hidden_(hidden), fine_(fine), most_(fine ? 511.0f : 127.0f) {}

  void decode(Rows<int8_t> codes, Rows<uint8_t> lows, const uint16_t* scale, int at, float* tile) const {
    const Vec<float> factor = load_bf16(scale + at) / (most_ * most_);
    Ints low{};
    for (int u = 0; u < hidden_; ++u) {
      Ints code = load_bytes(codes[u] + at);
      if (fine_) {
        low = u % 4 ? low >> 2 : load_bytes(lows[u / 4] + at);
        code = code * 4 + (low & 3);
      }
      const Vec<float> x = __builtin_convertvector(code, Vec<float>);
      store(tile + u * LANES + at, x * (x < 0.0f ? -x : x) * factor);
    }
  }

  void encode(const float* tile, Rows<int8_t> codes, Rows<uint8_t> lows, uint16_t* scale, int at) const {
    tile += at;
    // As whole numbers, magnitudes are in order, and NaN is above infinity.
    Ints most{};
    for (int u = 0; u < hidden_; ++u) {
      const Ints magnitude = bit_cast<Ints>(load(tile + u * LANES)) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    const Ints kept = round_to_bf16(bit_cast<Vec<float>>(most));
    store_bf16(scale + at, kept);
    const Vec<float> wide = bit_cast<Vec<float>>(kept);
    const Ints usable = (wide > 0.0f) & (wide < HUGE_VALF);
    const Vec<float> factor = usable ? most_ * most_ / wide : Vec<float>{};
    Ints low{};
    for (int u = 0; u < hidden_; ++u) {
      const Vec<float> x = load(tile + u * LANES);
      const Ints sign = bit_cast<Ints>(x) & int(0x80000000);
      Vec<float> root = fast_square_root(bit_cast<Vec<float>>(bit_cast<Ints>(x) ^ sign) * factor);
      root = bit_cast<Vec<float>>(bit_cast<Ints>(root < most_ ? root : broadcast(most_)) | sign);
      // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
      const Ints code = bit_cast<Ints>(root + 12582912.0f) & usable;
      store_bytes(codes[u] + at, fine_ ? code >> 2 : code);
      if (fine_) {
        low = (u % 4 ? low : Ints{}) | (code & 3) << 2 * (u % 4);
        if (u % 4 == 3 || u == hidden_ - 1) store_bytes(lows[u / 4] + at, low);
      }
    }
  }

 private:
  int hidden_;
  bool fine_;
  float most_;  // codes go from minus to plus this
};

}  // namespace learnedopt
