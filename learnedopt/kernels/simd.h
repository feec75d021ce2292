// Vectors of the machine's width, and the nonlinearities of an LSTM on them.
//
// Everything is written with the vector extensions of GCC and Clang; only what these cannot express (an approximate
// reciprocal, scaling by a power of two) falls back on intrinsics, with a plain version for other machines.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace learnedopt {

// A micro-tile is UNITS units with their four gates times COLS vectors of coordinates: as many accumulators as leave
// room among the registers for a column of inputs and one weight.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, UNITS = 2, COLS = 3;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, UNITS = 1, COLS = 3;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, UNITS = 2, COLS = 3;
#else
constexpr int VECTOR_BYTES = 16, UNITS = 1, COLS = 3;
#endif
constexpr int ROWS = 4 * UNITS;

template <class S>
struct Simd {
  static constexpr int width = VECTOR_BYTES / sizeof(S);
  using Int = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  typedef S Vec __attribute__((vector_size(VECTOR_BYTES)));
  typedef Int IntVec __attribute__((vector_size(VECTOR_BYTES)));
  typedef S Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(S)), may_alias));
};

template <class S>
using Vec = typename Simd<S>::Vec;

template <class S>
constexpr int WIDTH = Simd<S>::width;

// Coordinates per tile: a row of a tile is COLS vectors.
template <class S>
constexpr int TILE = COLS * WIDTH<S>;

template <class S>
inline Vec<S> load(const S* p) {
  return *reinterpret_cast<const typename Simd<S>::Unaligned*>(p);
}

template <class S>
inline void store(S* p, Vec<S> v) {
  *reinterpret_cast<typename Simd<S>::Unaligned*>(p) = v;
}

template <class S>
inline Vec<S> broadcast(S value) {
  return value - Vec<S>{};
}

// Takes from two vectors by turns, from their lower or their upper halves.
template <class S>
inline Vec<S> interleave(Vec<S> a, Vec<S> b, bool upper) {
  typename Simd<S>::IntVec from;
  for (int lane = 0; lane < WIDTH<S>; ++lane) from[lane] = lane / 2 + lane % 2 * WIDTH<S> + upper * WIDTH<S> / 2;
#if defined(__clang__)
  Vec<S> result;
  for (int lane = 0; lane < WIDTH<S>; ++lane) result[lane] = lane % 2 ? b[from[lane] - WIDTH<S>] : a[from[lane]];
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Transposes a square of numbers.
template <class S>
inline void transpose(Vec<S> (&square)[WIDTH<S>]) {
  constexpr int half = WIDTH<S> / 2;
  for (int stage = 1; stage < WIDTH<S>; stage *= 2) {
    Vec<S> next[WIDTH<S>];
    for (int i = 0; i < half; ++i) {
      next[2 * i] = interleave<S>(square[i], square[i + half], false);
      next[2 * i + 1] = interleave<S>(square[i], square[i + half], true);
    }
    for (int i = 0; i < WIDTH<S>; ++i) square[i] = next[i];
  }
}

// 2^t for t <= limit, and 2^limit beyond; NaN stays NaN. Relative error below 2e-7; 2^n is exact.
inline Vec<float> exp2_capped(Vec<float> t, float limit) {
  using V = Vec<float>;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  t = V(_mm512_min_ps(__m512(broadcast(limit)), __m512(t)));  // of two operands it returns the second where one is NaN
  V r = V(_mm512_reduce_ps(__m512(t), 0x09));                 // t - floor(t)
#else
  const V top = broadcast(limit), bottom = broadcast(-126.0f);
  t = t > top ? top : t;
  t = t < bottom ? bottom : t;
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  V shifted = (t - 0.5f) + 12582912.0f;
  V r = t - (shifted - 12582912.0f);
#endif
  // 2^r on [0, 1], minimax among the polynomials that are exact at both ends.
  V p = 0.001879319f * r + 0.008990994f;
  p = p * r + 0.055818677f;
  p = p * r + 0.24015927f;
  p = p * r + 0.6931517f;
  p = p * r + 1.0f;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return V(_mm512_scalef_ps(__m512(p), __m512(t)));
#else
  typename Simd<float>::IntVec bits, exponent;
  std::memcpy(&bits, &p, sizeof p);
  std::memcpy(&exponent, &shifted, sizeof p);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
#endif
}

// 1 / a for 1 <= a <= 2^125 or NaN.
inline Vec<float> reciprocal(Vec<float> a) {
  using V = Vec<float>;
#if defined(__AVX512F__)
  V y = V(_mm512_rcp14_ps(__m512(a)));
  return y + y * (1.0f - a * y);
#elif defined(__AVX2__)
  V y = V(_mm256_rcp_ps(__m256(a)));
  return y + y * (1.0f - a * y);
#else
  return 1.0f / a;
#endif
}

// The nonlinearities take pre-activations multiplied by these, so that they begin with a bare power of two. The
// factors are packed into the weights.
template <class S>
constexpr S SIGMOID_SCALE = 1;
template <class S>
constexpr S TANH_SCALE = 1;
template <>
constexpr float SIGMOID_SCALE<float> = -1.44269504f;
template <>
constexpr float TANH_SCALE<float> = -2.88539008f;

// With E = e^-i, G = e^-2g: sigmoid(i) tanh(g) = (1 - G) / ((1 + E)(1 + G)) takes one reciprocal. The caps keep the
// product finite: beyond them the sigmoid is below 1e-18.
inline void activate(Vec<float> i, Vec<float> f, Vec<float> g, Vec<float> o, Vec<float> c, Vec<float>& cell,
                     Vec<float>& hidden) {
  Vec<float> G = exp2_capped(g, 60.0f);
  Vec<float> gated = (1.0f - G) * reciprocal((1.0f + exp2_capped(i, 60.0f)) * (1.0f + G));
  cell = c * reciprocal(1.0f + exp2_capped(f, 120.0f)) + gated;
  Vec<float> C = exp2_capped(cell * TANH_SCALE<float>, 60.0f);
  hidden = (1.0f - C) * reciprocal((1.0f + exp2_capped(o, 60.0f)) * (1.0f + C));
}

// log |x| for normal and infinite x, NaN for NaN. Relative error below 2e-7.
inline Vec<float> log_abs(Vec<float> x) {
  using V = Vec<float>;
  using I = Simd<float>::IntVec;
  I bits;
  std::memcpy(&bits, &x, sizeof x);
  bits &= 0x7fffffff;
  const I exponent = (bits - 0x3f3504f3) >> 23;  // of x over a number between the roots of a half and of two
  const I mantissa = bits - (exponent << 23);
  V m, magnitude;
  std::memcpy(&m, &mantissa, sizeof m);
  std::memcpy(&magnitude, &bits, sizeof bits);
  const V s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  const V series = ((s2 * (1 / 9.0f) + 1 / 7.0f) * s2 + 1 / 5.0f) * s2 + 1 / 3.0f;  // of 2 artanh(s) = log m
  const V result = __builtin_convertvector(exponent, V) * 0.693147181f + (2.0f * s + 2.0f * s * s2 * series);
  return magnitude < HUGE_VALF ? result : magnitude;
}

inline Vec<float> square_root(Vec<float> x) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_sqrt_ps(__m512(x)));
#elif defined(__AVX2__)
  return Vec<float>(_mm256_sqrt_ps(__m256(x)));
#else
  for (int lane = 0; lane < WIDTH<float>; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
#endif
}

// The square root of a number that is not negative, within a few units in the last place; faster than the exact one.
inline Vec<float> fast_square_root(Vec<float> x) {
#if defined(__AVX512F__)
  using V = Vec<float>;
  x = V(_mm512_max_ps(__m512(x), __m512(broadcast(1e-30f))));
  const V y = V(_mm512_rsqrt14_ps(__m512(x))), root = x * y;
  return root + root * (0.5f - 0.5f * root * y);
#else
  return square_root(x);
#endif
}

// x within [low, high]; NaN stays NaN.
inline Vec<float> clamp(Vec<float> x, float low, float high) {
  const Vec<float> bottom = broadcast(low), top = broadcast(high);
  x = x < bottom ? bottom : x;
  return x > top ? top : x;
}

// A nonlinearity's value and its derivative.
template <class S>
struct Dual {
  Vec<S> value, slope;
};

// The slopes come from the exponential, not from the value: they vanish where the nonlinearity saturates, so that what
// they multiply may be huge.
inline Dual<float> sigmoid(Vec<float> scaled) {
  const Vec<float> E = exp2_capped(scaled, 125.0f), r = reciprocal(1.0f + E);
  return {r, E * r * r};
}

inline Dual<float> tanh(Vec<float> scaled) {
  const Vec<float> E = exp2_capped(scaled, 125.0f), r = reciprocal(1.0f + E);
  return {(1.0f - E) * r, 4.0f * (E * r * r)};
}

inline Dual<double> sigmoid(Vec<double> x) {
  Dual<double> y;
  for (int lane = 0; lane < WIDTH<double>; ++lane) {
    y.value[lane] = 1.0 / (1.0 + std::exp(-x[lane]));
    y.slope[lane] = y.value[lane] * (1.0 - y.value[lane]);
  }
  return y;
}

inline Dual<double> tanh(Vec<double> x) {
  Dual<double> y;
  for (int lane = 0; lane < WIDTH<double>; ++lane) {
    y.value[lane] = std::tanh(x[lane]);
    y.slope[lane] = 1.0 - y.value[lane] * y.value[lane];
  }
  return y;
}

inline void activate(Vec<double> i, Vec<double> f, Vec<double> g, Vec<double> o, Vec<double> c, Vec<double>& cell,
                     Vec<double>& hidden) {
  cell = sigmoid(f).value * c + sigmoid(i).value * tanh(g).value;
  hidden = sigmoid(o).value * tanh(cell).value;
}

}  // namespace learnedopt
