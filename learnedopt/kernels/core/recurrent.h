// The LSTM of a rule that has one, between its features and its update: layers, and the state of all tensors.
#pragma once

#include "given.h"

namespace learnedopt {

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

class Recurrent {
 public:
  // Without weights it has no layers, and there need be no state.
  Recurrent(const Given& given, const TensorList& weights, const TensorList& params)
      : network(weights, false),
        h(memory(given.entry("h"), {}, given.entry("h_scale"), params, network.depth(), network.hidden())),
        c(memory(given.entry("c"), given.entry("c_low"), given.entry("c_scale"), params, network.depth(),
                 network.hidden())) {}

  // What a thread needs.
  struct Scratch {
    explicit Scratch(const Recurrent& recurrent)
        : in(recurrent.network.most_rows() * LANES),
          next(recurrent.network.most_rows() * LANES),
          cells(recurrent.network.hidden() * LANES),
          memory(recurrent.network.hidden()) {}
    Buffer<float> in, next, cells;
    Memory::Scratch memory;
  };

  // Advances the state of a tile, from the features in `scratch.in`; the top layer.
  const float* run(const Pieces& pieces, const Scratch& scratch) const {
    float *in = scratch.in.get(), *next = scratch.next.get(), *cells = scratch.cells.get();
    for (int l = 0; l < network.depth(); ++l) {
      const Layer<float>& layer = network.layers[l];
      h.read(pieces, l, in + layer.inputs * LANES, scratch.memory);
      c.read(pieces, l, cells, scratch.memory);
      forward_tile<float>(layer, in, {cells, LANES}, {cells, LANES}, next, {}, h.ahead(pieces, l), c.ahead(pieces, l));
      c.write(cells, pieces, l, scratch.memory);
      h.write(next, pieces, l, scratch.memory);
      std::swap(in, next);
    }
    return in;
  }

 private:
  Network<float> network;
  Memory h, c;
};

}  // namespace learnedopt
