// Dense matrices of doubles and the operations of BLAS and LAPACK that the factorisations rest on.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace mla {

struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<double> data;  // row by row

  Matrix() = default;
  Matrix(int64_t r, int64_t c) : rows(r), cols(c), data(size_t(r * c)) {}
  double& operator()(int64_t i, int64_t j) { return data[size_t(i * cols + j)]; }
  double operator()(int64_t i, int64_t j) const { return data[size_t(i * cols + j)]; }
  double* row(int64_t i) { return data.data() + i * cols; }
  const double* row(int64_t i) const { return data.data() + i * cols; }
};

enum class Transposed : uint8_t { none, left, right };

Matrix multiply(const Matrix& a, const Matrix& b, Transposed which = Transposed::none);  // a b, aᵀ b or a bᵀ
Matrix transpose(const Matrix& a);
Matrix identity(int64_t n);
Matrix take_rows(const Matrix& a, const std::vector<int64_t>& rows);
Matrix take_columns(const Matrix& a, const std::vector<int64_t>& columns);
Matrix first_columns(const Matrix& a, int64_t n);
Matrix difference(const Matrix& a, const Matrix& b);
double frobenius_norm(const Matrix& a);

struct Eigen {
  std::vector<double> values;  // from the largest down
  Matrix vectors;              // in columns
};
Eigen eigen_symmetric(Matrix a);

struct Svd {
  Matrix u;               // [m, k], k = min(m, n)
  std::vector<double> s;  // from the largest down
  Matrix vt;              // [k, n]
};
Svd svd(Matrix a);

struct PivotedQr {
  Matrix r;                     // [k, n], of a with its columns in the order of `pivots`
  std::vector<int64_t> pivots;  // columns, in the order they were chosen
};
PivotedQr pivoted_qr(Matrix a);

Matrix orthonormal_columns(Matrix a);  // the thin Q of a = QR; a has at least as many rows as columns

// V diag(max(λ, floor · λ_max)^power) Vᵀ of a symmetric, positive semidefinite matrix; zero eigenvalues stay zero.
Matrix symmetric_power(const Matrix& a, double power, double floor = 0);
// Singular values below σ_max / max_condition count as zero.
Matrix pseudo_inverse(const Matrix& a, double max_condition);
// x of (a + λ I) x = b for a symmetric, positive semidefinite a. Raises Error where that is singular.
Matrix solve_ridge(Matrix a, double lambda, Matrix b);

// Raises Error for a matrix without elements, or with one that is no finite number, by the name `what`.
void check_finite(const Matrix& a, std::string_view what);

void set_math_threads(int threads);  // of BLAS and LAPACK, for the whole program

// OpenBLAS falls back to kernels of 2004 on processors that it does not know; it takes others only from the environment, when a
// program starts. The core whose kernels it should take instead of `chosen`, or nothing where that is as good.
std::string_view better_core(std::string_view chosen, bool avx2, bool avx512);
// Starts the program again with that core in its environment, unless OPENBLAS_CORETYPE is set already.
void restart_on_better_core(char** argv, bool avx2, bool avx512);

}  // namespace mla
