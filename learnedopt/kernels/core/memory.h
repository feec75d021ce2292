// Hidden and cell states in memory: in float32, in bfloat16, or in eight or ten bits.
#pragma once

#include "codes.h"

namespace learnedopt {

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
      : kind_(kind), places_(std::move(places)), hidden_(hidden), fine_(fine), codes_(hidden, fine) {}

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
        codes_.decode(from, low, scale, at, tile);
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
        codes_.encode(tile, to, low, scale, at);
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

  Kind kind_;
  std::vector<Place> places_;
  int hidden_;
  bool fine_;
  Codes codes_;
};

}  // namespace learnedopt
