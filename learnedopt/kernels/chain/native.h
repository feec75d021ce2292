// ChainRule of InEigenbases, or none, of NormalizedGradientRule, and LawsRule: a whole step of many tensors in one call.
//
// A tensor is a matrix (rows, columns), its sides cut into blocks with bases. A tile is a block of one side by a block
// of the other: gradients are taken to its bases, normalized, and taken back without looking at any other tile. Small
// tensors are spread over threads; a large one is worked on by all.
#pragma once

#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/simd.h"
#include "products.h"

namespace learnedopt::chain {

using at::Tensor;
using TensorList = std::vector<Tensor>;

constexpr float TINY = std::numeric_limits<float>::min();
constexpr int64_t LARGE = 1 << 16;   // coordinates from which all threads work on one tensor
constexpr int64_t CHUNK = 1 << 14;   // coordinates of a partial sum: whatever the number of threads
constexpr int64_t STRETCH = 1 << 9;  // of a side without bases, rows or columns of a tile
constexpr double SMALLEST = 1e-26, LARGEST = 1e18;  // mean squares of what can be squared and multiplied as it is

// The blocks of a side, and each one's factor and basis; a side without has none.
struct Side {
  int count = 0, length = 0;
  float *factor = nullptr, *basis = nullptr;
  Tensor factors, bases;
  explicit operator bool() const { return count > 0; }
  const float* basis_of(int block) const { return basis + int64_t(block) * length * length; }
  float* factor_of(int block) const { return factor + int64_t(block) * length * length; }
};

// One of a tensor's numbers that all of its coordinates share: (slope, steepness, distance) and so on.
enum Scalar { STEPS, SMALLNESS, PEAK, SLOPE, STEEPNESS, DISTANCE, NUM_SCALARS };

struct Item {
  float *param, *square, *offset;
  const float *grad, *origin;
  float* scalars[NUM_SCALARS];
  int64_t size;
  int rows = 0, columns = 0;
  Side left, right;
  int64_t* age = nullptr;
};

// What the laws make of a step.
struct Moves {
  float correction, floor, threshold, from_offset, from_direction, step, kept;
};

struct Sums {
  double slope_way = 0, slope_square = 0, way_square = 0, param_square = 0;
  void operator+=(const Sums& other) {
    slope_way += other.slope_way;
    slope_square += other.slope_square;
    way_square += other.way_square;
    param_square += other.param_square;
  }
};

// Memory that a thread keeps from step to step.
inline float* scratch(int which, int64_t size) {
  static thread_local std::vector<float> rooms[4];
  if (int64_t(rooms[which].size()) < size) rooms[which].resize(size);
  return rooms[which].data();
}

// f(begin, end) of stretches of n, by all threads if they are worth it.
template <class F>
void spread(int64_t n, bool threads, F&& f) {
  if (threads && n >= 2 * CHUNK && !at::in_parallel_region())
    at::parallel_for(0, n, CHUNK, f);
  else
    f(0, n);
}

class Step {
 public:
  Step(const Settings& settings, const Tensor& weights, double lr, double weight_decay, int64_t together)
      : s(settings), laws(weights.const_data_ptr<float>()), lr(lr), decay(1.0 - lr * weight_decay), together(together) {}

  // False where gradients cannot be used as they are: nothing has changed.
  bool run(const Item& item, bool threads) const {
    const Sums sums = sums_of(item, threads);
    if (!in_range(item, sums)) return false;
    const Moves moves = moves_of(item, sums);
    if (!item.left && !item.right)
      spread(item.size, threads, [&](int64_t begin, int64_t end) { move_plain(item, moves, begin, end); });
    else if (follow(item, sums))
      move_in_bases(item, moves, threads);
    else  // no gradient yet
      spread(item.size, threads, [&](int64_t begin, int64_t end) { decay_square(item, moves, begin, end); });
    return true;
  }

 private:
  // Whether squares of gradients are finite, and lose nothing that counts by being small.
  static bool in_range(const Item& item, const Sums& sums) {
    const double count = std::max<int64_t>(item.size, 1), mean = sums.slope_square / count;
    if (!(sums.way_square <= LARGEST * count)) return false;
    return (mean >= SMALLEST && mean <= LARGEST) ||
           (mean == 0 && std::all_of(item.grad, item.grad + item.size, [](float g) { return g == 0; }));
  }

  Sums sums_of(const Item& item, bool threads) const {
    const bool first = *item.scalars[STEPS] == 0;
    std::vector<Sums> parts(std::max<int64_t>(1, (item.size + CHUNK - 1) / CHUNK));
    auto part = [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at += CHUNK)
        parts[at / CHUNK] = sums_of(item, at, std::min(at + CHUNK, end), first);
    };
    if (threads && parts.size() > 1 && !at::in_parallel_region())
      at::parallel_for(0, parts.size(), 1, [&](int64_t b, int64_t e) { part(b * CHUNK, std::min(e * CHUNK, item.size)); });
    else
      part(0, item.size);
    Sums all;
    for (const Sums& p : parts) all += p;
    return all;
  }

  static Sums sums_of(const Item& item, int64_t begin, int64_t end, bool first) {
    const float *g = item.grad, *p = item.param, *o = item.origin;
    Sums sums;
    for (int64_t at = begin; at < end; at += 2048) {  // few enough for float32
      const int64_t stop = std::min(at + 2048, end);
      float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c)
      for (int64_t i = at; i < stop; ++i) {
        const float way = o[i] - p[i];
        a += g[i] * way;
        b += g[i] * g[i];
        c += way * way;
      }
      if (first) {
#pragma omp simd reduction(+ : d)
        for (int64_t i = at; i < stop; ++i) d += p[i] * p[i];
      }
      sums.slope_way += a;
      sums.slope_square += b;
      sums.way_square += c;
      sums.param_square += d;
    }
    if (first) sums.slope_way = sums.way_square = 0;
    return sums;
  }

  double place(double step) const {
    return (1 - s.interpolation) * std::pow(s.settling_time / std::max(step, s.settling_time), s.settling_power);
  }

  static double bounded(double x, double bound) { return bound * std::tanh(x / bound); }

  // Advances a tensor's numbers.
  Moves moves_of(const Item& item, const Sums& sums) const {
    const double count = std::max<int64_t>(item.size, 1), before = *item.scalars[STEPS], step = before + 1;
    auto average = [&](Scalar which, double mean) {
      return *item.scalars[which] = float(s.way_decay * *item.scalars[which] + (1 - s.way_decay) * mean);
    };
    const double slope = average(SLOPE, sums.slope_way / count);
    const double steepness = average(STEEPNESS, sums.slope_square / count);
    const double distance = average(DISTANCE, sums.way_square / count);
    const double correlation = slope / std::sqrt(std::max(steepness, 1e-30)) / std::sqrt(std::max(distance, 1e-30));
    if (before == 0) {
      const double square = sums.param_square / count;
      const double small = std::log(std::max(square, 1e-30)) / 2 - std::log(s.usual_scale);
      *item.scalars[SMALLNESS] = square > 0 ? float(std::clamp(small, -7.0, 0.0)) : 0.0f;
    }
    *item.scalars[STEPS] = float(step);
    double features[NUM_LAWS];
    features[ONE] = 1;
    features[LOG_TIME] = std::log(std::min(step, s.max_time));
    features[WAY] = std::tanh(s.way_gain * correlation);
    features[LOG_TOGETHER] = std::log(double(std::max<int64_t>(together, 1)));
    features[LOG_SMALLNESS] = *item.scalars[SMALLNESS];
    features[BEGINNING] = std::exp((1 - step) / s.warmup);
    const double log_step = std::inner_product(features, features + NUM_LAWS, laws, 0.0);
    const double sigma = s.nominal_step * std::exp(bounded(log_step, s.log_step_bound));
    const double nominal = (s.averaging_power + 1) / (step + s.averaging_power);
    const double weight = std::min(1.0, nominal * std::exp(bounded(laws[NUM_LAWS], s.log_averaging_bound)));
    const double taken = weight + place(step) * (1 - weight);
    Moves moves;
    moves.correction = s.square_decay ? -1 / std::expm1(step * std::log(s.square_decay)) : 1;
    moves.floor = s.relative_eps * s.relative_eps * sums.slope_square / count;
    moves.threshold = s.threshold * std::sqrt(sums.slope_square);
    const double peak = *item.scalars[PEAK] = std::max(*item.scalars[PEAK], float(lr));
    const double counted = lr ? peak * std::pow(lr / peak, s.schedule_power) : 0;
    moves.from_offset = lr ? (taken - place(before)) / lr : 0;
    moves.from_direction = lr ? taken * sigma * counted / lr : 0;
    moves.step = sigma * counted;
    moves.kept = lr ? 1 - weight : 1;
    return moves;
  }

  // What loops over coordinates read, in one place that nothing they write can be.
  struct Numbers {
    float square_decay, square_rest, floor, correction, eps, threshold, from_offset, from_direction, step, kept, lr, decay;
  };

  Numbers numbers(const Moves& m) const {
    return {float(s.square_decay), float(1 - s.square_decay), m.floor, m.correction, float(s.eps), m.threshold,
            m.from_offset, m.from_direction, m.step, m.kept, float(lr), float(decay)};
  }

  template <bool FLOOR>
  static float normalized(float g, float& square, const Numbers& m) {
    if (FLOOR) {
      const float large = g * g, least = large + m.floor;
      g *= large / (least < TINY ? TINY : least);
    }
    square = m.square_decay * square + m.square_rest * (g * g + m.floor);
    const float mean = square * m.correction;
    return g / (std::sqrt(mean < TINY ? TINY : mean) + m.eps);
  }

  static void move(float& param, float& offset, float direction, const Numbers& m) {
    const float delta = m.from_offset * offset - m.from_direction * direction;
    offset = m.kept * (offset - m.step * direction);
    param = param * m.decay + m.lr * delta;
  }

  void move_plain(const Item& item, const Moves& moves, int64_t begin, int64_t end) const {
    moves.floor > 0 ? move_plain<true>(item, numbers(moves), begin, end)
                    : move_plain<false>(item, numbers(moves), begin, end);
  }

  template <bool FLOOR>
  static void move_plain(const Item& item, const Numbers m, int64_t begin, int64_t end) {
    float *__restrict param = item.param, *__restrict offset = item.offset, *__restrict square = item.square;
    const float* __restrict grad = item.grad;
    if (m.lr == 0) {
      for (int64_t i = begin; i < end; ++i) normalized<FLOOR>(grad[i], square[i], m);
      return;
    }
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      float p = param[i], o = offset[i], v = square[i];
      move(p, o, normalized<FLOOR>(grad[i], v, m), m);
      param[i] = p;
      offset[i] = o;
      square[i] = v;
    }
  }

  // Of a tensor that has had no gradient yet.
  void decay_square(const Item& item, const Moves& moves, int64_t begin, int64_t end) const {
    const Numbers m = numbers(moves);
    for (int64_t i = begin; i < end; ++i) {
      const float direction = normalized<false>(0.0f, item.square[i], m);
      if (m.lr != 0) move(item.param[i], item.offset[i], direction, m);
    }
  }

  // Lets bases follow a gradient; false if there has been none.
  bool follow(const Item& item, const Sums& sums) const {
    if (*item.age == 0 && sums.slope_square == 0) return false;
    const int64_t age = ++*item.age;
    const bool due = age <= s.settling || age % int64_t(s.interval) == 0;
    if (age <= s.settling || age % int64_t(s.factor_interval) == 0) {
      const double decay = age <= s.settling ? s.factor_decay : std::pow(s.factor_decay, s.factor_interval);
      take_in(item, decay, sums.slope_square > 0 ? (1 - decay) / sums.slope_square : 0);
    }
    if (due) {
      turn(item, item.left, true, age);
      turn(item, item.right, false, age);
    }
    return true;
  }

  // Averages a gradient into the factors.
  void take_in(const Item& item, double decay, double share) const {
    const int rows = item.rows, columns = item.columns;
    for (int block = 0; block < item.left.count; ++block) {
      const int k = item.left.length;
      outer(false, k, columns, share, item.grad + int64_t(block) * k * columns, columns, decay,
            item.left.factor_of(block));
    }
    for (int block = 0; block < item.right.count; ++block)
      outer(true, item.right.length, rows, share, item.grad + block * item.right.length, columns, decay,
            item.right.factor_of(block));
  }

  // Subspace iteration of a side's bases; second moments turn with them.
  void turn(const Item& item, const Side& side, bool left, int64_t age) const {
    if (!side) return;
    const int k = side.length, area = k * k;
    const Tensor before = side.bases.clone();
    for (int times = age == 1 ? 4 : 1; times; --times) {
      Tensor next = at::empty_like(side.bases);
      for (int block = 0; block < side.count; ++block)
        iterate(side.factor_of(block), side.basis_of(block), k, next.data_ptr<float>() + int64_t(block) * area);
      auto [q, r] = at::linalg_qr(next);
      const Tensor sign = at::where(r.diagonal(0, -2, -1) < 0, -1.0, 1.0).to(at::kFloat);
      at::mul_out(const_cast<Tensor&>(side.bases), q, sign.unsqueeze(-2));
    }
    if (age == 1) return;  // there are no second moments yet
    const Tensor turned = at::matmul(side.bases.mT(), before).square_();
    const float* by = turned.const_data_ptr<float>();
    const int rows = item.rows, columns = item.columns;
    if (left) {
      const int strip = std::max<int64_t>(1, std::min<int64_t>(columns, 4 * LARGE / k));
      float* old = scratch(0, int64_t(k) * strip);
      for (int block = 0; block < side.count; ++block)
        for (int first = 0; first < columns; first += strip) {
          const int width = std::min(strip, columns - first);
          float* here = item.square + int64_t(block) * k * columns + first;
          for (int row = 0; row < k; ++row) std::copy_n(here + int64_t(row) * columns, width, old + int64_t(row) * width);
          product(false, false, k, width, k, 1, by + int64_t(block) * area, k, old, width, 0, here, columns);
        }
    } else {
      const int strip = std::max<int64_t>(1, std::min<int64_t>(rows, LARGE / columns));
      float* old = scratch(0, int64_t(strip) * columns);
      for (int first = 0; first < rows; first += strip) {
        const int height = std::min(strip, rows - first);
        float* here = item.square + int64_t(first) * columns;
        std::copy_n(here, int64_t(height) * columns, old);
        for (int block = 0; block < side.count; ++block)
          product(false, true, height, k, k, 1, old + block * k, columns, by + int64_t(block) * area, k, 0,
                  here + block * k, columns);
      }
    }
  }

  // What QR makes the next basis of: (F + shift tr(F)) Q, the columns in the order of diag(Q^T F Q).
  void iterate(const float* factor, const float* basis, int k, float* next) const {
    float* taken = scratch(0, int64_t(k) * k);
    product(false, false, k, k, k, 1, factor, k, basis, k, 0, taken, k);
    std::vector<float> sizes(k);
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < k; ++j) sizes[j] += basis[i * k + j] * taken[i * k + j];
    std::vector<int> order(k);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return sizes[a] > sizes[b]; });
    double trace = 0;
    for (int i = 0; i < k; ++i) trace += factor[i * (k + 1)];
    const float shift = s.shift * trace;
    for (int i = 0; i < k; ++i)
      for (int j = 0; j < k; ++j) next[i * k + j] = taken[i * k + order[j]] + shift * basis[i * k + order[j]];
  }

  void move_in_bases(const Item& item, const Moves& moves, bool threads) const {
    const Side &left = item.left, &right = item.right;
    // A side without bases is cut so that a tile stays in a cache, or by nothing where it is short.
    const int height = left ? left.length : std::min<int64_t>(item.rows, std::max<int64_t>(STRETCH, LARGE / item.columns));
    const int width = right ? right.length : std::min<int64_t>(item.columns, std::max<int64_t>(STRETCH, LARGE / item.rows));
    const int down = (item.rows + height - 1) / height, across = (item.columns + width - 1) / width;
    auto tiles = [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int i = tile / across, j = tile % across;
        const int first_row = i * height, first_column = j * width;
        move_tile(item, moves, i, j, first_row, std::min(height, item.rows - first_row), first_column,
                  std::min(width, item.columns - first_column));
      }
    };
    if (threads && down * across >= at::get_num_threads() && !at::in_parallel_region())
      at::parallel_for(0, int64_t(down) * across, 1, tiles);
    else
      tiles(0, int64_t(down) * across);
  }

  void move_tile(const Item& item, const Moves& moves, int i, int j, int first_row, int m, int first_column,
                 int n) const {
    const Side &left = item.left, &right = item.right;
    const int columns = item.columns;
    const int64_t first = int64_t(first_row) * columns + first_column, area = int64_t(m) * n;
    float *x = scratch(1, area), *y = scratch(2, area);
    const float* grad = item.grad + first;
    if (left && right) {
      product(true, false, m, n, m, 1, left.basis_of(i), m, grad, columns, 0, y, n);
      product(false, false, m, n, n, 1, y, n, right.basis_of(j), n, 0, x, n);
    } else if (left) {
      product(true, false, m, n, m, 1, left.basis_of(i), m, grad, columns, 0, x, n);
    } else {
      product(false, false, m, n, n, 1, grad, columns, right.basis_of(j), n, 0, x, n);
    }
    for (int row = 0; row < m; ++row) normalize(x + int64_t(row) * n, item.square + first + int64_t(row) * columns, n, moves);
    if (lr == 0) return;
    if (left && right) {
      product(false, true, m, n, n, 1, x, n, right.basis_of(j), n, 0, y, n);
      product(false, false, m, n, m, 1, left.basis_of(i), m, y, n, 0, x, n);
    } else if (left) {
      product(false, false, m, n, m, 1, left.basis_of(i), m, x, n, 0, y, n);
      std::swap(x, y);
    } else {
      product(false, true, m, n, n, 1, x, n, right.basis_of(j), n, 0, y, n);
      std::swap(x, y);
    }
    // Rows and columns that have had no gradient stay, whatever the rounding.
    if (right)
      for (int column = 0; column < n; ++column)
        if (right.factor_of(j)[int64_t(column) * (n + 1)] == 0)
          for (int row = 0; row < m; ++row) x[int64_t(row) * n + column] = 0;
    for (int row = 0; row < m; ++row) {
      float* directions = x + int64_t(row) * n;
      if (left && left.factor_of(i)[int64_t(row) * (m + 1)] == 0) std::fill_n(directions, n, 0.0f);
      move_row(item, moves, first + int64_t(row) * columns, directions, n);
    }
  }

  void normalize(float* x, float* square, int n, const Moves& moves) const {
    moves.floor > 0 ? normalize<true>(x, square, n, numbers(moves)) : normalize<false>(x, square, n, numbers(moves));
  }

  template <bool FLOOR>
  static void normalize(float* __restrict x, float* __restrict square, int n, const Numbers m) {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
      float v = square[i];
      const float g = std::fabs(x[i]) <= m.threshold ? 0.0f : x[i];
      x[i] = normalized<FLOOR>(g, v, m);
      square[i] = v;
    }
  }

  void move_row(const Item& item, const Moves& moves, int64_t first, const float* __restrict directions, int n) const {
    float *__restrict param = item.param + first, *__restrict offset = item.offset + first;
    const Numbers m = numbers(moves);
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
      float p = param[i], o = offset[i];
      move(p, o, directions[i], m);
      param[i] = p;
      offset[i] = o;
    }
  }

  Settings s;
  const float* laws;
  double lr, decay;
  int64_t together;
};

// Sides are six numbers for each tensor: rows and columns, and of the left and the right how many blocks of what
// length, all zero where there are no bases. Own has age, and factor and basis of each side that has any.
inline std::vector<Item> items_of(const TensorList& params, const TensorList& grads, const TensorList& state,
                                  const TensorList& own, const std::vector<int64_t>& sides) {
  std::vector<Item> items(params.size());
  size_t next = 0;
  auto side = [&](int64_t count, int64_t length) {
    Side found;
    if (!count) return found;
    found.count = count;
    found.length = length;
    found.factors = own[next++];
    found.bases = own[next++];
    found.factor = found.factors.mutable_data_ptr<float>();
    found.basis = found.bases.mutable_data_ptr<float>();
    return found;
  };
  for (size_t i = 0; i < params.size(); ++i) {
    Item& item = items[i];
    const Tensor* entries = &state[i * (3 + NUM_SCALARS)];
    item.size = params[i].numel();
    item.param = params[i].mutable_data_ptr<float>();
    item.grad = grads[i].const_data_ptr<float>();
    item.square = entries[0].mutable_data_ptr<float>();
    item.offset = entries[1].mutable_data_ptr<float>();
    item.origin = entries[2].const_data_ptr<float>();
    for (int k = 0; k < NUM_SCALARS; ++k) item.scalars[k] = entries[3 + k].mutable_data_ptr<float>();
    const int64_t* shape = &sides[6 * i];
    if (!shape[2] && !shape[4]) continue;
    item.rows = shape[0];
    item.columns = shape[1];
    item.age = own[next++].mutable_data_ptr<int64_t>();
    item.left = side(shape[2], shape[3]);
    item.right = side(shape[4], shape[5]);
  }
  return items;
}

// Which tensors have not moved, because their gradients are out of range.
inline std::vector<int64_t> step(TensorList params, TensorList grads, TensorList state, TensorList own, std::vector<int64_t> sides,
                 const Tensor& weights, std::vector<double> settings, double lr, double weight_decay,
                 int64_t together) {
  const at::NoGradGuard guard;
  const std::vector<Item> items = items_of(params, grads, state, own, sides);
  std::vector<char> moved(items.size(), true);
  for (const Tensor& param : params)
    if (lr != 0 && !param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
  const Step step(Settings(settings), weights, lr, weight_decay, together);
  std::vector<int64_t> small;
  int64_t work = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].size >= LARGE || at::get_num_threads() == 1) {
      moved[i] = step.run(items[i], true);
    } else {
      small.push_back(i);
      work += items[i].size;
    }
  }
  // The largest first, so that no thread is left with one in the end.
  std::stable_sort(small.begin(), small.end(), [&](int64_t a, int64_t b) { return items[a].size > items[b].size; });
  std::atomic<size_t> next{0};
  auto some = [&](int64_t, int64_t) {
    const at::NoGradGuard inner;
    for (size_t k; (k = next.fetch_add(1)) < small.size();) step.run(items[small[k]], false);
  };
  if (work >= CHUNK)
    at::parallel_for(0, at::get_num_threads(), 1, some);
  else
    some(0, 1);
  std::vector<int64_t> left;
  for (size_t i = 0; i < moved.size(); ++i)
    if (!moved[i]) left.push_back(i);
  return left;
}

}  // namespace learnedopt::chain

TORCH_LIBRARY_FRAGMENT(learnedopt, library) {
  library.def(
      "chain_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, Tensor(c!)[] own, int[] sides, "
      "Tensor weights, float[] settings, float lr, float weight_decay, int together) -> int[]");
  library.impl("chain_step", torch::dispatch(c10::DispatchKey::CPU, learnedopt::chain::step));
}
