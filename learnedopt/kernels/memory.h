// What a step reads and writes: coordinates of many tensors side by side, a tile at a time, and state in float32, in
// bfloat16, or in eight or ten bits.
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

// Hidden or cell states of all tensors: for each layer `hidden` rows.
class Memory {
 public:
  enum Kind { FLOAT32, BFLOAT16, INT8 };

  struct Place {
    char* values;
    int64_t stride;  // from row to row, in elements
    uint16_t* scales = nullptr;
    int64_t scale_stride = 0;
    uint8_t* lows = nullptr;  // of codes of ten bits
    int64_t low_stride = 0;
  };

  // `fine` says whether codes have ten bits. That is not for the places to say: an empty tensor has no address.
  Memory(Kind kind, std::vector<Place> places, int hidden, bool fine)
      : kind_(kind), places_(std::move(places)), hidden_(hidden), fine_(fine), most_(fine ? 511.0f : 127.0f) {}

  // Scratch that a thread needs for reading and writing.
  struct Scratch {
    explicit Scratch(int hidden) : values(hidden * LANES), scales(LANES), lows(low_bytes(hidden) * LANES) {}
    Buffer<float> values;
    Buffer<uint16_t> scales;
    Buffer<uint8_t> lows;
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

  Rows<uint8_t> lows(const Piece& piece, int layer) const {
    const Place& place = places_[piece.tensor];
    return {place.lows + layer * low_bytes(hidden_) * place.low_stride + piece.at, place.low_stride};
  }

  static bool whole(const Pieces& pieces) { return pieces.size() == 1 && pieces[0].count == LANES; }

  template <class E>
  void read_as(const Pieces& pieces, int layer, float* tile, const Scratch& scratch) const {
    Rows<E> from{reinterpret_cast<E*>(scratch.values.get()), LANES};
    const uint16_t* scale = scratch.scales.get();
    Rows<uint8_t> low{scratch.lows.get(), LANES};
    if (whole(pieces)) {
      from = rows<E>(pieces[0], layer);
      if (kind_ == INT8) scale = scales(pieces[0], layer);
      if (fine_) low = lows(pieces[0], layer);
    } else {
      for (const Piece& piece : pieces) {
        copy(rows<E>(piece, layer), 0, from, piece.lane, hidden_, piece.count);
        if (kind_ == INT8) std::copy_n(scales(piece, layer), piece.count, scratch.scales.get() + piece.lane);
        if (fine_) copy(lows(piece, layer), 0, low, piece.lane, low_bytes(hidden_), piece.count);
      }
    }
    for (int at = 0; at < LANES; at += WIDTH<float>) {
      if constexpr (sizeof(E) == 1) {
        decode(from, low, scale, at, tile);
      } else {
        for (int u = 0; u < hidden_; ++u) {
          if constexpr (sizeof(E) == 4)
            store(tile + u * LANES + at, load(from[u] + at));
          else
            store(tile + u * LANES + at, load_bf16(from[u] + at));
        }
      }
    }
  }

  // So many numbers of each of some rows.
  template <class E>
  static void copy(Rows<E> from, int from_lane, Rows<E> to, int to_lane, int rows, int count) {
    for (int row = 0; row < rows; ++row) std::copy_n(from[row] + from_lane, count, to[row] + to_lane);
  }

  template <class E>
  void write_as(const float* tile, const Pieces& pieces, int layer, const Scratch& scratch) const {
    const bool direct = whole(pieces);
    const Rows<E> to = direct ? rows<E>(pieces[0], layer) : Rows<E>{reinterpret_cast<E*>(scratch.values.get()), LANES};
    uint16_t* scale = direct && kind_ == INT8 ? scales(pieces[0], layer) : scratch.scales.get();
    const Rows<uint8_t> low = direct && fine_ ? lows(pieces[0], layer) : Rows<uint8_t>{scratch.lows.get(), LANES};
    for (int at = 0; at < LANES; at += WIDTH<float>) {
      if constexpr (sizeof(E) == 1)
        encode(tile, to, low, scale, at);
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
      copy(to, piece.lane, rows<E>(piece, layer), 0, hidden_, piece.count);
      if (kind_ == INT8) std::copy_n(scale + piece.lane, piece.count, scales(piece, layer));
      if (fine_) copy(low, piece.lane, lows(piece, layer), 0, low_bytes(hidden_), piece.count);
    }
  }

  // The vectors of one lane each: a code per unit, its lower bits elsewhere if it has ten, and one scale.
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

  Kind kind_;
  std::vector<Place> places_;
  int hidden_;
  bool fine_;
  float most_;  // codes go from minus to plus this
};

}  // namespace learnedopt
