// One step of a rule, in place, on many tensors: state, parameters and gradients are read and written once.
#pragma once

#include <atomic>
#include <limits>

#include "memory.h"
#include "network.h"

namespace learnedopt {

// The coordinates' numbers in one tile.
struct Tile {
  Pieces pieces;
  Buffer<float> param{LANES}, grad{LANES}, delta{LANES};
};

// Pointers to the elements of tensors that have one number per coordinate.
template <class E>
std::vector<E*> pointers(const TensorList& tensors) {
  std::vector<E*> result;
  for (const Tensor& tensor : tensors) result.push_back(tensor.mutable_data_ptr<E>());
  return result;
}

// Calls f with a value of the type that tensors have in memory.
template <class F>
void with_dtype(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(at::BFloat16{});
    case at::kHalf: return f(at::Half{});
    default: TORCH_CHECK(false, "parameters and gradients must be float32, bfloat16 or float16, got ", dtype);
  }
}

// The tensors of a step, parameters or gradients: those of each dtype in an array of their own.
class Numbers {
 public:
  explicit Numbers(const TensorList& tensors) {
    for (const Tensor& tensor : tensors) {
      TORCH_CHECK(tensor.is_contiguous(), "parameters and gradients must be contiguous");
      pointers_.push_back(tensor.data_ptr());
      dtypes_.push_back(tensor.scalar_type());
    }
  }
  void read(const Pieces& pieces, float* row) const {
    for (const Piece& piece : pieces)
      with_dtype(dtypes_[piece.tensor], [&](auto zero) {
        using E = decltype(zero);
        const E* p = static_cast<const E*>(pointers_[piece.tensor]) + piece.at;
        for (int i = 0; i < piece.count; ++i) row[piece.lane + i] = static_cast<float>(p[i]);
      });
  }
  void write(const float* row, const Pieces& pieces) const {
    for (const Piece& piece : pieces)
      with_dtype(dtypes_[piece.tensor], [&](auto zero) {
        using E = decltype(zero);
        E* p = static_cast<E*>(pointers_[piece.tensor]) + piece.at;
        for (int i = 0; i < piece.count; ++i) p[i] = static_cast<E>(row[piece.lane + i]);
      });
  }

 private:
  std::vector<void*> pointers_;
  std::vector<at::ScalarType> dtypes_;
};

inline std::vector<int64_t> sizes_of(const TensorList& tensors) {
  std::vector<int64_t> sizes;
  for (const Tensor& tensor : tensors) sizes.push_back(tensor.numel());
  return sizes;
}

// Where states (layers, hidden, ...), the lower bits of their codes (layers, low_bytes(hidden), ...) and their scales
// (layers, ...) are; the coordinates of each row lie side by side.
inline Memory memory(const TensorList& states, const TensorList& lows, const TensorList& scales,
                     const TensorList& params, int depth, int hidden) {
  Memory::Kind kind = Memory::FLOAT32;
  std::vector<Memory::Place> places;
  for (size_t i = 0; i < states.size(); ++i) {
    const Tensor& state = states[i];
    kind = state.scalar_type() == at::kChar       ? Memory::INT8
           : state.scalar_type() == at::kBFloat16 ? Memory::BFLOAT16
                                                  : Memory::FLOAT32;
    const bool coded = kind == Memory::INT8;
    const int64_t n = params[i].numel();
    TORCH_CHECK(kind != Memory::FLOAT32 || state.scalar_type() == at::kFloat, "a state has dtype ",
                state.scalar_type());
    TORCH_CHECK(state.numel() == depth * hidden * n && (!coded || scales[i].numel() == depth * n) &&
                    (!coded || lows.empty() || lows[i].numel() == depth * low_bytes(hidden) * n),
                "a state does not have the shape of its parameter");
    // Otherwise it is some coordinates of a larger tensor, (layers, hidden, n) and (layers, n).
    auto stride = [n](const Tensor& tensor, int dim) { return tensor.is_contiguous() ? n : tensor.stride(dim); };
    Memory::Place place{static_cast<char*>(state.data_ptr()), stride(state, 1)};
    if (coded) {
      place.scales = static_cast<uint16_t*>(scales[i].data_ptr());
      place.scale_stride = stride(scales[i], 0);
      if (!lows.empty()) {
        place.lows = static_cast<uint8_t*>(lows[i].data_ptr());
        place.low_stride = stride(lows[i], 1);
      }
    }
    places.push_back(place);
  }
  return Memory(kind, std::move(places), hidden, kind == Memory::INT8 && !lows.empty());
}

// What all rules have in common.
struct Step {
  Step(const TensorList& params, const TensorList& grads, const TensorList& h, const TensorList& h_scale,
       const TensorList& c, const TensorList& c_low, const TensorList& c_scale, const TensorList& weights,
       bool maximize, double lr, double weight_decay)
      : params(params),
        grads(grads),
        layout(sizes_of(params)),
        network(weights, false),
        h(memory(h, {}, h_scale, params, network.depth(), network.hidden())),
        c(memory(c, c_low, c_scale, params, network.depth(), network.hidden())),
        maximize(maximize),
        lr(lr),
        decay(1.0 - lr * weight_decay) {
    // So that autograd notices a graph whose parameters have changed.
    for (const Tensor& param : params)
      if (lr != 0.0 && !param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
  }

  Numbers params, grads;
  Layout layout;
  Network<float> network;
  Memory h, c;
  bool maximize;
  float lr, decay;

  // A rule's `features` fills the rows of the first layer's inputs, and its `update` the tile's delta, given the top
  // layer. Each thread has a copy of its own, and takes the next few tiles whenever it has done some.
  template <class Rule>
  void run(const Rule& shared) const {
    constexpr int64_t COORDINATES = LEAST_TILES * LANES;
    const int64_t total = layout.total(), threads = number_of_threads<float>(total);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Rule rule(shared);
      Scratch scratch(network);
      for (int64_t first; (first = next.fetch_add(COORDINATES)) < total;)
        for (int64_t at = first; at < std::min(first + COORDINATES, total); at += LANES) run_tile(rule, at, scratch);
    });
  }

 private:
  struct Scratch {
    explicit Scratch(const Network<float>& network)
        : in(network.most_rows() * LANES),
          next(network.most_rows() * LANES),
          cells(network.hidden() * LANES),
          memory(network.hidden()) {}
    Tile tile;
    Buffer<float> in, next, cells;
    Memory::Scratch memory;
  };

  template <class Rule>
  void run_tile(Rule& rule, int64_t at, Scratch& scratch) const {
    Tile& tile = scratch.tile;
    float *in = scratch.in.get(), *next = scratch.next.get(), *cells = scratch.cells.get();
    layout.pieces(at, tile.pieces);
    params.read(tile.pieces, tile.param.get());
    grads.read(tile.pieces, tile.grad.get());
    if (maximize) store_row(tile.grad.get(), -load_row(tile.grad.get()));
    rule.features(tile, in);
    for (int l = 0; l < network.depth(); ++l) {
      const Layer<float>& layer = network.layers[l];
      h.read(tile.pieces, l, in + layer.inputs * LANES, scratch.memory);
      c.read(tile.pieces, l, cells, scratch.memory);
      forward_tile<float>(layer, in, {cells, LANES}, {cells, LANES}, next, {}, h.ahead(tile.pieces, l),
                          c.ahead(tile.pieces, l));
      c.write(cells, tile.pieces, l, scratch.memory);
      h.write(next, tile.pieces, l, scratch.memory);
      std::swap(in, next);
    }
    rule.update(tile, in);
    if (lr == 0.0f) return;
    float* param = tile.param.get();
    store_row(param, load_row(param) * decay + lr * load_row(tile.delta.get()));
    params.write(param, tile.pieces);
  }
};

// A linear layer before or after the LSTM: weight (outputs, inputs) and bias.
class Readout {
 public:
  Readout(const Tensor& weight, const Tensor& bias) : outputs_(weight.size(0)), inputs_(weight.size(1)) {
    const float *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
    weight_.assign(w, w + outputs_ * inputs_);
    bias_.assign(b, b + outputs_);
  }
  // Of the first `inputs` rows of a tile.
  Row<float> operator()(int output, const float* tile, int inputs) const {
    Row<float> sum = broadcast_row(bias_[output]);
    for (int k = 0; k < inputs; ++k) sum = sum + weight_[output * inputs_ + k] * load_row(tile + k * LANES);
    return sum;
  }
  float weight(int output, int input) const { return weight_[output * inputs_ + input]; }
  int inputs() const { return inputs_; }

 private:
  int outputs_, inputs_;
  std::vector<float> weight_, bias_;
};

// The two channels of a gradient, to two rows.
inline void log_sign(const Row<float>& x, float p, float* out) {
  const Vec<float> least = broadcast(std::exp(-p));
  const Row<float> size = map(absolute(x), [=](Vec<float> v) { return v < least ? least : v; });
  store_row(out, clamp(log_absolute(size) / p, -1.0f, HUGE_VALF));
  store_row(out + LANES, clamp(x * std::exp(p), -1.0f, 1.0f));
}

// LSTMRule
struct LSTM {
  Readout readout;
  bool preprocess;
  float p, output_scale;

  void features(const Tile& tile, float* in) const {
    const Row<float> grad = load_row(tile.grad.get());
    if (preprocess)
      log_sign(grad, p, in);
    else
      store_row(in, grad);
  }
  void update(const Tile& tile, const float* top) const {
    store_row(tile.delta.get(), output_scale * readout(0, top, readout.inputs()));
  }
};

// What AdamLSTMRule keeps beside its LSTM, and what it makes of it and a gradient.
struct Moments {
  static constexpr int ROWS = 3;

  std::vector<float*> fast, slow, square;
  float fast_decay, slow_decay, square_decay, eps;

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
    const Row<float> mean = now.square * load_row(factors + 2 * LANES);
    const Row<float> rms = square_root(clamp(mean, std::numeric_limits<float>::min(), HUGE_VALF)) + eps;
    now.a = now.fast * load_row(factors) / rms;
    now.b = now.slow * load_row(factors + LANES) / rms;
    now.g = grad / rms;
    return now;
  }

  // Three rows of old moments.
  void read(const Pieces& pieces, float* old) const {
    read_row(fast, pieces, old);
    read_row(slow, pieces, old + LANES);
    read_row(square, pieces, old + 2 * LANES);
  }
};

// Rows of a tile that hold a number of each coordinate's tensor: statistics (rows, tensors).
inline void expand(const float* statistics, int64_t tensors, int rows, const Pieces& pieces, float* out) {
  for (int row = 0; row < rows; ++row)
    for (const Piece& piece : pieces)
      std::fill_n(out + row * LANES + piece.lane, piece.count, statistics[row * tensors + piece.tensor]);
}

// Within a bound, and near zero x itself.
ALWAYS_INLINE Row<float> bounded(const Row<float>& x, float bound) {
  return bound * tanh(x * (TANH_SCALE<float> / bound)).value;
}

ALWAYS_INLINE Row<float> exponential(const Row<float>& x) { return exp2_capped(x * 1.44269504f, 127.0f); }

// AdamLSTMRule
struct AdamLSTM {
  static constexpr int CORRECTIONS = 3, SHARED = 4, OWN = 5;

  Readout readout;
  Moments moments;
  const float* statistics;
  int64_t tensors;
  float nominal_step, log_step_gain, log_step_bound, mix_bound;
  Buffer<float> rows{8 * LANES};  // corrections, old and new moments, a and b

  AdamLSTM(Readout readout, Moments moments, const Tensor& statistics, double nominal_step, double log_step_gain,
           double log_step_bound, double mix_bound)
      : readout(std::move(readout)),
        moments(std::move(moments)),
        statistics(statistics.const_data_ptr<float>()),
        tensors(statistics.size(1)),
        nominal_step(nominal_step),
        log_step_gain(log_step_gain),
        log_step_bound(log_step_bound),
        mix_bound(mix_bound) {}
  AdamLSTM(const AdamLSTM& other)
      : readout(other.readout),
        moments(other.moments),
        statistics(other.statistics),
        tensors(other.tensors),
        nominal_step(other.nominal_step),
        log_step_gain(other.log_step_gain),
        log_step_bound(other.log_step_bound),
        mix_bound(other.mix_bound) {}

  void features(const Tile& tile, float* in) const {
    float *factors = rows.get(), *state = factors + 3 * LANES, *directions = state + 3 * LANES;
    expand(statistics, tensors, CORRECTIONS, tile.pieces, factors);
    expand(statistics + CORRECTIONS * tensors, tensors, SHARED, tile.pieces, in + OWN * LANES);
    moments.read(tile.pieces, state);
    const Moments::Directions now = moments(load_row(tile.grad.get()), state, factors);
    const Row<float> own[OWN] = {now.a, now.b, now.g, absolute(now.a), absolute(now.b)};
    for (int k = 0; k < OWN; ++k) store_row(in + k * LANES, own[k]);
    store_row(directions, now.a);
    store_row(directions + LANES, now.b);
    store_row(state, now.fast);
    store_row(state + LANES, now.slow);
    store_row(state + 2 * LANES, now.square);
    write_row(state, tile.pieces, moments.fast);
    write_row(state + LANES, tile.pieces, moments.slow);
    write_row(state + 2 * LANES, tile.pieces, moments.square);
  }

  void update(const Tile& tile, const float* top) const {
    const Row<float> a = load_row(rows.get() + 6 * LANES), b = load_row(rows.get() + 7 * LANES);
    auto out = [&](int k) { return readout(k, top, readout.inputs()); };
    const Row<float> log_step = bounded(out(0) * log_step_gain, log_step_bound);
    const Row<float> direction = (1.0f + bounded(out(1), mix_bound)) * a + bounded(out(2), mix_bound) * b;
    store_row(tile.delta.get(), -nominal_step * exponential(log_step) * direction);
  }
};

// Adam's moments, and what two rules make of them and a gradient.
struct AdamMoments {
  std::vector<float*> momentum, square;
  double momentum_decay, square_decay;
  float eps;

  struct Directions {
    Row<float> momentum, square, a, g;
  };

  // The new moments and the normalised directions, from gradients and two rows each of old moments and of bias
  // corrections.
  Directions operator()(const Row<float>& gradient, const float* old, const float* factors) const {
    Directions now;
    const float limit = 0.5f * std::sqrt(std::numeric_limits<float>::max());
    const Row<float> grad = clamp(gradient, -limit, limit);
    now.momentum = float(momentum_decay) * load_row(old) + float(1.0 - momentum_decay) * grad;
    now.square = float(square_decay) * load_row(old + LANES) + float(1.0 - square_decay) * (grad * grad);
    const Row<float> mean = now.square * load_row(factors + LANES);
    const Row<float> rms = square_root(clamp(mean, std::numeric_limits<float>::min(), HUGE_VALF)) + eps;
    now.a = now.momentum * load_row(factors) / rms;
    now.g = grad / rms;
    return now;
  }

  // Writes the new moments, by way of two rows.
  void write(const Directions& now, const Pieces& pieces, float* rows) const {
    store_row(rows, now.momentum);
    store_row(rows + LANES, now.square);
    write_row(rows, pieces, momentum);
    write_row(rows + LANES, pieces, square);
  }
};

// What ScheduleFreeLSTMRule keeps beside its LSTM.
struct Averages : AdamMoments {
  static constexpr int ROWS = 4;

  std::vector<float*> offset, origin;

  // The old moments, the offset and the origin.
  void read(const Pieces& pieces, float* old) const {
    read_row(momentum, pieces, old);
    read_row(square, pieces, old + LANES);
    read_row(offset, pieces, old + 2 * LANES);
    read_row(origin, pieces, old + 3 * LANES);
  }

  // The parameters at the first step, before which the state is zero.
  Row<float> origins(const Row<float>& param, const float* old, const float* factors) const {
    return load_row(old + 3 * LANES) + load_row(factors + 2 * LANES) * param;
  }
};

// ScheduleFreeLSTMRule
struct ScheduleFreeLSTM {
  static constexpr int FACTORS = 5, SHARED = 10, OWN = 4, FEATURES = OWN + SHARED, OUTPUTS = 4;

  struct Settings {
    const float* readout;  // [features + units + bias][outputs]
    int units;             // 0 where there is no LSTM
    Averages averages;
    const float* statistics;
    int64_t tensors;
    double interpolation;
    float nominal_step, log_step_gain, log_step_bound, mix_bound, log_averaging_bound;
  };

  explicit ScheduleFreeLSTM(const Settings& settings) : s(settings) {}
  ScheduleFreeLSTM(const ScheduleFreeLSTM& other) : s(other.s) {}

  void features(const Tile& tile, float* in) const {
    float *factors = rows.get(), *state = numbers(), *seen = features_seen();
    expand(s.statistics, s.tensors, FACTORS, tile.pieces, factors);
    expand(s.statistics + FACTORS * s.tensors, s.tensors, SHARED, tile.pieces, seen + OWN * LANES);
    s.averages.read(tile.pieces, state);
    const Averages::Directions now = s.averages(load_row(tile.grad.get()), state, factors);
    const Row<float> per_offset = load_row(factors + 4 * LANES), offset = load_row(state + 2 * LANES);
    const Row<float> own[OWN] = {now.a, now.g, absolute(now.a), offset * per_offset};
    for (int k = 0; k < OWN; ++k) store_row(seen + k * LANES, own[k]);
    store_row(state + 3 * LANES, s.averages.origins(load_row(tile.param.get()), state, factors));
    s.averages.write(now, tile.pieces, state);
    write_row(state + 3 * LANES, tile.pieces, s.averages.origin);
    if (s.units) std::copy_n(seen, FEATURES * LANES, in);
  }

  void update(const Tile& tile, const float* top) const {
    const float *seen = features_seen(), *factors = rows.get();
    float* state = numbers();
    const float *for_top = s.readout + FEATURES * OUTPUTS, *bias = for_top + s.units * OUTPUTS;
    Row<float> out[OUTPUTS];
    for (int k = 0; k < OUTPUTS; ++k) out[k] = broadcast_row(bias[k]);
    product(out, s.readout, seen, FEATURES);
    product(out, for_top, top, s.units);
    const Row<float> a = load_row(seen), g = load_row(seen + LANES), averaging = load_row(factors + 3 * LANES);
    const Row<float> log_step = bounded(out[0] * s.log_step_gain, s.log_step_bound);
    const Row<float> direction = (1.0f + bounded(out[1], s.mix_bound)) * g + bounded(out[2], s.mix_bound) * a;
    const Row<float> move = s.nominal_step * exponential(log_step) * direction;
    const Row<float> nominal = averaging * exponential(bounded(out[3], s.log_averaging_bound));
    const Row<float> weight = clamp(nominal, -HUGE_VALF, 1.0f);
    // What the average takes of the offset goes to the parameters, and what is left stays.
    const Row<float> offset = load_row(state + 2 * LANES) - float(s.interpolation) * move;
    store_row(tile.delta.get(), weight * offset - float(1.0 - s.interpolation) * move);
    store_row(state, (1.0f - weight) * offset);
    write_row(state, tile.pieces, s.averages.offset);
  }

 private:
  float* numbers() const { return rows.get() + FACTORS * LANES; }
  float* features_seen() const { return numbers() + Averages::ROWS * LANES; }

  Settings s;
  Buffer<float> rows{(FACTORS + Averages::ROWS + FEATURES) * LANES};
};

// RNNpropRule
struct RNNprop {
  static constexpr int CORRECTIONS = 2;

  struct Settings {
    Readout inputs, readout;
    AdamMoments moments;
    const float* statistics;
    int64_t tensors;
    int units;
    float output_scale;
  };

  explicit RNNprop(const Settings& settings) : s(settings) {}
  RNNprop(const RNNprop& other) : s(other.s) {}

  void features(const Tile& tile, float* in) const {
    float *factors = rows.get(), *state = factors + CORRECTIONS * LANES, *directions = state + 2 * LANES;
    expand(s.statistics, s.tensors, CORRECTIONS, tile.pieces, factors);
    read_row(s.moments.momentum, tile.pieces, state);
    read_row(s.moments.square, tile.pieces, state + LANES);
    const AdamMoments::Directions now = s.moments(load_row(tile.grad.get()), state, factors);
    s.moments.write(now, tile.pieces, state);
    store_row(directions, now.a);
    store_row(directions + LANES, now.g);
    for (int unit = 0; unit < s.units; ++unit) {
      const Row<float> x = s.inputs(unit, directions, 2);
      // An exponential linear unit.
      store_row(in + unit * LANES, clamp(x, 0.0f, HUGE_VALF) + (exponential(clamp(x, -HUGE_VALF, 0.0f)) - 1.0f));
    }
  }
  void update(const Tile& tile, const float* top) const {
    store_row(tile.delta.get(), -s.output_scale * bounded(s.readout(0, top, s.readout.inputs()), 1.0f));
  }

 private:
  Settings s;
  Buffer<float> rows{(CORRECTIONS + 4) * LANES};
};

// MetaLSTMRule
struct MetaLSTM {
  Readout forget, input;
  std::vector<float*> forget_state, input_state;
  const float* statistics;
  int64_t tensors;
  float p, gradient_divisor;
  bool feed_back_gate;

  void features(const Tile& tile, float* in) const {
    const Row<float> grad = load_row(tile.grad.get()) / gradient_divisor;
    store_row(tile.grad.get(), grad);
    log_sign(grad, p, in);
    expand(statistics, tensors, 2, tile.pieces, in + 2 * LANES);
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
    store_row<float>(past, feed_back_gate ? value : z);
    write_row(past, tile.pieces, state);
    return value;
  }
};

inline void lstm_step(TensorList params, TensorList grads, bool maximize, TensorList h, TensorList h_scale,
                      TensorList c, TensorList c_low, TensorList c_scale, TensorList weights, double lr,
                      double weight_decay, const Tensor& readout, const Tensor& bias, bool preprocess, double p,
                      double output_scale) {
  Step(params, grads, h, h_scale, c, c_low, c_scale, weights, maximize, lr, weight_decay)
      .run(LSTM{Readout(readout, bias), preprocess, float(p), float(output_scale)});
}

inline void adam_lstm_step(TensorList params, TensorList grads, bool maximize, TensorList h, TensorList h_scale,
                           TensorList c, TensorList c_low, TensorList c_scale, TensorList weights, double lr,
                           double weight_decay, TensorList fast, TensorList slow, TensorList square,
                           const Tensor& statistics, const Tensor& readout, const Tensor& bias, double fast_decay,
                           double slow_decay, double square_decay, double eps, double nominal_step,
                           double log_step_gain, double log_step_bound, double mix_bound) {
  const Moments moments{pointers<float>(fast), pointers<float>(slow),  pointers<float>(square), float(fast_decay),
                        float(slow_decay),     float(square_decay), float(eps)};
  Step(params, grads, h, h_scale, c, c_low, c_scale, weights, maximize, lr, weight_decay)
      .run(AdamLSTM(Readout(readout, bias), moments, statistics, nominal_step, log_step_gain, log_step_bound,
                    mix_bound));
}

// In float64; several sums side by side, because an addition waits for the one before it.
inline double sum(const float* p, int count) {
  constexpr int SIDE = 8;
  double sums[SIDE] = {};
  for (; count >= SIDE; count -= SIDE, p += SIDE)
    for (int i = 0; i < SIDE; ++i) sums[i] += p[i];
  for (int i = 0; i < count; ++i) sums[i] += p[i];
  for (int half = SIDE / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// Sums over each tensor of K products: (K, tensors) in float64, so that their order hardly matters. `products` has the
// parameters and gradients of a tile, the rows that `state` reads, and a row of each correction.
template <int K, class State, class F>
inline Tensor sums_of(const TensorList& params, const TensorList& grads, bool maximize, const State& state,
                      const Tensor& corrections, F&& products) {
  const Numbers values(params), gradients(grads);
  const Layout layout(sizes_of(params));
  const int64_t tensors = params.size(), chunks = number_of_threads<float>(layout.total());
  const int factors = corrections.size(0);
  std::vector<std::vector<double>> sums(chunks, std::vector<double>(K * tensors));
  for_chunks<float>(layout.total(), chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    Pieces pieces;
    constexpr int AFTER_STATE = 2 + State::ROWS;
    Buffer<float> rows((AFTER_STATE + factors + K) * LANES);
    auto row = [&](int k) { return rows.get() + k * LANES; };
    for (int64_t at = begin; at < end; at += LANES) {
      layout.pieces(at, pieces);
      values.read(pieces, row(0));
      gradients.read(pieces, row(1));
      state.read(pieces, row(2));
      expand(corrections.const_data_ptr<float>(), tensors, factors, pieces, row(AFTER_STATE));
      const Row<float> grad = load_row(row(1));
      const std::array<Row<float>, K> found =
          products(load_row(row(0)), maximize ? -grad : grad, row(2), row(AFTER_STATE));
      for (int k = 0; k < K; ++k) store_row(row(AFTER_STATE + factors + k), found[k]);
      for (const Piece& piece : pieces)
        for (int k = 0; k < K; ++k)
          sums[chunk][k * tensors + piece.tensor] +=
              sum(row(AFTER_STATE + factors + k) + piece.lane, piece.count);
    }
  });
  Tensor result = at::empty({K, tensors}, at::kDouble);
  for (int64_t i = 0; i < K * tensors; ++i) {
    double total = 0.0;
    for (const std::vector<double>& part : sums) total += part[i];
    result.mutable_data_ptr<double>()[i] = total;
  }
  return result;
}

inline Tensor adam_lstm_sums(TensorList params, TensorList grads, bool maximize, TensorList fast, TensorList slow,
                             TensorList square, const Tensor& corrections, double fast_decay, double slow_decay,
                             double square_decay, double eps) {
  const Moments moments{pointers<float>(fast), pointers<float>(slow),  pointers<float>(square), float(fast_decay),
                        float(slow_decay),     float(square_decay), float(eps)};
  auto products = [&](const Row<float>& param, const Row<float>& grad, const float* old, const float* factors) {
    const Moments::Directions now = moments(grad, old, factors);
    return std::array<Row<float>, 3>{param * param, now.a * now.g, now.b * now.b};
  };
  return sums_of<3>(params, grads, maximize, moments, corrections, products);
}

inline void schedule_free_lstm_step(TensorList params, TensorList grads, bool maximize, TensorList h,
                                    TensorList h_scale, TensorList c, TensorList c_low, TensorList c_scale,
                                    TensorList weights, double lr, double weight_decay, TensorList momentum,
                                    TensorList square, TensorList offset, TensorList origin,
                                    const Tensor& statistics, const Tensor& readout, double momentum_decay,
                                    double square_decay, double eps, double nominal_step, double interpolation,
                                    double log_step_gain, double log_step_bound, double mix_bound,
                                    double log_averaging_bound) {
  const Averages averages{{pointers<float>(momentum), pointers<float>(square), momentum_decay, square_decay, float(eps)},
                          pointers<float>(offset),
                          pointers<float>(origin)};
  Step(params, grads, h, h_scale, c, c_low, c_scale, weights, maximize, lr, weight_decay)
      .run(ScheduleFreeLSTM({readout.const_data_ptr<float>(), int(readout.size(0)) - ScheduleFreeLSTM::FEATURES - 1,
                             averages, statistics.const_data_ptr<float>(), statistics.size(1), interpolation,
                             float(nominal_step), float(log_step_gain), float(log_step_bound), float(mix_bound),
                             float(log_averaging_bound)}));
}

inline Tensor schedule_free_lstm_sums(TensorList params, TensorList grads, bool maximize, TensorList momentum,
                                      TensorList square, TensorList offset, TensorList origin,
                                      const Tensor& corrections, double momentum_decay, double square_decay,
                                      double eps, double largest) {
  const Averages averages{{pointers<float>(momentum), pointers<float>(square), momentum_decay, square_decay, float(eps)},
                          pointers<float>(offset),
                          pointers<float>(origin)};
  const float most = float(largest);
  auto products = [&](const Row<float>& param, const Row<float>& grad, const float* old, const float* factors) {
    const Averages::Directions now = averages(grad, old, factors);
    const Row<float> offset = load_row(old + 2 * LANES), slope = clamp(grad, -most, most);
    const Row<float> way = clamp(averages.origins(param, old, factors) - param, -most, most);
    return std::array<Row<float>, 8>{param * param,  now.a * now.g, now.a * now.a, offset * offset,
                                     offset * now.a, slope * way,   slope * slope, way * way};
  };
  return sums_of<8>(params, grads, maximize, averages, corrections, products);
}

inline void rnnprop_step(TensorList params, TensorList grads, bool maximize, TensorList h, TensorList h_scale,
                         TensorList c, TensorList c_low, TensorList c_scale, TensorList weights, double lr,
                         double weight_decay, TensorList momentum, TensorList square, const Tensor& statistics,
                         const Tensor& inputs, const Tensor& inputs_bias, const Tensor& readout, const Tensor& bias,
                         double momentum_decay, double square_decay, double eps, double output_scale) {
  const AdamMoments moments{pointers<float>(momentum), pointers<float>(square), momentum_decay, square_decay,
                            float(eps)};
  Step(params, grads, h, h_scale, c, c_low, c_scale, weights, maximize, lr, weight_decay)
      .run(RNNprop({Readout(inputs, inputs_bias), Readout(readout, bias), moments, statistics.const_data_ptr<float>(),
                    statistics.size(1), int(inputs.size(0)), float(output_scale)}));
}

inline void meta_lstm_step(TensorList params, TensorList grads, bool maximize, TensorList h, TensorList h_scale,
                           TensorList c, TensorList c_low, TensorList c_scale, TensorList weights, double lr,
                           double weight_decay, TensorList forget_state, TensorList input_state,
                           const Tensor& statistics, const Tensor& forget, const Tensor& forget_bias,
                           const Tensor& input, const Tensor& input_bias, double p, double gradient_divisor,
                           bool feed_back_gate) {
  Step(params, grads, h, h_scale, c, c_low, c_scale, weights, maximize, lr, weight_decay)
      .run(MetaLSTM{Readout(forget, forget_bias), Readout(input, input_bias), pointers<float>(forget_state),
                    pointers<float>(input_state), statistics.const_data_ptr<float>(), statistics.size(1), float(p),
                    float(gradient_divisor), feed_back_gate});
}

}  // namespace learnedopt
