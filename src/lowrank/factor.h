// Low-rank factorisation W ≈ up · down by four classical methods, weighted by the inputs W meets and by what becomes of its outputs.
#pragma once

#include "lowrank/matrix.h"

#include <optional>
#include <string_view>

namespace mla {

// With A = S W C^½, σ its singular values and ‖A − Â‖ the weighted error:
// svd   truncated SVD; the least error of all, ‖A − Â‖_F² = Σ_{i>r} σ_i² and ‖A − Â‖₂ = σ_{r+1} (Eckart-Young).
// qr    r rows of W itself, chosen by QR with column pivoting of Aᵀ = Q R; without a metric ‖A − Â‖_F = ‖R₂₂‖_F exactly, and
//       ‖A − Â‖₂ ≤ 2^r √(1 + r(m − r)) σ_{r+1} (worst case; in practice a small factor).
// rsvd  a Gaussian sketch with p more columns and q power iterations; ‖A − Â‖ = ‖A − QQᵀA‖, whose expectation in the Frobenius norm is
//       at most √(1 + r/(p − 1)) (Σ_{i>r} σ_i²)^½ with all r + p columns of Q (Halko-Martinsson-Tropp 10.5); cutting Q to r columns adds
//       at most the optimal error once more.
// cur   r rows and r columns of W, chosen by DEIM on A's singular vectors, around the least-squares core; without weights
//       ‖A − Â‖₂ ≤ (‖(PᵀU)⁻¹‖₂ + ‖(VᵀQ)⁻¹‖₂) σ_{r+1} for the r × r blocks of U and V at those rows and columns (Sorensen-Embree).
enum class Method : uint8_t { svd, qr, rsvd, cur };

constexpr Method all_methods[] = {Method::svd, Method::qr, Method::rsvd, Method::cur};
std::string_view name(Method method);
std::optional<Method> parse_method(std::string_view name);

struct LowRank {
  Matrix up;                           // [m, r]
  Matrix down;                         // [r, D]
  std::vector<int64_t> rows, columns;  // of W, where the method chooses any
};

struct FactorOptions {
  uint64_t seed = 0;           // rsvd
  int oversampling = 10;       // rsvd: p
  int power_iterations = 2;    // rsvd: q
  double max_condition = 1e8;  // qr, cur: of the pseudo-inverses
};

// Minimises ‖S (W − up · down) C^½‖_F, or approximates that, at rank r. w [m, D]; covariance C [D, D] and metric S [m, m] are symmetric
// and positive semidefinite; none stands for the identity. Neither C's inverse nor its Cholesky factor is formed, so C may be singular.
// Raises Error for ranks outside 1 … min(m, D), shapes that do not fit, and numbers that are not finite.
LowRank factor(Method method, const Matrix& w, int64_t rank, const Matrix* covariance = nullptr, const Matrix* metric = nullptr,
               const FactorOptions& options = {});

Matrix product(const LowRank& f);  // up · down
// ‖S (W − up · down) C^½‖_F
double weighted_error(const Matrix& w, const LowRank& f, const Matrix* covariance = nullptr, const Matrix* metric = nullptr);

}  // namespace mla
