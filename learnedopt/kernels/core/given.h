// What operators are given: tensors, and a rule's state, weights and settings by name.
#pragma once

#include <string>

#include "memory.h"
#include "network.h"

namespace learnedopt {

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

// What an operator is given of a rule.
struct Given {
  TensorList state;                // all tensors' of the first entry, then of the second, ...
  std::vector<std::string> names;  // of those entries
  size_t count;                    // how many tensors there are
  TensorList weights;
  Tensor statistics;  // (rows, tensors), or what of it there is before a step
  std::vector<double> settings;

  // An entry of the state, of all tensors; none if it is not there.
  TensorList entry(const char* name) const {
    for (size_t i = 0; i < names.size(); ++i)
      if (names[i] == name) return {state.begin() + i * count, state.begin() + (i + 1) * count};
    return {};
  }
  // Where an entry of one number per coordinate is.
  std::vector<float*> numbers(const char* name) const {
    std::vector<float*> result;
    for (const Tensor& tensor : entry(name)) result.push_back(tensor.mutable_data_ptr<float>());
    TORCH_CHECK(result.size() == count, "there is no state ", name);
    return result;
  }
};

// A number of each tensor, in rows.
class Statistics {
 public:
  explicit Statistics(const Given& given)
      : data_(given.statistics.const_data_ptr<float>()), tensors_(given.statistics.size(1)) {}
  // Gives each coordinate of a tile its tensor's, of some rows.
  void expand(int first, int rows, const Pieces& pieces, float* out) const {
    for (int row = 0; row < rows; ++row)
      for (const Piece& piece : pieces)
        std::fill_n(out + row * LANES + piece.lane, piece.count, data_[(first + row) * tensors_ + piece.tensor]);
  }

 private:
  const float* data_;
  int64_t tensors_;
};

}  // namespace learnedopt
