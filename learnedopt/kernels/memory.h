// What a step reads and writes: coordinates of many tensors side by side, a tile at a time, and state in float32, in
// bfloat16 or in eight bits.
#pragma once

#include "lstm.h"

namespace learnedopt {

constexpr int LANES = TILE<float>;

// Neighbouring coordinates of one tensor, and where they are in a tile.
struct Piece {
  int tensor;
  int64_t at;
  int count, lane;
};

using Pieces = std::vector<Piece>;

// Which coordinates of which tensors are in each tile.
class Layout {
 public:
  explicit Layout(const std::vector<int64_t>& sizes) : stops_(sizes) {
    for (size_t i = 1; i < stops_.size(); ++i) stops_[i] += stops_[i - 1];
  }
  int64_t total() const { return stops_.empty() ? 0 : stops_.back(); }

  // The pieces of the tile that begins at a coordinate, of all tensors side by side.
  void pieces(int64_t first, Pieces& out) const {
    out.clear();
    size_t tensor = std::upper_bound(stops_.begin(), stops_.end(), first) - stops_.begin();
    for (int lane = 0; lane < LANES && tensor < stops_.size(); ++tensor) {
      const int64_t start = tensor ? stops_[tensor - 1] : 0;
      const int count = std::min<int64_t>(LANES - lane, stops_[tensor] - first);
      if (count > 0) out.push_back({int(tensor), first - start, count, lane});
      lane += count;
      first += count;
    }
  }

 private:
  std::vector<int64_t> stops_;
};

// One number per coordinate, in place: E is its type in memory.
template <class E>
inline void read_row(const std::vector<E*>& from, const Pieces& pieces, float* row) {
  for (const Piece& piece : pieces) {
    const E* p = from[piece.tensor] + piece.at;
    for (int i = 0; i < piece.count; ++i) row[piece.lane + i] = p[i];
  }
}

template <class E>
inline void write_row(const float* row, const Pieces& pieces, const std::vector<E*>& to) {
  for (const Piece& piece : pieces) {
    E* p = to[piece.tensor] + piece.at;
    for (int i = 0; i < piece.count; ++i) p[i] = row[piece.lane + i];
  }
}

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

// Codes of eight bits; GCC takes the general conversions apart, lane by lane.
inline Vec<float> load_codes(const int8_t* p) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#else
  return __builtin_convertvector(*reinterpret_cast<const Lanes<int8_t>::Vec*>(p), Vec<float>);
#endif
}

inline void store_codes(int8_t* p, Ints codes) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(codes)));
#else
  *reinterpret_cast<Lanes<int8_t>::Vec*>(p) = __builtin_convertvector(codes, Lanes<int8_t>::Vec);
#endif
}

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

// Hidden or cell states of all tensors: for each layer `hidden` rows.
class Memory {
 public:
  enum Kind { FLOAT32, BFLOAT16, INT8 };

  struct Place {
    char* values;
    int64_t stride;  // from row to row, in elements
    uint16_t* scales;
    int64_t scale_stride;
  };

  Memory(Kind kind, std::vector<Place> places, int hidden) : kind_(kind), places_(std::move(places)), hidden_(hidden) {}

  // Scratch that a thread needs for reading and writing.
  struct Scratch {
    explicit Scratch(int hidden) : values(hidden * LANES), scales(LANES) {}
    Buffer<float> values;
    Buffer<uint16_t> scales;
  };

  void read(const Pieces& pieces, int layer, float* tile, const Scratch& scratch) const {
    switch (kind_) {
      case FLOAT32: return read_as<float>(pieces, layer, tile, scratch);
      case BFLOAT16: return read_as<uint16_t>(pieces, layer, tile, scratch);
      case INT8: return read_as<int8_t>(pieces, layer, tile, scratch);
    }
  }

  // What the next tile will read, if it is of the same tensor.
  Ahead ahead(const Pieces& pieces, int layer) const {
    if (!whole(pieces)) return {};
    switch (kind_) {
      case FLOAT32: return next<float>(pieces[0], layer);
      case BFLOAT16: return next<uint16_t>(pieces[0], layer);
      default: return next<int8_t>(pieces[0], layer);
    }
  }

  void write(const float* tile, const Pieces& pieces, int layer, const Scratch& scratch) const {
    switch (kind_) {
      case FLOAT32: return write_as<float>(tile, pieces, layer, scratch);
      case BFLOAT16: return write_as<uint16_t>(tile, pieces, layer, scratch);
      case INT8: return write_as<int8_t>(tile, pieces, layer, scratch);
    }
  }

 private:
  static constexpr float CODES = 127.0f;

  template <class E>
  Rows<E> rows(const Piece& piece, int layer) const {
    const Place& place = places_[piece.tensor];
    return {reinterpret_cast<E*>(place.values) + layer * hidden_ * place.stride + piece.at, place.stride};
  }

  template <class E>
  Ahead next(const Piece& piece, int layer) const {
    const Rows<E> now = rows<E>(piece, layer);
    return {now.p + LANES, now.stride, LANES};
  }

  uint16_t* scales(const Piece& piece, int layer) const {
    const Place& place = places_[piece.tensor];
    return place.scales + layer * place.scale_stride + piece.at;
  }

  static bool whole(const Pieces& pieces) { return pieces.size() == 1 && pieces[0].count == LANES; }

  template <class E>
  void read_as(const Pieces& pieces, int layer, float* tile, const Scratch& scratch) const {
    Rows<E> from{reinterpret_cast<E*>(scratch.values.get()), LANES};
    const uint16_t* scale = scratch.scales.get();
    if (whole(pieces)) {
      from = rows<E>(pieces[0], layer);
      if (kind_ == INT8) scale = scales(pieces[0], layer);
    } else {
      for (const Piece& piece : pieces) {
        const Rows<E> there = rows<E>(piece, layer);
        for (int u = 0; u < hidden_; ++u) std::copy_n(there[u], piece.count, from[u] + piece.lane);
        if (kind_ == INT8) std::copy_n(scales(piece, layer), piece.count, scratch.scales.get() + piece.lane);
      }
    }
    for (int at = 0; at < LANES; at += WIDTH<float>) {
      Vec<float> factor;
      if constexpr (sizeof(E) == 1) factor = load_bf16(scale + at) / (CODES * CODES);
      for (int u = 0; u < hidden_; ++u) {
        const E* p = from[u] + at;
        Vec<float> x;
        if constexpr (sizeof(E) == 4)
          x = load(p);
        else if constexpr (sizeof(E) == 2)
          x = load_bf16(p);
        else {
          x = load_codes(p);
          x = x * (x < 0.0f ? -x : x) * factor;
        }
        store(tile + u * LANES + at, x);
      }
    }
  }

  template <class E>
  void write_as(const float* tile, const Pieces& pieces, int layer, const Scratch& scratch) const {
    const bool direct = whole(pieces);
    const Rows<E> to = direct ? rows<E>(pieces[0], layer) : Rows<E>{reinterpret_cast<E*>(scratch.values.get()), LANES};
    uint16_t* scale = direct && kind_ == INT8 ? scales(pieces[0], layer) : scratch.scales.get();
    for (int at = 0; at < LANES; at += WIDTH<float>) {
      if constexpr (sizeof(E) == 1)
        encode(tile + at, to.p + at, to.stride, scale + at);
      else
        for (int u = 0; u < hidden_; ++u) {
          const Vec<float> x = load(tile + u * LANES + at);
          if constexpr (sizeof(E) == 4)
            store(to[u] + at, x);
          else
            store_bf16(to[u] + at, round_to_bf16(x));
        }
    }
    if (direct) return;
    for (const Piece& piece : pieces) {
      const Rows<E> there = rows<E>(piece, layer);
      for (int u = 0; u < hidden_; ++u) std::copy_n(to[u] + piece.lane, piece.count, there[u]);
      if (kind_ == INT8) std::copy_n(scale + piece.lane, piece.count, scales(piece, layer));
    }
  }

  // The vectors of one lane each: a code per unit and one scale.
  void encode(const float* tile, int8_t* codes, int64_t stride, uint16_t* scale) const {
    // As whole numbers, magnitudes are in order, and NaN is above infinity.
    Ints most{};
    for (int u = 0; u < hidden_; ++u) {
      const Ints magnitude = bit_cast<Ints>(load(tile + u * LANES)) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    const Ints kept = round_to_bf16(bit_cast<Vec<float>>(most));
    store_bf16(scale, kept);
    const Vec<float> wide = bit_cast<Vec<float>>(kept);
    const Ints usable = (wide > 0.0f) & (wide < HUGE_VALF);
    const Vec<float> factor = usable ? CODES * CODES / wide : Vec<float>{};
    for (int u = 0; u < hidden_; ++u) {
      const Vec<float> x = load(tile + u * LANES);
      const Ints sign = bit_cast<Ints>(x) & int(0x80000000);
      Vec<float> root = fast_square_root(bit_cast<Vec<float>>(bit_cast<Ints>(x) ^ sign) * factor);
      root = bit_cast<Vec<float>>(bit_cast<Ints>(root < CODES ? root : broadcast(CODES)) | sign);
      // Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
      store_codes(codes + u * stride, bit_cast<Ints>(root + 12582912.0f) & usable);
    }
  }

  Kind kind_;
  std::vector<Place> places_;
  int hidden_;
};

}  // namespace learnedopt
