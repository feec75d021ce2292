// The weights of a whole network, and the work on its coordinates shared among the threads.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "lstm.h"

namespace learnedopt {

using at::Tensor;
using TensorList = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

// Fewer tiles than this are not worth waking another thread for.
constexpr int64_t LEAST_TILES = 16;

template <class S>
int64_t number_of_tiles(int64_t n) {
  return (n + TILE<S> - 1) / TILE<S>;
}

template <class S>
int64_t number_of_threads(int64_t n) {
  return std::clamp<int64_t>(number_of_tiles<S>(n) / LEAST_TILES, 1, at::get_num_threads());
}

// Splits the tiles of n coordinates into chunks, one for each thread: f(chunk, first coordinate, end).
template <class S, class F>
void for_chunks(int64_t n, int64_t chunks, F&& f) {
  const int64_t tiles = number_of_tiles<S>(n);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      f(chunk, tiles * chunk / chunks * TILE<S>, std::min(n, tiles * (chunk + 1) / chunks * TILE<S>));
  });
}

template <class S>
struct Network {
  std::vector<Layer<S>> layers;

  // For each layer its input weights, recurrent weights and bias.
  Network(const TensorList& weights, bool backward) {
    for (size_t at = 0; at < weights.size(); at += 3) {
      const int inputs = weights[at].size(1), hidden = weights[at + 1].size(1);
      layers.emplace_back(weights[at].const_data_ptr<S>(), weights[at + 1].const_data_ptr<S>(),
                          weights[at + 2].const_data_ptr<S>(), inputs, hidden, backward);
    }
  }
  int depth() const { return layers.size(); }
  int hidden() const { return layers.empty() ? 0 : layers[0].hidden; }
  int most_rows() const { return layers.empty() ? 0 : std::max(layers[0].inputs, hidden()) + hidden(); }
};

inline TensorList contiguous(TensorList tensors) {
  for (Tensor& tensor : tensors) tensor = tensor.contiguous();
  return tensors;
}

inline Maybe contiguous(const Maybe& tensor) {
  return tensor ? Maybe(tensor->contiguous()) : tensor;
}

}  // namespace learnedopt
