// NormalizedGradientRule
#pragma once

#include "core/sums.h"

namespace learnedopt::normalized {

inline Row<float> in_range(const Row<float>& grad) {
  const float limit = 0.5f * std::sqrt(std::numeric_limits<float>::max());
  return clamp(grad, -limit, limit);
}

class Rule {
 public:
  explicit Rule(const Given& given) : statistics(given), s(given.settings), squares(given.numbers("square")) {}

  void features(const Tile&, float*) const {}

  void update(const Tile& tile, const float*) const {
    float *factors = rows.get(), *old = factors + NUM_ROWS * LANES;
    statistics.expand(0, NUM_ROWS, tile.pieces, factors);
    read_row(squares, tile.pieces, old);
    Row<float> grad = in_range(load_row(tile.grad.get()));
    const Row<float> floor = load_row(factors + FLOOR * LANES);
    if (s.relative_eps != 0) {
      const Row<float> large = grad * grad;
      grad = grad * (large / clamp(large + floor, std::numeric_limits<float>::min(), HUGE_VALF));
    }
    const Row<float> now = grad * grad + floor;
    const Row<float> square = float(s.square_decay) * load_row(old) + float(1.0 - s.square_decay) * now;
    const Row<float> mean = square * load_row(factors + CORRECTION * LANES);
    const Row<float> rms = square_root(clamp(mean, std::numeric_limits<float>::min(), HUGE_VALF)) + float(s.eps);
    store_row(tile.delta.get(), -(grad / rms));
    store_row(old, square);
    write_row(old, tile.pieces, squares);
  }

 private:
  Statistics statistics;
  Settings s;
  std::vector<float*> squares;
  Buffer<float> rows{(NUM_ROWS + 1) * LANES};
};

// What the rule takes the means of.
class Terms {
 public:
  static constexpr int ROWS = 0, COUNT = NUM_MEANS;

  explicit Terms(const Given&) {}
  void read(const Pieces&, float*) const {}
  std::array<Row<float>, COUNT> operator()(const Row<float>&, const Row<float>& gradient, const Row<float>&,
                                           const float*, const float*) const {
    const Row<float> grad = in_range(gradient);
    return {grad * grad};
  }
};

}  // namespace learnedopt::normalized

TORCH_LIBRARY_FRAGMENT(learnedopt, library) {
  learnedopt::define_step<learnedopt::normalized::Rule>(library, "normalized");
  learnedopt::define_sums<learnedopt::normalized::Terms>(library, "normalized");
}
