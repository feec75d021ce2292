// What a step reads and writes: coordinates of many tensors side by side, a tile at a time.
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

}  // namespace learnedopt
