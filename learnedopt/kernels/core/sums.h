// Sums over tensors of what a rule takes the means of.
#pragma once

#include "step.h"

namespace learnedopt {

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

// Sums over each tensor: (COUNT, tensors) in float64, so that their order hardly matters. `Terms` is made from what is
// Given, reads ROWS rows of state, and makes COUNT terms of a tile's parameters, gradients in the coordinates that a rule
// works in and in the tensors' own, state and corrections.
template <class Terms>
Tensor sums(const TensorList& params, const TensorList& grads, const TensorList& own_grads, const Given& given,
            bool maximize) {
  constexpr int K = Terms::COUNT, STATE = 3, FACTORS = STATE + Terms::ROWS;
  const Terms terms(given);
  const Statistics corrections(given);
  const Numbers values(params), gradients(grads), own(own_grads.empty() ? grads : own_grads);
  const Layout layout(sizes_of(params));
  const int64_t tensors = params.size(), chunks = number_of_threads<float>(layout.total());
  const int factors = given.statistics.size(0), found_at = FACTORS + factors;
  std::vector<std::vector<double>> sums(chunks, std::vector<double>(K * tensors));
  for_chunks<float>(layout.total(), chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    Pieces pieces;
    Buffer<float> rows((found_at + K) * LANES);
    auto row = [&](int k) { return rows.get() + k * LANES; };
    for (int64_t at = begin; at < end; at += LANES) {
      layout.pieces(at, pieces);
      values.read(pieces, row(0));
      gradients.read(pieces, row(1));
      if (!own_grads.empty()) own.read(pieces, row(2));
      terms.read(pieces, row(STATE));
      corrections.expand(0, factors, pieces, row(FACTORS));
      const Row<float> grad = load_row(row(1)), own_grad = own_grads.empty() ? grad : load_row(row(2));
      const std::array<Row<float>, K> found = terms(load_row(row(0)), maximize ? -grad : grad,
                                                    maximize ? -own_grad : own_grad, row(STATE), row(FACTORS));
      for (int k = 0; k < K; ++k) store_row(row(found_at + k), found[k]);
      for (const Piece& piece : pieces)
        for (int k = 0; k < K; ++k)
          sums[chunk][k * tensors + piece.tensor] += sum(row(found_at + k) + piece.lane, piece.count);
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

// The operator `name`_sums.
template <class Terms>
void define_sums(torch::Library& library, const std::string& name) {
  library.def((name +
               "_sums(Tensor[] params, Tensor[] grads, Tensor[] own_grads, Tensor[] state, str[] names, "
               "Tensor corrections, float[] settings, bool maximize) -> Tensor").c_str());
  library.impl((name + "_sums").c_str(),
               torch::dispatch(c10::DispatchKey::CPU,
                               +[](TensorList params, TensorList grads, TensorList own_grads, TensorList state,
                                   std::vector<std::string> names, const Tensor& corrections,
                                   std::vector<double> settings, bool maximize) {
                                 const Given given{state, names, params.size(), {}, corrections, settings};
                                 return sums<Terms>(params, grads, own_grads, given, maximize);
                               }));
}

}  // namespace learnedopt
