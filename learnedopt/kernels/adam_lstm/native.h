// AdamLSTMRule
#pragma once

#include "core/sums.h"

namespace learnedopt::adam_lstm {

// What the rule keeps besides its LSTM, and what it makes of it and a gradient.
class Moments {
 public:
  static constexpr int ROWS = 3;

  Moments(const Given& given, const Settings& settings)
      : fast(given.numbers("fast")),
        slow(given.numbers("slow")),
        square(given.numbers("square")),
        fast_decay(settings.fast_decay),
        slow_decay(settings.slow_decay),
        square_decay(settings.square_decay),
        eps(settings.eps) {}

  struct Directions {
    Row<float> fast, slow, square, a, b, g;
  };

  // The new moments and the normalised directions, from gradients and three rows each of old moments and of bias
  // corrections.
  Directions operator()(const Row<float>& gradient, const float* old, const float* factors) const {
    Directions now;
    const float limit = 0.5f * std::sqrt(std::numeric_limits<float>::max());
    const Row<float> grad = clamp(gradient, -limit, limit);
    const Row<float> fast = load_row(old), slow = load_row(old + LANES), square = load_row(old + 2 * LANES);
    now.fast = fast + (grad - fast) * (1.0f - fast_decay);
    now.slow = slow + (grad - slow) * (1.0f - slow_decay);
    now.square = square + (grad * grad - square) * (1.0f - square_decay);
    const Row<float> mean = now.square * load_row(factors + SQUARE_CORRECTION * LANES);
    const Row<float> rms = square_root(clamp(mean, std::numeric_limits<float>::min(), HUGE_VALF)) + eps;
    now.a = now.fast * load_row(factors + FAST_CORRECTION * LANES) / rms;
    now.b = now.slow * load_row(factors + SLOW_CORRECTION * LANES) / rms;
    now.g = grad / rms;
    return now;
  }

  // Three rows of old moments.
  void read(const Pieces& pieces, float* old) const {
    read_row(fast, pieces, old);
    read_row(slow, pieces, old + LANES);
    read_row(square, pieces, old + 2 * LANES);
  }

  // Writes the new moments, by way of three rows.
  void write(const Directions& now, const Pieces& pieces, float* rows) const {
    store_row(rows, now.fast);
    store_row(rows + LANES, now.slow);
    store_row(rows + 2 * LANES, now.square);
    write_row(rows, pieces, fast);
    write_row(rows + LANES, pieces, slow);
    write_row(rows + 2 * LANES, pieces, square);
  }

 private:
  std::vector<float*> fast, slow, square;
  float fast_decay, slow_decay, square_decay, eps;
};

class Rule {
 public:
  explicit Rule(const Given& given)
      : readout(given.weights[0], given.weights[1]), statistics(given), s(given.settings), moments(given, s) {}

  void features(const Tile& tile, float* in) const {
    float *factors = rows.get(), *state = factors + FEATURES * LANES, *directions = state + Moments::ROWS * LANES;
    statistics.expand(0, FEATURES, tile.pieces, factors);
    statistics.expand(FEATURES, NUM_ROWS - FEATURES, tile.pieces, in + OWN * LANES);
    moments.read(tile.pieces, state);
    const Moments::Directions now = moments(load_row(tile.grad.get()), state, factors);
    const Row<float> own[OWN] = {now.a, now.b, now.g, absolute(now.a), absolute(now.b)};
    for (int k = 0; k < OWN; ++k) store_row(in + k * LANES, own[k]);
    store_row(directions, now.a);
    store_row(directions + LANES, now.b);
    moments.write(now, tile.pieces, state);
  }

  void update(const Tile& tile, const float* top) const {
    const float* directions = rows.get() + (FEATURES + Moments::ROWS) * LANES;
    const Row<float> a = load_row(directions), b = load_row(directions + LANES);
    auto out = [&](int k) { return readout(k, top, readout.inputs()); };
    const Row<float> log_step = bounded(out(0) * float(s.log_step_gain), s.log_step_bound);
    const Row<float> direction = (1.0f + bounded(out(1), s.mix_bound)) * a + bounded(out(2), s.mix_bound) * b;
    store_row(tile.delta.get(), -float(s.nominal_step) * exponential(log_step) * direction);
  }

 private:
  static constexpr int OWN = 5;

  Readout readout;
  Statistics statistics;
  Settings s;
  Moments moments;
  Buffer<float> rows{(FEATURES + Moments::ROWS + 2) * LANES};  // corrections, old and new moments, a and b
};

// What the rule takes the means of.
class Terms {
 public:
  static constexpr int ROWS = Moments::ROWS, COUNT = NUM_MEANS;

  explicit Terms(const Given& given) : moments(given, Settings(given.settings)) {}
  void read(const Pieces& pieces, float* old) const { moments.read(pieces, old); }

  std::array<Row<float>, COUNT> operator()(const Row<float>& param, const Row<float>& grad, const Row<float>&,
                                           const float* old, const float* factors) const {
    const Moments::Directions now = moments(grad, old, factors);
    std::array<Row<float>, COUNT> terms;
    terms[PARAM_SQUARE] = param * param;
    terms[FAST_GRAD] = now.a * now.g;
    terms[SLOW_SQUARE] = now.b * now.b;
    return terms;
  }

 private:
  Moments moments;
};

}  // namespace learnedopt::adam_lstm

TORCH_LIBRARY_FRAGMENT(learnedopt, library) {
  learnedopt::define_step<learnedopt::adam_lstm::Rule>(library, "adam_lstm");
  learnedopt::define_sums<learnedopt::adam_lstm::Terms>(library, "adam_lstm");
}
