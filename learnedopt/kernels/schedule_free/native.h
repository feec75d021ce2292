// ScheduleFreeRule
#pragma once

#include "core/sums.h"

namespace learnedopt::schedule_free {

class Rule {
 public:
  explicit Rule(const Given& given)
      : readout(given.weights[0].const_data_ptr<float>()),
        units(int(given.weights[0].size(0)) - SEEN - 1),
        statistics(given),
        s(given.settings),
        moments(given, s),
        offsets(given.numbers("offset")) {}

  void features(const Tile& tile, float* in) const {
    float *factors = rows.get(), *state = numbers(), *seen = features_seen();
    statistics.expand(0, FEATURES, tile.pieces, factors);
    statistics.expand(FEATURES, NUM_ROWS - FEATURES, tile.pieces, seen + OWN * LANES);
    moments.read(tile.pieces, state);
    read_row(offsets, tile.pieces, state + 2 * LANES);
    const AdamMoments::Directions now = moments(load_row(tile.grad.get()), state, factors);
    const Row<float> per_offset = load_row(factors + PER_OFFSET * LANES), offset = load_row(state + 2 * LANES);
    const Row<float> own[OWN] = {now.a, now.g, absolute(now.a), offset * per_offset};
    for (int k = 0; k < OWN; ++k) store_row(seen + k * LANES, own[k]);
    moments.write(now, tile.pieces, state);
    if (units) std::copy_n(seen, SEEN * LANES, in);
  }

  void update(const Tile& tile, const float* top) const {
    const float *seen = features_seen(), *factors = rows.get();
    float* state = numbers();
    const float *for_top = readout + SEEN * OUTPUTS, *bias = for_top + units * OUTPUTS;
    Row<float> out[OUTPUTS];
    for (int k = 0; k < OUTPUTS; ++k) out[k] = broadcast_row(bias[k]);
    product(out, readout, seen, SEEN);
    product(out, for_top, top, units);
    const Row<float> a = load_row(seen), g = load_row(seen + LANES), averaging = load_row(factors + AVERAGING * LANES);
    const Row<float> log_step = bounded(out[0] * float(s.log_step_gain), s.log_step_bound);
    const Row<float> direction = (1.0f + bounded(out[1], s.mix_bound)) * g + bounded(out[2], s.mix_bound) * a;
    const Row<float> move = float(s.nominal_step) * exponential(log_step) * direction;
    const Row<float> nominal = averaging * exponential(bounded(out[3], s.log_averaging_bound));
    const Row<float> weight = clamp(nominal, -HUGE_VALF, 1.0f);
    // What the average takes of the offset goes to the parameters, and what is left stays.
    const Row<float> offset = load_row(state + 2 * LANES) - float(s.interpolation) * move;
    store_row(tile.delta.get(), weight * offset - float(1.0 - s.interpolation) * move);
    store_row(state, (1.0f - weight) * offset);
    write_row(state, tile.pieces, offsets);
  }

 private:
  static constexpr int OWN = 4, SEEN = OWN + NUM_ROWS - FEATURES, OUTPUTS = 4, STATE = 3;

  float* numbers() const { return rows.get() + FEATURES * LANES; }
  float* features_seen() const { return numbers() + STATE * LANES; }

  const float* readout;  // [features + units + bias][outputs]
  int units;             // 0 where there is no LSTM
  Statistics statistics;
  Settings s;
  AdamMoments moments;
  std::vector<float*> offsets;
  Buffer<float> rows{(FEATURES + STATE + SEEN) * LANES};
};

// What the rule takes the means of.
class Terms {
 public:
  static constexpr int ROWS = 4, COUNT = NUM_MEANS;

  explicit Terms(const Given& given)
      : s(given.settings), moments(given, s), offsets(given.numbers("offset")), origins(given.numbers("origin")) {}

  void read(const Pieces& pieces, float* old) const {
    moments.read(pieces, old);
    read_row(offsets, pieces, old + 2 * LANES);
    read_row(origins, pieces, old + 3 * LANES);
  }

  std::array<Row<float>, COUNT> operator()(const Row<float>& param, const Row<float>& grad, const Row<float>& own_grad,
                                           const float* old, const float* factors) const {
    const AdamMoments::Directions now = moments(grad, old, factors);
    const float limit = s.way_limit;
    const Row<float> offset = load_row(old + 2 * LANES), slope = clamp(own_grad, -limit, limit);
    const Row<float> way = clamp(load_row(old + 3 * LANES) - param, -limit, limit);
    std::array<Row<float>, COUNT> terms;
    terms[PARAM_SQUARE] = param * param;
    terms[A_G] = now.a * now.g;
    terms[A_SQUARE] = now.a * now.a;
    terms[OFFSET_SQUARE] = offset * offset;
    terms[OFFSET_A] = offset * now.a;
    terms[SLOPE_WAY] = slope * way;
    terms[SLOPE_SQUARE] = slope * slope;
    terms[WAY_SQUARE] = way * way;
    return terms;
  }

 private:
  Settings s;
  AdamMoments moments;
  std::vector<float*> offsets, origins;
};

}  // namespace learnedopt::schedule_free

TORCH_LIBRARY_FRAGMENT(learnedopt, library) {
  learnedopt::define_step<learnedopt::schedule_free::Rule>(library, "schedule_free");
  learnedopt::define_sums<learnedopt::schedule_free::Terms>(library, "schedule_free");
}
