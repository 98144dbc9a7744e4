// Row-major calls of CBLAS and LAPACKE, with their failures as errors.
#include "lowrank/matrix.h"

#include "core/check.h"

#include <cblas.h>
#include <lapacke.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

namespace mla {
namespace {

lapack_int narrow(int64_t n) {
  if (n > std::numeric_limits<lapack_int>::max()) fail_input("a dimension of {} is too large for LAPACK", n);
  return lapack_int(n);
}

void check_done(lapack_int status, const char* routine) {
  if (status == LAPACK_WORK_MEMORY_ERROR || status == LAPACK_TRANSPOSE_MEMORY_ERROR) fail("there is not enough memory for {}", routine);
  if (status != 0) fail("{} did not succeed (status {})", routine, status);
}

}  // namespace

Matrix multiply(const Matrix& a, const Matrix& b, Transposed which) {
  const bool left = which == Transposed::left, right = which == Transposed::right;
  const int64_t m = left ? a.cols : a.rows, inner = left ? a.rows : a.cols, n = right ? b.rows : b.cols;
  CHECK(inner == (right ? b.cols : b.rows), "[{}, {}] times [{}, {}]", a.rows, a.cols, b.rows, b.cols);
  Matrix c(m, n);
  if (m == 0 || n == 0 || inner == 0) return c;
  cblas_dgemm(CblasRowMajor, left ? CblasTrans : CblasNoTrans, right ? CblasTrans : CblasNoTrans, narrow(m), narrow(n), narrow(inner), 1,
              a.data.data(), narrow(a.cols), b.data.data(), narrow(b.cols), 0, c.data.data(), narrow(n));
  return c;
}

Matrix transpose(const Matrix& a) {
  Matrix t(a.cols, a.rows);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
  return t;
}

Matrix identity(int64_t n) {
  Matrix a(n, n);
  for (int64_t i = 0; i < n; ++i) a(i, i) = 1;
  return a;
}

Matrix take_rows(const Matrix& a, const std::vector<int64_t>& rows) {
  Matrix out(int64_t(rows.size()), a.cols);
  for (size_t i = 0; i < rows.size(); ++i) std::copy_n(a.row(rows[i]), a.cols, out.row(int64_t(i)));
  return out;
}

Matrix take_columns(const Matrix& a, const std::vector<int64_t>& columns) {
  Matrix out(a.rows, int64_t(columns.size()));
  for (int64_t i = 0; i < a.rows; ++i)
    for (size_t j = 0; j < columns.size(); ++j) out(i, int64_t(j)) = a(i, columns[j]);
  return out;
}

Matrix first_columns(const Matrix& a, int64_t n) {
  Matrix out(a.rows, n);
  for (int64_t i = 0; i < a.rows; ++i) std::copy_n(a.row(i), n, out.row(i));
  return out;
}

Matrix difference(const Matrix& a, const Matrix& b) {
  CHECK(a.rows == b.rows && a.cols == b.cols, "[{}, {}] minus [{}, {}]", a.rows, a.cols, b.rows, b.cols);
  Matrix out = a;
  for (size_t i = 0; i < out.data.size(); ++i) out.data[i] -= b.data[i];
  return out;
}

double frobenius_norm(const Matrix& a) { return a.data.empty() ? 0 : cblas_dnrm2(narrow(int64_t(a.data.size())), a.data.data(), 1); }

Eigen eigen_symmetric(Matrix a) {
  CHECK(a.rows == a.cols, "[{}, {}] is not square", a.rows, a.cols);
  const int64_t n = a.rows;
  std::vector<double> ascending(static_cast<size_t>(n));
  check_done(LAPACKE_dsyevd(LAPACK_ROW_MAJOR, 'V', 'L', narrow(n), a.data.data(), narrow(n), ascending.data()), "dsyevd");
  Eigen out{{ascending.rbegin(), ascending.rend()}, Matrix(n, n)};
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) out.vectors(i, j) = a(i, n - 1 - j);
  return out;
}

Svd svd(Matrix a) {
  const int64_t m = a.rows, n = a.cols, k = std::min(m, n);
  Svd out{Matrix(m, k), std::vector<double>(static_cast<size_t>(k)), Matrix(k, n)};
  check_done(LAPACKE_dgesdd(LAPACK_ROW_MAJOR, 'S', narrow(m), narrow(n), a.data.data(), narrow(n), out.s.data(), out.u.data.data(),
                            narrow(k), out.vt.data.data(), narrow(n)),
             "dgesdd");
  return out;
}

PivotedQr pivoted_qr(Matrix a) {
  const int64_t m = a.rows, n = a.cols, k = std::min(m, n);
  std::vector<lapack_int> pivots(static_cast<size_t>(n));
  std::vector<double> tau(static_cast<size_t>(k));
  check_done(LAPACKE_dgeqp3(LAPACK_ROW_MAJOR, narrow(m), narrow(n), a.data.data(), narrow(n), pivots.data(), tau.data()), "dgeqp3");
  PivotedQr out{Matrix(k, n), {}};
  for (int64_t i = 0; i < k; ++i) std::copy_n(a.row(i) + i, n - i, out.r.row(i) + i);
  for (lapack_int p : pivots) out.pivots.push_back(p - 1);
  return out;
}

Matrix orthonormal_columns(Matrix a) {
  CHECK(a.rows >= a.cols, "[{}, {}] has more columns than rows", a.rows, a.cols);
  std::vector<double> tau(static_cast<size_t>(a.cols));
  const lapack_int m = narrow(a.rows), n = narrow(a.cols);
  check_done(LAPACKE_dgeqrf(LAPACK_ROW_MAJOR, m, n, a.data.data(), n, tau.data()), "dgeqrf");
  check_done(LAPACKE_dorgqr(LAPACK_ROW_MAJOR, m, n, n, a.data.data(), n, tau.data()), "dorgqr");
  return a;
}

Matrix symmetric_power(const Matrix& a, double power, double floor) {
  const Eigen e = eigen_symmetric(a);
  const double most = e.values.empty() ? 0 : std::max(e.values[0], 0.0), noise = most * 1e-15 * double(a.rows);
  Matrix scaled = e.vectors;  // V diag(λ^power)
  for (int64_t j = 0; j < a.rows; ++j) {
    const double value = std::max(e.values[size_t(j)], floor * most);
    const double factor = value > noise ? std::pow(value, power) : 0;
    for (int64_t i = 0; i < a.rows; ++i) scaled(i, j) *= factor;
  }
  return multiply(scaled, e.vectors, Transposed::right);
}

Matrix pseudo_inverse(const Matrix& a, double max_condition) {
  const Svd d = svd(a);
  Matrix scaled = d.vt;  // diag(1/σ) Vᵀ
  for (int64_t i = 0; i < scaled.rows; ++i) {
    const double s = d.s[size_t(i)];
    const double factor = s > 0 && s * max_condition >= d.s[0] ? 1 / s : 0;
    for (int64_t j = 0; j < scaled.cols; ++j) scaled(i, j) *= factor;
  }
  return transpose(multiply(d.u, scaled));
}

Matrix solve_ridge(Matrix a, double lambda, Matrix b) {
  CHECK(a.rows == a.cols && a.rows == b.rows, "[{}, {}] x = [{}, {}]", a.rows, a.cols, b.rows, b.cols);
  for (int64_t i = 0; i < a.rows; ++i) a(i, i) += lambda;
  check_done(
      LAPACKE_dposv(LAPACK_ROW_MAJOR, 'L', narrow(a.rows), narrow(b.cols), a.data.data(), narrow(a.cols), b.data.data(), narrow(b.cols)),
      "dposv");
  return b;
}

void check_finite(const Matrix& a, std::string_view what) {
  if (a.data.empty()) fail_input("{} is [{}, {}]; it needs elements", what, a.rows, a.cols);
  for (size_t i = 0; i < a.data.size(); ++i)
    if (!std::isfinite(a.data[i]))
      fail_input("{} has {} at [{}, {}]; only finite numbers can be factorised", what, a.data[i], int64_t(i) / a.cols, int64_t(i) % a.cols);
}

void set_math_threads(int threads) { openblas_set_num_threads(threads); }

std::string_view better_core(std::string_view chosen, bool avx2, bool avx512) {
  constexpr std::string_view old[] = {"Prescott", "Core2", "Penryn", "Nehalem", "Sandybridge", "Athlon", "Opteron", "Barcelona"};
  if (!avx2 || std::ranges::find(old, chosen) == std::end(old)) return {};
  return avx512 ? "SkylakeX" : "Haswell";
}

void restart_on_better_core(char** argv, bool avx2, bool avx512) {
  const std::string core(better_core(openblas_get_corename(), avx2, avx512));
  if (core.empty() || getenv("OPENBLAS_CORETYPE") || setenv("OPENBLAS_CORETYPE", core.c_str(), 1) != 0) return;
  execv("/proc/self/exe", argv);  // where that fails, the program goes on, slowly
}

}  // namespace mla
