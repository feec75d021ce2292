// LSTMRule
#pragma once

#include "core/step.h"

namespace learnedopt::lstm {

class Rule {
 public:
  explicit Rule(const Given& given) : readout(given.weights[0], given.weights[1]), s(given.settings) {}

  void features(const Tile& tile, float* in) const {
    const Row<float> grad = load_row(tile.grad.get());
    if (s.preprocess)
      log_sign(grad, float(s.preprocessing_p), in);
    else
      store_row(in, grad);
  }
  void update(const Tile& tile, const float* top) const {
    store_row(tile.delta.get(), float(s.output_scale) * readout(0, top, readout.inputs()));
  }

 private:
  Readout readout;
  Settings s;
};

}  // namespace learnedopt::lstm

TORCH_LIBRARY_FRAGMENT(learnedopt, library) { learnedopt::define_step<learnedopt::lstm::Rule>(library, "lstm"); }
