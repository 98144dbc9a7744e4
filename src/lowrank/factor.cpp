// The four methods. SVD and its randomised form keep an orthonormal basis of A's columns; QR and CUR keep rows (and columns) of W.
#include "lowrank/factor.h"

#include "core/check.h"
#include "core/random.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mla {
namespace {

// W and its weights, with what is derived from them when it is first asked for.
class Problem {
 public:
  Problem(const Matrix& w, const Matrix* covariance, const Matrix* metric) : w_(w), c_(covariance), s_(metric) {}

  const Matrix& w() const { return w_; }
  bool weighted_inputs() const { return c_ != nullptr; }
  Matrix times_metric(const Matrix& x) const { return s_ ? multiply(*s_, x) : x; }  // S x
  Matrix times_root(const Matrix& x) { return c_ ? multiply(x, root()) : x; }       // x C^½
  Matrix a() { return times_root(times_metric(w_)); }                               // S W C^½
  Matrix gram() const {                                                             // A Aᵀ = S W C Wᵀ S
    const Matrix sw = times_metric(w_);
    return c_ ? multiply(multiply(sw, *c_), sw, Transposed::right) : multiply(sw, sw, Transposed::right);
  }
  // From an orthonormal basis q of A's leading columns: S (up · down) = q qᵀ S W.
  LowRank from_basis(const Matrix& q) const {
    return {s_ ? multiply(symmetric_power(*s_, -1), q) : q, multiply(q, times_metric(w_), Transposed::left), {}, {}};
  }

 private:
  const Matrix& root() {
    if (root_.data.empty()) root_ = symmetric_power(*c_, 0.5);
    return root_;
  }
  const Matrix& w_;
  const Matrix* c_;
  const Matrix* s_;
  Matrix root_;
};

LowRank by_svd(const Problem& p, int64_t rank) {
  // With weights on the inputs, A's left singular vectors come without C^½; without, not squaring A keeps its small singular values.
  return p.from_basis(first_columns(p.weighted_inputs() ? eigen_symmetric(p.gram()).vectors : svd(p.times_metric(p.w())).u, rank));
}

Matrix gaussian(int64_t rows, int64_t cols, uint64_t seed) {
  Matrix g(rows, cols);
  for (size_t i = 0; i < g.data.size(); ++i) g.data[i] = random_normal(seed, i);
  return g;
}

LowRank by_random_svd(const Problem& p, int64_t rank, const FactorOptions& o) {
  const int64_t m = p.w().rows, n = std::min(rank + o.oversampling, std::min(m, p.w().cols));
  if (p.weighted_inputs()) {  // on A Aᵀ, whose one product is a power iteration of A
    const Matrix gram = p.gram();
    Matrix q = orthonormal_columns(multiply(gram, gaussian(m, n, o.seed)));
    for (int i = 1; i < o.power_iterations; ++i) q = orthonormal_columns(multiply(gram, q));
    const Matrix inner = multiply(q, multiply(gram, q), Transposed::left);
    return p.from_basis(multiply(q, first_columns(eigen_symmetric(inner).vectors, rank)));
  }
  const Matrix a = p.times_metric(p.w());
  Matrix q = orthonormal_columns(multiply(a, gaussian(a.cols, n, o.seed)));
  for (int i = 0; i < o.power_iterations; ++i) q = orthonormal_columns(multiply(a, orthonormal_columns(multiply(a, q, Transposed::left))));
  // The left singular vectors of QᵀA, through its small Gram matrix.
  const Matrix inner = multiply(q, a, Transposed::left);
  return p.from_basis(multiply(q, first_columns(eigen_symmetric(multiply(inner, inner, Transposed::right)).vectors, rank)));
}

LowRank by_pivoted_qr(Problem& p, int64_t rank, const FactorOptions& o) {
  LowRank out;
  out.rows = pivoted_qr(transpose(p.a())).pivots;
  out.rows.resize(size_t(rank));
  out.down = take_rows(p.w(), out.rows);
  // The best up for these rows, whatever the metric: W C^½ (down C^½)⁺.
  out.up = multiply(p.times_root(p.w()), pseudo_inverse(p.times_root(out.down), o.max_condition));
  return out;
}

// The discrete empirical interpolation method: of each singular vector in turn, the entry that those before it explain worst.
std::vector<int64_t> deim(const Matrix& vectors, int64_t rank) {
  std::vector<int64_t> chosen;
  Matrix residual = first_columns(vectors, rank);
  for (int64_t j = 0; j < rank; ++j) {
    int64_t best = 0;
    for (int64_t i = 1; i < residual.rows; ++i)
      if (std::fabs(residual(i, j)) > std::fabs(residual(best, j))) best = i;
    chosen.push_back(best);
    // Elimination with this pivot takes what column j explains out of the columns after it; it zeroes row `best` there.
    const double pivot = residual(best, j);
    for (int64_t i = 0; i < residual.rows; ++i) {
      const double factor = residual(i, j) / pivot;
      if (i == best || factor == 0) continue;
      for (int64_t k = j + 1; k < rank; ++k) residual(i, k) -= factor * residual(best, k);
    }
    for (int64_t k = j + 1; k < rank; ++k) residual(best, k) = 0;
  }
  return chosen;
}

LowRank by_cur(Problem& p, int64_t rank, const FactorOptions& o) {
  const Matrix a = p.a();
  const Svd d = svd(a);
  LowRank out;
  out.rows = deim(d.u, rank);
  out.columns = deim(transpose(d.vt), rank);
  out.down = take_rows(p.w(), out.rows);
  const Matrix columns = take_columns(p.w(), out.columns);
  const Matrix core = multiply(multiply(pseudo_inverse(p.times_metric(columns), o.max_condition), a),
                               pseudo_inverse(p.times_root(out.down), o.max_condition));
  out.up = multiply(columns, core);
  return out;
}

void check_square(const Matrix* x, int64_t n, const char* what) {
  if (!x) return;
  if (x->rows != n || x->cols != n) fail_input("the {} is [{}, {}]; the matrix asks for [{}, {}]", what, x->rows, x->cols, n, n);
  check_finite(*x, what);
}

}  // namespace

std::string_view name(Method method) {
  switch (method) {
    case Method::svd: return "svd";
    case Method::qr: return "qr";
    case Method::rsvd: return "rsvd";
    case Method::cur: return "cur";
  }
  return "?";
}

std::optional<Method> parse_method(std::string_view text) {
  for (Method method : all_methods)
    if (name(method) == text) return method;
  return std::nullopt;
}

LowRank factor(Method method, const Matrix& w, int64_t rank, const Matrix* covariance, const Matrix* metric, const FactorOptions& options) {
  check_finite(w, "the matrix");
  check_square(covariance, w.cols, "covariance");
  check_square(metric, w.rows, "metric");
  if (rank < 1 || rank > std::min(w.rows, w.cols))
    fail_input("rank {} for a matrix [{}, {}]; give 1 to {}", rank, w.rows, w.cols, std::min(w.rows, w.cols));
  Problem problem(w, covariance, metric);
  switch (method) {
    case Method::svd: return by_svd(problem, rank);
    case Method::rsvd: return by_random_svd(problem, rank, options);
    case Method::qr: return by_pivoted_qr(problem, rank, options);
    case Method::cur: return by_cur(problem, rank, options);
  }
  fail("method {} is unknown", int(method));
}

Matrix product(const LowRank& f) { return multiply(f.up, f.down); }

double weighted_error(const Matrix& w, const LowRank& f, const Matrix* covariance, const Matrix* metric) {
  Problem rest(w, covariance, metric);
  const Matrix e = rest.times_metric(difference(w, product(f)));
  if (!covariance) return frobenius_norm(e);
  const Matrix ec = multiply(e, *covariance);  // ‖E C^½‖_F² = tr(E C Eᵀ)
  return std::sqrt(std::max(0.0, std::inner_product(e.data.begin(), e.data.end(), ec.data.begin(), 0.0)));
}

}  // namespace mla
