// What several rules compute on rows of a tile.
#pragma once

#include <limits>

#include "given.h"

namespace learnedopt {

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

// Within a bound, and near zero x itself.
ALWAYS_INLINE Row<float> bounded(const Row<float>& x, float bound) {
  return bound * tanh(x * (TANH_SCALE<float> / bound)).value;
}

ALWAYS_INLINE Row<float> exponential(const Row<float>& x) { return exp2_capped(x * 1.44269504f, 127.0f); }

// Adam's moments, and what two rules make of them and a gradient.
class AdamMoments {
 public:
  template <class Settings>
  AdamMoments(const Given& given, const Settings& settings)
      : momentum(given.numbers("momentum")),
        square(given.numbers("square")),
        momentum_decay(settings.momentum_decay),
        square_decay(settings.square_decay),
        eps(settings.eps) {}

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

  // The old moments, to two rows.
  void read(const Pieces& pieces, float* old) const {
    read_row(momentum, pieces, old);
    read_row(square, pieces, old + LANES);
  }

  // Writes the new moments, by way of two rows.
  void write(const Directions& now, const Pieces& pieces, float* rows) const {
    store_row(rows, now.momentum);
    store_row(rows + LANES, now.square);
    write_row(rows, pieces, momentum);
    write_row(rows + LANES, pieces, square);
  }

 private:
  std::vector<float*> momentum, square;
  double momentum_decay, square_decay;
  float eps;
};

}  // namespace learnedopt
