// RNNpropRule
#pragma once

#include "core/step.h"

namespace learnedopt::rnnprop {

class Rule {
 public:
  explicit Rule(const Given& given)
      : inputs(given.weights[0], given.weights[1]),
        readout(given.weights[2], given.weights[3]),
        units(given.weights[0].size(0)),
        statistics(given),
        s(given.settings),
        moments(given, s) {}

  void features(const Tile& tile, float* in) const {
    float *factors = rows.get(), *state = factors + NUM_ROWS * LANES, *directions = state + 2 * LANES;
    statistics.expand(0, NUM_ROWS, tile.pieces, factors);
    moments.read(tile.pieces, state);
    const AdamMoments::Directions now = moments(load_row(tile.grad.get()), state, factors);
    moments.write(now, tile.pieces, state);
    store_row(directions, now.a);
    store_row(directions + LANES, now.g);
    for (int unit = 0; unit < units; ++unit) {
      const Row<float> x = inputs(unit, directions, 2);
      // An exponential linear unit.
      store_row(in + unit * LANES, clamp(x, 0.0f, HUGE_VALF) + (exponential(clamp(x, -HUGE_VALF, 0.0f)) - 1.0f));
    }
  }
  void update(const Tile& tile, const float* top) const {
    store_row(tile.delta.get(), -float(s.output_scale) * bounded(readout(0, top, readout.inputs()), 1.0f));
  }

 private:
  Readout inputs, readout;
  int units;
  Statistics statistics;
  Settings s;
  AdamMoments moments;
  Buffer<float> rows{(NUM_ROWS + 4) * LANES};
};

}  // namespace learnedopt::rnnprop

TORCH_LIBRARY_FRAGMENT(learnedopt, library) { learnedopt::define_step<learnedopt::rnnprop::Rule>(library, "rnnprop"); }
