// The differentiable step of the network, on arrays (rows, coordinates).
#pragma once

#include <torch/library.h>

#include "core/network.h"

namespace learnedopt {

// Copies rows of `count` coordinates between memory and a tile.
template <class S>
void copy_rows(Rows<const S> from, Rows<S> to, int rows, int64_t count) {
  for (int row = 0; row < rows; ++row) std::copy_n(from[row], count, to[row]);
}

template <class S>
void load_tile(Rows<const S> from, S* tile, int rows, int64_t count) {
  if (count < TILE<S>) return copy_rows<S>(from, {tile, TILE<S>}, rows, count);
  for (int row = 0; row < rows; ++row) store_row(tile + row * TILE<S>, load_row(from[row]));
}

// A tile of some rows: where they are if the tile is full, and otherwise in a buffer of a full tile's size.
template <class S>
class Window {
 public:
  explicit Window(int rows) : rows_(rows), buffer_(rows * TILE<S>) {}
  Rows<const S> read(Rows<const S> from, int64_t count) {
    if (count == TILE<S>) return from;
    copy_rows<S>(from, {buffer_.get(), TILE<S>}, rows_, count);
    return {buffer_.get(), TILE<S>};
  }
  Rows<S> write(Rows<S> to, int64_t count) const { return count == TILE<S> ? to : Rows<S>{buffer_.get(), TILE<S>}; }
  void flush(Rows<S> to, int64_t count) const {
    if (count < TILE<S>) copy_rows<S>({buffer_.get(), TILE<S>}, to, rows_, count);
  }

 private:
  int rows_;
  Buffer<S> buffer_;
};

// What the tile after this one will read.
template <class S>
Ahead ahead(Rows<const S> now) {
  return {now.p + TILE<S>, now.stride, TILE<S>};
}

template <class S>
void forward_all(const Tensor& x, const Tensor& h, const Tensor& c, const TensorList& weights, Tensor& h_out,
                 Tensor& c_out) {
  const Network<S> network(weights, false);
  const int64_t n = x.size(1);
  const int hidden = network.hidden();
  const S *xs = x.const_data_ptr<S>(), *hs = h.const_data_ptr<S>(), *cs = c.const_data_ptr<S>();
  S *hs_out = h_out.mutable_data_ptr<S>(), *cs_out = c_out.mutable_data_ptr<S>();
  for_chunks<S>(n, number_of_threads<S>(n), [&](int64_t, int64_t begin, int64_t end) {
    Buffer<S> even(network.most_rows() * TILE<S>), odd(network.most_rows() * TILE<S>);
    Window<S> old_cells(hidden), cells(hidden), hiddens(hidden);
    for (int64_t at = begin; at < end; at += TILE<S>) {
      const int64_t count = std::min<int64_t>(TILE<S>, end - at);
      S *in = even.get(), *next = odd.get();
      load_tile<S>({xs + at, n}, in, network.layers[0].inputs, count);
      for (int l = 0; l < network.depth(); ++l) {
        const Layer<S>& layer = network.layers[l];
        const int64_t first = int64_t(l) * hidden * n + at;
        load_tile<S>({hs + first, n}, in + layer.inputs * TILE<S>, hidden, count);
        const Rows<S> c_to{cs_out + first, n}, h_to{hs_out + first, n};
        forward_tile<S>(layer, in, old_cells.read({cs + first, n}, count), cells.write(c_to, count), next,
                        hiddens.write(h_to, count), ahead<S>({hs + first, n}), ahead<S>({cs + first, n}));
        cells.flush(c_to, count);
        hiddens.flush(h_to, count);
        std::swap(in, next);
      }
    }
  });
}

template <class S>
void backward_all(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& h_out, const TensorList& weights,
                  const Maybe& d_top, const Maybe& d_h, const Maybe& d_c, Maybe& dx, Tensor& dh, Tensor& dc,
                  TensorList& d_weights) {
  const Network<S> network(weights, true);
  const int64_t n = x.size(1);
  const int hidden = network.hidden();
  const S *xs = x.const_data_ptr<S>(), *hs = h.const_data_ptr<S>(), *cs = c.const_data_ptr<S>(),
          *outs = h_out.const_data_ptr<S>();
  S *dhs = dh.mutable_data_ptr<S>(), *dcs = dc.mutable_data_ptr<S>(), *dxs = dx ? dx->mutable_data_ptr<S>() : nullptr;
  const Buffer<S> zeros(TILE<S>);
  // What has no gradient reads the same zeros in every row of every tile.
  auto gradient = [&](const Maybe& tensor, int64_t first, int64_t at) -> Rows<const S> {
    if (!tensor) return {zeros.get(), 0};
    return {tensor->const_data_ptr<S>() + first * n + at, n};
  };
  const int64_t chunks = number_of_threads<S>(n);
  int64_t sums_size = 0;
  for (const Layer<S>& layer : network.layers) sums_size += 4 * hidden * layer.columns();
  std::vector<Buffer<S>> sums;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sums.emplace_back(sums_size);

  for_chunks<S>(n, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    const int most_columns = network.most_rows() + WIDTH<S>;
    // The rows after a layer's own are a one for the bias and zeros.
    std::vector<Buffer<S>> ins;
    for (const Layer<S>& layer : network.layers) {
      ins.emplace_back(layer.columns() * TILE<S>);
      std::fill_n(ins.back().get() + layer.rows() * TILE<S>, TILE<S>, S(1));
    }
    Buffer<S> in_t(most_columns * TILE<S>), d_gates(4 * hidden * TILE<S>), d_below(hidden * TILE<S>);
    Window<S> old_cells(hidden), d_hidden(hidden), d_above(hidden), d_cell(hidden), dc_window(hidden),
        dh_window(hidden), dx_window(network.layers[0].inputs);
    for (int64_t at = begin; at < end; at += TILE<S>) {
      const int64_t count = std::min<int64_t>(TILE<S>, end - at);
      S* sum = sums[chunk].get() + sums_size;
      for (int l = network.depth() - 1; l >= 0; --l) {
        const Layer<S>& layer = network.layers[l];
        S* in = ins[l].get();
        const bool top = l == network.depth() - 1;
        const int64_t first = int64_t(l) * hidden, start = first * n + at;
        const Rows<const S> below = l ? Rows<const S>{outs + start - hidden * n, n} : Rows<const S>{xs + at, n};
        load_tile<S>(below, in, layer.inputs, count);
        load_tile<S>({hs + start, n}, in + layer.inputs * TILE<S>, hidden, count);
        const Rows<const S> d_h_rows = gradient(d_h, first, at), d_c_rows = gradient(d_c, first, at),
                            d_top_rows = gradient(d_top, 0, at);
        const Rows<S> dc_to{dcs + start, n}, dh_to{dhs + start, n}, dx_to{dxs + at, n};
        const Rows<const S> above =
            top ? d_above.read(d_top_rows, count) : Rows<const S>{d_below.get(), TILE<S>};
        backward_gates<S>(layer, in, old_cells.read({cs + start, n}, count), d_hidden.read(d_h_rows, count),
                          above, d_cell.read(d_c_rows, count), d_gates.get(), dc_window.write(dc_to, count),
                          {ahead<S>({hs + start, n}), ahead<S>({cs + start, n}), ahead<S>(d_h_rows),
                           ahead<S>(d_c_rows), ahead<S>(top ? d_top_rows : Rows<const S>{outs + start, n})});
        dc_window.flush(dc_to, count);
        if (l)
          backward_rows<S>(layer.backward_inputs, layer.inputs, hidden, d_gates.get(), {d_below.get(), TILE<S>});
        else if (dxs) {
          backward_rows<S>(layer.backward_inputs, layer.inputs, hidden, d_gates.get(), dx_window.write(dx_to, count));
          dx_window.flush(dx_to, count);
        }
        backward_rows<S>(layer.backward_hidden, hidden, hidden, d_gates.get(), dh_window.write(dh_to, count));
        dh_window.flush(dh_to, count);
        const int columns = layer.columns();
        sum -= 4 * hidden * columns;
        transpose_tile(in, columns, in_t.get());
        backward_weights(4 * hidden, columns, d_gates.get(), in_t.get(), sum);
      }
    }
  });

  // In the order of the chunks, whichever thread came first.
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < sums_size; ++i) sums[0].get()[i] += sums[chunk].get()[i];
  const S* sum = sums[0].get();
  for (int l = 0; l < network.depth(); ++l) {
    const Layer<S>& layer = network.layers[l];
    S *input = d_weights[3 * l].mutable_data_ptr<S>(), *recurrent = d_weights[3 * l + 1].mutable_data_ptr<S>(),
      *bias = d_weights[3 * l + 2].mutable_data_ptr<S>();
    for (int u = 0; u < hidden; ++u)
      for (int gate = 0; gate < 4; ++gate, sum += layer.columns()) {
        const int row = gate * hidden + u;
        std::copy_n(sum, layer.inputs, input + row * layer.inputs);
        std::copy_n(sum + layer.inputs, hidden, recurrent + row * hidden);
        bias[row] = sum[layer.rows()];
      }
  }
}

template <class F>
void with_scalar(const Tensor& like, F&& f) {
  if (like.scalar_type() == at::kFloat)
    f(float{});
  else
    f(double{});
}

// The kernels trust every shape.
inline void check(const Tensor& x, const Tensor& h, const Tensor& c, const TensorList& weights) {
  const int64_t depth = weights.size() / 3;
  TORCH_CHECK(depth > 0 && weights.size() % 3 == 0, "expected three weights per layer, got ", weights.size());
  TORCH_CHECK(x.dim() == 2, "x must be (d, N), got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "x must be float32 or float64, got ",
              x.scalar_type());
  const int64_t hidden = weights[1].dim() == 2 ? weights[1].size(1) : 0;
  const std::vector<int64_t> state{depth, hidden, x.size(1)};
  TORCH_CHECK(h.sizes() == state && c.sizes() == state, "h and c must be ", at::IntArrayRef(state), ", got ", h.sizes(),
              " and ", c.sizes());
  for (int64_t l = 0; l < depth; ++l) {
    const std::vector<int64_t> input{4 * hidden, l ? hidden : x.size(0)}, recurrent{4 * hidden, hidden},
        bias{4 * hidden};
    TORCH_CHECK(weights[3 * l].sizes() == input && weights[3 * l + 1].sizes() == recurrent &&
                    weights[3 * l + 2].sizes() == bias,
                "the weights of layer ", l, " must be ", at::IntArrayRef(input), ", ", at::IntArrayRef(recurrent),
                " and ", at::IntArrayRef(bias));
  }
}

inline std::tuple<Tensor, Tensor> lstm_forward(const Tensor& x, const Tensor& h, const Tensor& c, TensorList weights) {
  check(x, h, c, weights);
  Tensor h_out = at::empty(h.sizes(), h.options()), c_out = at::empty(c.sizes(), c.options());
  with_scalar(x, [&](auto zero) {
    forward_all<decltype(zero)>(x.contiguous(), h.contiguous(), c.contiguous(), contiguous(weights), h_out, c_out);
  });
  return {h_out, c_out};
}

inline std::tuple<Maybe, Tensor, Tensor, TensorList> lstm_backward(
    const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& h_out, TensorList weights, const Maybe& d_top,
    const Maybe& d_h, const Maybe& d_c, bool needs_x) {
  check(x, h, c, weights);
  for (const Maybe& gradient : {d_h, d_c})
    TORCH_CHECK(!gradient || gradient->sizes() == h.sizes(), "a gradient does not have the shape of the state");
  TORCH_CHECK(!d_top || d_top->sizes() == h[0].sizes(), "a gradient does not have the shape of the output");
  TORCH_CHECK(h_out.is_contiguous() && h_out.sizes() == h.sizes(), "h_out must be what lstm_forward returned");
  auto empty_like = [](const Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); };
  Maybe dx = needs_x ? Maybe(empty_like(x)) : Maybe();
  Tensor dh = empty_like(h), dc = empty_like(c);
  TensorList d_weights;
  for (const Tensor& weight : weights) d_weights.push_back(empty_like(weight));
  with_scalar(x, [&](auto zero) {
    backward_all<decltype(zero)>(x.contiguous(), h.contiguous(), c.contiguous(), h_out, contiguous(weights),
                                 contiguous(d_top), contiguous(d_h), contiguous(d_c), dx, dh, dc, d_weights);
  });
  return {dx, dh, dc, d_weights};
}

}  // namespace learnedopt

TORCH_LIBRARY_FRAGMENT(learnedopt, library) {
  library.def("lstm_forward(Tensor x, Tensor h, Tensor c, Tensor[] weights) -> (Tensor, Tensor)");
  library.def(
      "lstm_backward(Tensor x, Tensor h, Tensor c, Tensor h_out, Tensor[] weights, Tensor? d_top, Tensor? d_h, "
      "Tensor? d_c, bool needs_x) -> (Tensor?, Tensor, Tensor, Tensor[])");
  library.impl("lstm_forward", torch::dispatch(c10::DispatchKey::CPU, learnedopt::lstm_forward));
  library.impl("lstm_backward", torch::dispatch(c10::DispatchKey::CPU, learnedopt::lstm_backward));
}
