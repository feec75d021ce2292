// MetaLSTMRule
#pragma once

#include "core/step.h"

namespace learnedopt::meta_lstm {

class Rule {
 public:
  explicit Rule(const Given& given)
      : forget(given.weights[0], given.weights[1]),
        input(given.weights[2], given.weights[3]),
        forget_state(given.numbers("forget")),
        input_state(given.numbers("input")),
        statistics(given),
        s(given.settings) {}

  void features(const Tile& tile, float* in) const {
    const Row<float> grad = load_row(tile.grad.get()) / float(s.gradient_divisor);
    store_row(tile.grad.get(), grad);
    log_sign(grad, float(s.preprocessing_p), in);
    statistics.expand(FEATURES, NUM_ROWS - FEATURES, tile.pieces, in + 2 * LANES);
  }

  void update(const Tile& tile, const float* top) const {
    const Row<float> kept = gate(forget, forget_state, tile, top), taken = gate(input, input_state, tile, top);
    store_row(tile.delta.get(), (kept - 1.0f) * load_row(tile.param.get()) - taken * load_row(tile.grad.get()));
  }

 private:
  Row<float> gate(const Readout& gate, const std::vector<float*>& state, const Tile& tile, const float* top) const {
    float past[LANES] = {};
    read_row(state, tile.pieces, past);
    const int hidden = gate.inputs() - 2;
    const Row<float> z = gate(0, top, hidden) + gate.weight(0, hidden) * load_row(tile.param.get()) +
                         gate.weight(0, hidden + 1) * load_row<float>(past);
    const Row<float> value = sigmoid(z * SIGMOID_SCALE<float>).value;
    store_row<float>(past, s.feed_back_gate ? value : z);
    write_row(past, tile.pieces, state);
    return value;
  }

  Readout forget, input;
  std::vector<float*> forget_state, input_state;
  Statistics statistics;
  Settings s;
};

}  // namespace learnedopt::meta_lstm

TORCH_LIBRARY_FRAGMENT(learnedopt, library) {
  learnedopt::define_step<learnedopt::meta_lstm::Rule>(library, "meta_lstm");
}
