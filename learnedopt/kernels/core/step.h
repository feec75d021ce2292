// One step of a rule, in place, on many tensors: state, parameters and gradients are read and written once.
#pragma once

#include <torch/library.h>

#include <atomic>

#include "maths.h"
#include "recurrent.h"

namespace learnedopt {

// The coordinates' numbers in one tile.
struct Tile {
  Pieces pieces;
  Buffer<float> param{LANES}, grad{LANES}, delta{LANES};
};

// What all rules have in common. A rule is a class that is made from what is Given.
class Step {
 public:
  Step(const TensorList& params, const TensorList& grads, const Given& given, const TensorList& network, double lr,
       double weight_decay, bool maximize)
      : params(params),
        grads(grads),
        layout(sizes_of(params)),
        recurrent(given, network, params),
        maximize(maximize),
        lr(lr),
        decay(1.0 - lr * weight_decay) {
    // So that autograd notices a graph whose parameters have changed.
    for (const Tensor& param : params)
      if (lr != 0.0 && !param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
  }

  // A rule's `features` fills the rows of the first layer's inputs, and its `update` the tile's delta, given the top
  // layer. Each thread has a copy of its own, and takes the next few tiles whenever it has done some.
  template <class Rule>
  void run(const Rule& shared) const {
    constexpr int64_t COORDINATES = LEAST_TILES * LANES;
    const int64_t total = layout.total(), threads = number_of_threads<float>(total);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      Rule rule(shared);
      Tile tile;
      Recurrent::Scratch scratch(recurrent);
      for (int64_t first; (first = next.fetch_add(COORDINATES)) < total;)
        for (int64_t at = first; at < std::min(first + COORDINATES, total); at += LANES)
          run_tile(rule, at, tile, scratch);
    });
  }

 private:
  template <class Rule>
  void run_tile(Rule& rule, int64_t at, Tile& tile, const Recurrent::Scratch& scratch) const {
    layout.pieces(at, tile.pieces);
    params.read(tile.pieces, tile.param.get());
    grads.read(tile.pieces, tile.grad.get());
    if (maximize) store_row(tile.grad.get(), -load_row(tile.grad.get()));
    rule.features(tile, scratch.in.get());
    rule.update(tile, recurrent.run(tile.pieces, scratch));
    if (lr == 0.0f) return;
    float* param = tile.param.get();
    store_row(param, load_row(param) * decay + lr * load_row(tile.delta.get()));
    params.write(param, tile.pieces);
  }

  Numbers params, grads;
  Layout layout;
  Recurrent recurrent;
  bool maximize;
  float lr, decay;
};

// The operator `name`_step, by a rule.
template <class Rule>
void define_step(torch::Library& library, const std::string& name) {
  library.def((name +
               "_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, str[] names, Tensor[] network, "
               "Tensor[] weights, Tensor statistics, float[] settings, float lr, float weight_decay, bool maximize) "
               "-> ()").c_str());
  library.impl((name + "_step").c_str(),
               torch::dispatch(c10::DispatchKey::CPU,
                               +[](TensorList params, TensorList grads, TensorList state,
                                   std::vector<std::string> names, TensorList network, TensorList weights,
                                   const Tensor& statistics, std::vector<double> settings, double lr,
                                   double weight_decay, bool maximize) {
                                 const Given given{state, names, params.size(), weights, statistics, settings};
                                 Step(params, grads, given, network, lr, weight_decay, maximize).run(Rule(given));
                               }));
}

}  // namespace learnedopt
