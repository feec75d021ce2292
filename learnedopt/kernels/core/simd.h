// Vectors of the machine's width, and the nonlinearities of an LSTM on them.
//
// Everything is written with the vector extensions of GCC and Clang; only what these cannot express (an approximate
// reciprocal, scaling by a power of two) falls back on intrinsics, with a plain version for other machines.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace learnedopt {

#define ALWAYS_INLINE [[gnu::always_inline]] inline

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

using Ints = Simd<float>::IntVec;

template <class To, class From>
ALWAYS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A row of a tile. Its vectors go through every operation side by side: the steps of a nonlinearity wait for each
// other, and the processor finds independent work only close by.
template <class S>
struct Row {
  Vec<S> v[COLS];
};

#define FOR_COLUMNS _Pragma("GCC unroll 8") for (int j = 0; j < COLS; ++j)

template <class S>
ALWAYS_INLINE Row<S> load_row(const S* p) {
  Row<S> row;
  FOR_COLUMNS row.v[j] = load(p + j * WIDTH<S>);
  return row;
}

template <class S>
ALWAYS_INLINE void store_row(S* p, const Row<S>& row) {
  FOR_COLUMNS store(p + j * WIDTH<S>, row.v[j]);
}

template <class S>
ALWAYS_INLINE Row<S> broadcast_row(S value) {
  Row<S> row;
  FOR_COLUMNS row.v[j] = broadcast(value);
  return row;
}

// f of each vector.
template <class S, class F>
ALWAYS_INLINE Row<S> map(const Row<S>& a, F&& f) {
  Row<S> row;
  FOR_COLUMNS row.v[j] = f(a.v[j]);
  return row;
}

#define ROW_OPERATOR(op)                                               \
  template <class S>                                                   \
  ALWAYS_INLINE Row<S> operator op(const Row<S>& a, const Row<S>& b) { \
    Row<S> row;                                                        \
    FOR_COLUMNS row.v[j] = a.v[j] op b.v[j];                           \
    return row;                                                        \
  }                                                                    \
  template <class S>                                                   \
  ALWAYS_INLINE Row<S> operator op(S a, const Row<S>& b) {             \
    return map(b, [a](Vec<S> v) { return a op v; });                   \
  }                                                                    \
  template <class S>                                                   \
  ALWAYS_INLINE Row<S> operator op(const Row<S>& a, S b) {             \
    return map(a, [b](Vec<S> v) { return v op b; });                   \
  }
ROW_OPERATOR(+)
ROW_OPERATOR(-)
ROW_OPERATOR(*)
ROW_OPERATOR(/)
#undef ROW_OPERATOR

template <class S>
ALWAYS_INLINE Row<S> operator-(const Row<S>& a) {
  return map(a, [](Vec<S> v) { return -v; });
}

template <class S>
ALWAYS_INLINE Row<S> absolute(const Row<S>& a) {
  return map(a, [](Vec<S> v) { return v < S(0) ? -v : v; });
}

// a within [low, high]; NaN stays NaN.
ALWAYS_INLINE Row<float> clamp(const Row<float>& a, float low, float high) {
  const Vec<float> bottom = broadcast(low), top = broadcast(high);
  return map(a, [=](Vec<float> v) {
    v = v < bottom ? bottom : v;
    return v > top ? top : v;
  });
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
ALWAYS_INLINE Row<float> exp2_capped(Row<float> t, float limit) {
  using V = Vec<float>;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  // Of two operands min returns the second where one is NaN.
  t = map(t, [=](V v) { return V(_mm512_min_ps(__m512(broadcast(limit)), __m512(v))); });
  const Row<float> r = map(t, [](V v) { return V(_mm512_reduce_ps(__m512(v), 0x09)); });  // t - floor(t)
#else
  t = clamp(t, -126.0f, limit);
  // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
  const Row<float> shifted = (t - 0.5f) + 12582912.0f, r = t - (shifted - 12582912.0f);
#endif
  // 2^r on [0, 1], minimax among the polynomials that are exact at both ends.
  Row<float> p = r * 0.001879319f + 0.008990994f;
  p = p * r + 0.055818677f;
  p = p * r + 0.24015927f;
  p = p * r + 0.6931517f;
  p = p * r + 1.0f;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  FOR_COLUMNS p.v[j] = V(_mm512_scalef_ps(__m512(p.v[j]), __m512(t.v[j])));
#else
  FOR_COLUMNS p.v[j] = bit_cast<V>(bit_cast<Ints>(p.v[j]) + (bit_cast<Ints>(shifted.v[j]) << 23));
#endif
  return p;
}

// 1 / a for 1 <= a <= 2^126 or NaN.
ALWAYS_INLINE Row<float> reciprocal(const Row<float>& a) {
#if defined(__AVX512F__)
  const Row<float> y = map(a, [](Vec<float> v) { return Vec<float>(_mm512_rcp14_ps(__m512(v))); });
  return y + y * (1.0f - a * y);
#elif defined(__AVX2__)
  const Row<float> y = map(a, [](Vec<float> v) { return Vec<float>(_mm256_rcp_ps(__m256(v))); });
  return y + y * (1.0f - a * y);
#else
  return 1.0f / a;
#endif
}

// log |x| for normal and infinite x, NaN for NaN. Relative error below 2e-7.
ALWAYS_INLINE Row<float> log_absolute(const Row<float>& x) {
  return map(x, [](Vec<float> v) {
    const Ints bits = bit_cast<Ints>(v) & 0x7fffffff;
    const Ints exponent = (bits - 0x3f3504f3) >> 23;  // of |x| over a number between the roots of a half and of two
    const Vec<float> m = bit_cast<Vec<float>>(bits - (exponent << 23)), magnitude = bit_cast<Vec<float>>(bits);
    const Vec<float> s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
    const Vec<float> series = ((s2 * (1 / 9.0f) + 1 / 7.0f) * s2 + 1 / 5.0f) * s2 + 1 / 3.0f;
    const Vec<float> log_m = 2.0f * s + 2.0f * s * s2 * series;  // 2 artanh(s)
    const Vec<float> log = __builtin_convertvector(exponent, Vec<float>) * 0.693147181f + log_m;
    return magnitude < HUGE_VALF ? log : magnitude;
  });
}

ALWAYS_INLINE Row<float> square_root(const Row<float>& x) {
  return map(x, [](Vec<float> v) {
#if defined(__AVX512F__)
    return Vec<float>(_mm512_sqrt_ps(__m512(v)));
#elif defined(__AVX2__)
    return Vec<float>(_mm256_sqrt_ps(__m256(v)));
#else
    for (int lane = 0; lane < WIDTH<float>; ++lane) v[lane] = std::sqrt(v[lane]);
    return v;
#endif
  });
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
ALWAYS_INLINE void activate(const Row<float>& i, const Row<float>& f, const Row<float>& g, const Row<float>& o,
                            const Row<float>& c, Row<float>& cell, Row<float>& hidden) {
  const Row<float> G = exp2_capped(g, 60.0f);
  const Row<float> gated = (1.0f - G) * reciprocal((1.0f + exp2_capped(i, 60.0f)) * (1.0f + G));
  cell = c * reciprocal(1.0f + exp2_capped(f, 120.0f)) + gated;
  const Row<float> C = exp2_capped(cell * TANH_SCALE<float>, 60.0f);
  hidden = (1.0f - C) * reciprocal((1.0f + exp2_capped(o, 60.0f)) * (1.0f + C));
}

// A nonlinearity's value and its derivative.
template <class S>
struct Dual {
  Row<S> value, slope;
};

// The slopes come from the exponential, not from the value: they vanish where the nonlinearity saturates, so that what
// they multiply may be huge.
ALWAYS_INLINE Dual<float> sigmoid(const Row<float>& scaled) {
  const Row<float> E = exp2_capped(scaled, 125.0f), r = reciprocal(1.0f + E);
  return {r, E * r * r};
}

ALWAYS_INLINE Dual<float> tanh(const Row<float>& scaled) {
  const Row<float> E = exp2_capped(scaled, 125.0f), r = reciprocal(1.0f + E);
  return {(1.0f - E) * r, 4.0f * (E * r * r)};
}

inline Dual<double> sigmoid(const Row<double>& x) {
  const Row<double> y = map(x, [](Vec<double> v) {
    for (int lane = 0; lane < WIDTH<double>; ++lane) v[lane] = 1.0 / (1.0 + std::exp(-v[lane]));
    return v;
  });
  return {y, y * (1.0 - y)};
}

inline Dual<double> tanh(const Row<double>& x) {
  const Row<double> y = map(x, [](Vec<double> v) {
    for (int lane = 0; lane < WIDTH<double>; ++lane) v[lane] = std::tanh(v[lane]);
    return v;
  });
  return {y, 1.0 - y * y};
}

inline void activate(const Row<double>& i, const Row<double>& f, const Row<double>& g, const Row<double>& o,
                     const Row<double>& c, Row<double>& cell, Row<double>& hidden) {
  cell = sigmoid(f).value * c + sigmoid(i).value * tanh(g).value;
  hidden = sigmoid(o).value * tanh(cell).value;
}

}  // namespace learnedopt
