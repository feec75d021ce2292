// The coordinate-wise LSTM on a tile of coordinates: forwards, and backwards with the activations computed again.
//
// Arrays are coordinates last: row k of an array of stride s begins at p + k * s. A tile is TILE coordinates of every
// row and stays in cache. Inside, the gates of a unit are neighbours: row 4 u + gate, gates in the order i, f, g, o.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "simd.h"

namespace learnedopt {

// Memory aligned to vectors, zero at first. A copy is as large, with zeros of its own.
template <class S>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), data_(static_cast<S*>(::operator new(size * sizeof(S) + 1, ALIGNMENT))) {
    std::fill_n(data_.get(), size, S(0));
  }
  Buffer(const Buffer& other) : Buffer(other.size_) {}
  Buffer(Buffer&&) = default;
  S* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  struct Delete {
    void operator()(S* p) const { ::operator delete(p, ALIGNMENT); }
  };
  int64_t size_;
  std::unique_ptr<S, Delete> data_;
};

// Rows of coordinates somewhere in memory.
template <class S>
struct Rows {
  S* p = nullptr;
  int64_t stride = 0;
  S* operator[](int64_t row) const { return p + row * stride; }
};

// What the next tile will read: some rows, `bytes` of each. They are fetched into cache a few at a time, between the
// products, as only so many can be on their way at once.
struct Ahead {
  const char* p = nullptr;
  int64_t stride = 0;  // in bytes
  int bytes = 0;

  Ahead() = default;
  template <class E>
  Ahead(const E* next, int64_t stride, int count)
      : p(reinterpret_cast<const char*>(next)), stride(stride * sizeof(E)), bytes(count * sizeof(E)) {}

  void fetch(int row) const {
    // From the end of the first line on: rows need not begin with a line, and its beginning came with the last tile.
    for (int byte = 63; byte < bytes + 63; byte += 64) __builtin_prefetch(p + row * stride + byte, 0, 2);
  }
};

// acc[r] += sum over k of a[k][r] * x[k], with a packed and x a tile of k_count rows.
template <class S, int R>
ALWAYS_INLINE void product(Row<S> (&acc)[R], const S* __restrict a, const S* __restrict x, int k_count) {
  for (int k = 0; k < k_count; ++k, a += R, x += TILE<S>) {
    const Row<S> row = load_row(x);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) FOR_COLUMNS acc[r].v[j] += a[r] * row.v[j];
  }
}

// Calls f with count as a compile-time constant, 1 <= count <= MAX.
template <int MAX, class F>
inline void with_constant(int count, F&& f) {
  if constexpr (MAX >= 1) {
    if (count == MAX)
      f(std::integral_constant<int, MAX>{});
    else
      with_constant<MAX - 1>(count, std::forward<F>(f));
  }
}

// Calls f(start, size) for count rows in the fewest pieces of at most ROWS, as even as can be.
template <class F>
inline void in_pieces(int count, F&& f) {
  const int pieces = (count + ROWS - 1) / ROWS;
  for (int piece = 0, start = 0; piece < pieces; ++piece) {
    const int size = count / pieces + (piece < count % pieces);
    with_constant<ROWS>(size, [&](auto constant) { f(start, constant); });
    start += size;
  }
}

// Calls f(unit, number) for all units, UNITS at a time.
template <class F>
inline void in_units(int hidden, F&& f) {
  int unit = 0;
  for (; unit + UNITS <= hidden; unit += UNITS) f(unit, std::integral_constant<int, UNITS>{});
  for (; unit < hidden; ++unit) f(unit, std::integral_constant<int, 1>{});
}

// One layer's weights in the order in which the kernels read them.
template <class S>
struct Layer {
  int inputs, hidden;
  std::vector<S> forward;           // for units in groups: [inputs + hidden + bias][4 * group], scaled for activate()
  std::vector<S> backward_inputs;   // transposed, for rows in pieces: [4 * hidden][piece]
  std::vector<S> backward_hidden;

  int rows() const { return inputs + hidden; }
  // Columns of the weights' gradient: those of the rows, then the bias', rounded up to whole vectors.
  int columns() const { return (rows() + WIDTH<S>) / WIDTH<S> * WIDTH<S>; }

  // input (4 hidden, inputs), recurrent (4 hidden, hidden) and bias (4 hidden), gate by gate.
  Layer(const S* input, const S* recurrent, const S* bias, int inputs, int hidden, bool backward)
      : inputs(inputs), hidden(hidden), forward(4 * hidden * (rows() + 1)) {
    auto weight = [&](int row, int k) {
      return k < inputs            ? input[row * inputs + k]
             : k < inputs + hidden ? recurrent[row * hidden + k - inputs]
                                   : bias[row];
    };
    S* out = forward.data();
    in_units(hidden, [&](int unit, auto group) {
      for (int k = 0; k <= rows(); ++k)
        for (int u = unit; u < unit + group; ++u)
          for (int gate = 0; gate < 4; ++gate)
            *out++ = weight(gate * hidden + u, k) * (gate == 2 ? TANH_SCALE<S> : SIGMOID_SCALE<S>);
    });
    auto transpose = [&](int first, int count) {
      std::vector<S> result;
      in_pieces(count, [&](int start, auto size) {
        for (int u = 0; u < hidden; ++u)
          for (int gate = 0; gate < 4; ++gate)
            for (int k = first + start; k < first + start + size; ++k) result.push_back(weight(gate * hidden + u, k));
      });
      return result;
    };
    if (backward) {
      backward_inputs = transpose(0, inputs);
      backward_hidden = transpose(inputs, hidden);
    }
  }

  const S* panel(int unit) const { return forward.data() + 4 * unit * (rows() + 1); }
};

// The pre-activations of some units, from a tile of inputs and hidden states.
template <class S, int U>
ALWAYS_INLINE void preactivations(Row<S> (&acc)[4 * U], const Layer<S>& layer, int unit, const S* in) {
  const S* panel = layer.panel(unit);
  const S* bias = panel + layer.rows() * 4 * U;
  for (int r = 0; r < 4 * U; ++r) acc[r] = broadcast_row(bias[r]);
  product(acc, panel, in, layer.rows());
}

// One layer forwards. `in` is a tile: the inputs' rows, then the hidden state's. The new hidden state goes to `h_tile`
// and, where that has a place, to `h_out`; cells may be updated in place.
template <class S>
inline void forward_tile(const Layer<S>& layer, const S* in, Rows<const S> c, Rows<S> c_out, S* h_tile, Rows<S> h_out,
                         Ahead next_h, Ahead next_c) {
  in_units(layer.hidden, [&](int first, auto group) {
    constexpr int U = decltype(group)::value;
    for (int unit = first; unit < first + U; ++unit) {
      next_h.fetch(unit);
      next_c.fetch(unit);
    }
    Row<S> acc[4 * U];
    preactivations<S, U>(acc, layer, first, in);
    for (int u = 0; u < U; ++u) {
      const int unit = first + u;
      const Row<S>* gates = acc + 4 * u;
      Row<S> cell, hidden;
      activate(gates[0], gates[1], gates[2], gates[3], load_row(c[unit]), cell, hidden);
      store_row(c_out[unit], cell);
      store_row(h_tile + unit * TILE<S>, hidden);
      if (h_out.p) store_row(h_out[unit], hidden);
    }
  });
}

// The gradients of a layer's pre-activations, to `d_gates` (4 hidden rows of a tile), and of its old cells. The new
// hidden state's gradient is the sum of `d_hidden` and `d_above`.
template <class S>
inline void backward_gates(const Layer<S>& layer, const S* in, Rows<const S> c, Rows<const S> d_hidden,
                           Rows<const S> d_above, Rows<const S> d_cell, S* d_gates, Rows<S> d_cell_out,
                           const std::array<Ahead, 5>& next) {
  in_units(layer.hidden, [&](int first, auto group) {
    constexpr int U = decltype(group)::value;
    for (int unit = first; unit < first + U; ++unit)
      for (const Ahead& rows : next) rows.fetch(unit);
    Row<S> acc[4 * U];
    preactivations<S, U>(acc, layer, first, in);
    for (int u = 0; u < U; ++u) {
      const int unit = first + u;
      const Row<S>* gates = acc + 4 * u;
      const Row<S> old = load_row(c[unit]);
      const Dual<S> i = sigmoid(gates[0]), f = sigmoid(gates[1]), g = tanh(gates[2]), o = sigmoid(gates[3]);
      const Dual<S> top = tanh((f.value * old + i.value * g.value) * TANH_SCALE<S>);
      const Row<S> dh = load_row(d_hidden[unit]) + load_row(d_above[unit]);
      const Row<S> dc = load_row(d_cell[unit]) + dh * o.value * top.slope;
      S* out = d_gates + 4 * unit * TILE<S>;
      store_row(out, dc * g.value * i.slope);
      store_row(out + TILE<S>, dc * old * f.slope);
      store_row(out + 2 * TILE<S>, dc * i.value * g.slope);
      store_row(out + 3 * TILE<S>, dh * top.value * o.slope);
      store_row(d_cell_out[unit], dc * f.value);
    }
  });
}

// out[k] = sum over rows r of weights[r][k] * d_gates[r], for `count` rows k.
template <class S>
inline void backward_rows(const std::vector<S>& transposed, int count, int hidden, const S* d_gates, Rows<S> out) {
  in_pieces(count, [&](int start, auto size) {
    constexpr int R = decltype(size)::value;
    Row<S> acc[R] = {};
    product(acc, transposed.data() + start * 4 * hidden, d_gates, 4 * hidden);
    for (int r = 0; r < R; ++r) store_row(out[start + r], acc[r]);
  });
}

// The transpose of a tile of `columns` rows, whole vectors of them.
template <class S>
inline void transpose_tile(const S* in, int columns, S* out) {
  for (int k = 0; k < columns; k += WIDTH<S>)
    for (int j = 0; j < COLS; ++j) {
      Vec<S> square[WIDTH<S>];
      for (int i = 0; i < WIDTH<S>; ++i) square[i] = load(in + (k + i) * TILE<S> + j * WIDTH<S>);
      transpose<S>(square);
      for (int i = 0; i < WIDTH<S>; ++i) store(out + (j * WIDTH<S> + i) * columns + k, square[i]);
    }
}

// d_weights[r][:] += sum over the tile's coordinates t of d_gates[r][t] * in_t[t][:].
template <class S>
inline void backward_weights(int rows, int columns, const S* d_gates, const S* in_t, S* d_weights) {
  for (int first = 0; first < columns; first += COLS * WIDTH<S>) {
    const int vectors = std::min(COLS, (columns - first) / WIDTH<S>);
    with_constant<COLS>(vectors, [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      for (int row = 0; row < rows; row += 4 * UNITS) {
        const int left = std::min(rows - row, 4 * UNITS) / 4;
        with_constant<UNITS>(left, [&](auto units) {
          constexpr int R = 4 * decltype(units)::value;
          Vec<S> acc[R][V] = {};
          for (int t = 0; t < TILE<S>; ++t) {
            Vec<S> column[V];
            for (int v = 0; v < V; ++v) column[v] = load(in_t + t * columns + first + v * WIDTH<S>);
            for (int r = 0; r < R; ++r)
              for (int v = 0; v < V; ++v) acc[r][v] += d_gates[(row + r) * TILE<S> + t] * column[v];
          }
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) {
              S* out = d_weights + (row + r) * columns + first + v * WIDTH<S>;
              store(out, load(out) + acc[r][v]);
            }
        });
      }
    });
  }
}

}  // namespace learnedopt
