// LawsRule
#pragma once

#include "core/sums.h"

namespace learnedopt::laws {

class Rule {
 public:
  explicit Rule(const Given& given) : statistics(given), offsets(given.numbers("offset")) {}

  void features(const Tile&, float*) const {}

  void update(const Tile& tile, const float*) const {
    float *factors = rows.get(), *state = factors + NUM_ROWS * LANES;
    statistics.expand(0, NUM_ROWS, tile.pieces, factors);
    read_row(offsets, tile.pieces, state);
    auto row = [&](int index) { return load_row(factors + index * LANES); };
    const Row<float> direction = load_row(tile.grad.get()), offset = load_row(state);
    store_row(tile.delta.get(), row(FROM_OFFSET) * offset - row(FROM_DIRECTION) * direction);
    store_row(state, row(KEPT) * (offset - row(STEP) * direction));
    write_row(state, tile.pieces, offsets);
  }

 private:
  Statistics statistics;
  std::vector<float*> offsets;
  Buffer<float> rows{(NUM_ROWS + 1) * LANES};
};

// What the rule takes the means of.
class Terms {
 public:
  static constexpr int ROWS = 1, COUNT = NUM_MEANS;

  explicit Terms(const Given& given) : s(given.settings), origins(given.numbers("origin")) {}

  void read(const Pieces& pieces, float* old) const { read_row(origins, pieces, old); }

  std::array<Row<float>, COUNT> operator()(const Row<float>& param, const Row<float>&, const Row<float>& own_grad,
                                           const float* old, const float*) const {
    const float limit = s.way_limit;
    const Row<float> slope = clamp(own_grad, -limit, limit), way = clamp(load_row(old) - param, -limit, limit);
    std::array<Row<float>, COUNT> terms;
    terms[SLOPE_WAY] = slope * way;
    terms[SLOPE_SQUARE] = slope * slope;
    terms[WAY_SQUARE] = way * way;
    terms[PARAM_SQUARE] = param * param;
    return terms;
  }

 private:
  Settings s;
  std::vector<float*> origins;
};

}  // namespace learnedopt::laws

TORCH_LIBRARY_FRAGMENT(learnedopt, library) {
  learnedopt::define_step<learnedopt::laws::Rule>(library, "laws");
  learnedopt::define_sums<learnedopt::laws::Terms>(library, "laws");
}
