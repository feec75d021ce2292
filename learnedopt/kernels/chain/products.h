// Products of matrices in row-major order, with strides, by the BLAS that torch brings.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

extern "C" [[gnu::weak]] void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                     const float*, const int*, const float*, const int*, const float*, float*,
                                     const int*);

namespace learnedopt::chain {

// c (m, n) <- alpha a b + beta c, with a (m, k) and b (k, n), each stored transposed or not; ld is the length of a row.
inline void product(bool a_transposed, bool b_transposed, int m, int n, int k, float alpha, const float* a, int lda,
                    const float* b, int ldb, float beta, float* c, int ldc) {
  if (sgemm_) {  // in column-major order it is the product of the transposes
    sgemm_(b_transposed ? "T" : "N", a_transposed ? "T" : "N", &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);
    return;
  }
  auto matrix = [](const float* x, int rows, int columns, int ld, bool transposed) {
    const at::Tensor stored = at::from_blob(const_cast<float*>(x), transposed ? at::IntArrayRef{columns, rows} : at::IntArrayRef{rows, columns}, at::IntArrayRef{ld, 1});
    return transposed ? stored.t() : stored;
  };
  at::Tensor result = matrix(c, m, n, ldc, false);
  at::addmm_out(result, result, matrix(a, m, k, lda, a_transposed), matrix(b, k, n, ldb, b_transposed), beta, alpha);
}

// factor (k, k) <- decay factor + share x x^T, of x (k, n), or with `columns` x^T x, of x (n, k). It is symmetric: what
// is below the diagonal is a copy.
inline void outer(bool columns, int k, int n, float share, const float* x, int ld, float decay, float* factor) {
  constexpr int PANEL = 128;
  for (int row = 0; row < k; row += PANEL) {
    const int height = std::min(PANEL, k - row), width = k - row;
    float* here = factor + int64_t(row) * (k + 1);
    if (columns)
      product(true, false, height, width, n, share, x + row, ld, x + row, ld, decay, here, k);
    else
      product(false, true, height, width, n, share, x + int64_t(row) * ld, ld, x + int64_t(row) * ld, ld, decay, here, k);
  }
  for (int i = PANEL; i < k; ++i)
    for (int j = 0; j < i / PANEL * PANEL; ++j) factor[int64_t(i) * k + j] = factor[int64_t(j) * k + i];
}

}  // namespace learnedopt::chain
