// Rotations across heads, the constants of channels that lose their rotation, the joint factorisation in its metric, the neutral norm.
#include "lowrank/gqa_to_mla.h"

#include "core/check.h"
#include "core/dtype.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mla {
namespace {

using Complex = std::complex<double>;

// to (a pair of rows: real and imaginary part) += c · from
void add_scaled(Complex c, const double* from_re, const double* from_im, double* to_re, double* to_im, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to_re[i] += c.real() * from_re[i] - c.imag() * from_im[i];
    to_im[i] += c.real() * from_im[i] + c.imag() * from_re[i];
  }
}

double inner_product(const Matrix& a, const Matrix& b) {  // tr(aᵀ b)
  double sum = 0;
  for (size_t i = 0; i < a.data.size(); ++i) sum += a.data[i] * b.data[i];
  return sum;
}

Matrix block(const Matrix& a, int64_t from, int64_t n) {  // a diagonal block
  Matrix out(n, n);
  for (int64_t i = 0; i < n; ++i) std::copy_n(a.row(from + i) + from, n, out.row(i));
  return out;
}

void put_block(Matrix& a, int64_t at, const Matrix& b) {
  for (int64_t i = 0; i < b.rows; ++i) std::copy_n(b.row(i), b.cols, a.row(at + i) + at);
}

void put_rows(Matrix& a, int64_t at, const Matrix& b) { std::copy(b.data.begin(), b.data.end(), a.row(at)); }

// The eigenvector of the largest eigenvalue of a Hermitian matrix, through the real matrix [[X, −Y], [Y, X]].
std::vector<Complex> leading_eigenvector(const std::vector<Complex>& h, int64_t n) {
  Matrix real(2 * n, 2 * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const Complex x = h[size_t(i * n + j)];
      real(i, j) = real(n + i, n + j) = x.real();
      real(n + i, j) = x.imag();
      real(i, n + j) = -x.imag();
    }
  const Matrix v = eigen_symmetric(real).vectors;
  std::vector<Complex> out(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) out[size_t(i)] = {v(i, 0), v(n + i, 0)};
  return out;
}

class Conversion {
 public:
  Conversion(const GqaShape& s, const GqaMatrices& w, const LayerMoments& m, const LayerOptions& o)
      : s_(s), w_(w), m_(m), o_(o), c_(o.activations ? m.inputs : identity(s.hidden)), q_(halves(w.q)), k_(halves(w.k)) {}

  MlaMatrices run() {
    MlaMatrices out;
    const double softmax = std::sqrt(double(s_.head_dim + o_.qk_rope_head_dim) / double(s_.head_dim));
    choose_rotary();
    const LowRank f = factorise();
    out.q = queries(softmax);
    out.kv_a = Matrix(o_.kv_lora_rank + o_.qk_rope_head_dim, s_.hidden);
    put_rows(out.kv_a, 0, f.down);
    put_rows(out.kv_a, o_.kv_lora_rank, rotary_key_);
    out.kv_b = head_rows(f.up);
    out.o = w_.o;
    return out;
  }

 private:
  // Rows of each head as [real | imaginary].
  Matrix halves(const Matrix& w) const {
    if (!s_.interleaved) return w;
    Matrix out(w.rows, w.cols);
    for (int64_t r = 0; r < w.rows; ++r) {
      const int64_t head = r / s_.head_dim * s_.head_dim, i = r % s_.head_dim;
      std::copy_n(w.row(r), w.cols, out.row(head + i / 2 + i % 2 * s_.pairs()));
    }
    return out;
  }
  int64_t re(int64_t head, int64_t pair) const { return head * s_.head_dim + pair; }
  int64_t im(int64_t head, int64_t pair) const { return re(head, pair) + s_.pairs(); }
  int64_t group(int64_t head) const { return head / (s_.heads / s_.groups); }
  Complex constant(int64_t head, int64_t pair) const {
    return m_.constants.empty() ? Complex(1) : m_.constants[size_t(head * s_.pairs() + pair)];
  }

  Complex folded(int64_t head, int64_t pair) const { return m_.folded.empty() ? Complex(1) : m_.folded[size_t(head * s_.pairs() + pair)]; }

  // What a channel's rotation is worth: E|q|², times what a constant misses of it and the slot's rotation does not.
  double weight(const Matrix& q_energy, int64_t g, int64_t pair) const {
    double energy = 0, gained = 0;
    const int64_t per_group = s_.heads / s_.groups;
    for (int64_t i = g * per_group; i < (g + 1) * per_group; ++i) {
      energy += q_energy(i, pair);
      gained += std::norm(folded(i, pair)) - std::norm(constant(i, pair));
    }
    return std::sqrt(energy * (m_.constants.empty() ? 1 : std::max(gained / double(per_group), 1e-4)));
  }

  std::vector<std::vector<int64_t>> slots() const {
    if (!o_.slots.empty()) return o_.slots;
    const int64_t n = o_.qk_rope_head_dim / 2, step = s_.pairs() / n;
    std::vector<std::vector<int64_t>> out(static_cast<size_t>(n));
    for (int64_t p = 0; p < n * step; ++p)
      if (o_.fold || p % step == 0) out[size_t(p / step)].push_back(p);
    return out;
  }

  Matrix query_energy() const {  // E|q|² of each head and pair
    const Matrix qc = multiply(q_, c_);
    Matrix energy(s_.heads, s_.pairs());
    for (int64_t h = 0; h < s_.heads; ++h)
      for (int64_t p = 0; p < s_.pairs(); ++p)
        for (int64_t r : {re(h, p), im(h, p)})
          for (int64_t j = 0; j < s_.hidden; ++j) energy(h, p) += qc(r, j) * q_(r, j);
    return energy;
  }

  // A KV head's pair in a slot: the slot's key is Σ take k, and what is left of the pair's own k − give key.
  struct Share {
    int64_t group, pair;
    Complex take, give;
  };

  // The complex direction over all pairs that carries the most: k is u (b^H k) + rest. Within one frequency this is exact for what is kept,
  // since all heads turn alike.
  void take_direction(std::vector<Share>& channels, const Matrix& moments, const Matrix& energy) const {
    const auto n = int64_t(channels.size());
    std::vector<double> weights;
    weights.reserve(channels.size());
    for (const Share& c : channels) weights.push_back(o_.metric ? std::max(weight(energy, c.group, c.pair), 1e-12) : 1);
    std::vector<Complex> h(static_cast<size_t>(n * n));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const Share &ci = channels[size_t(i)], &cj = channels[size_t(j)];
        const int64_t a = re(ci.group, ci.pair), b = im(ci.group, ci.pair), x = re(cj.group, cj.pair), y = im(cj.group, cj.pair);
        h[size_t(i * n + j)] =
            Complex(moments(a, x) + moments(b, y), moments(b, x) - moments(a, y)) * weights[size_t(i)] * weights[size_t(j)];
      }
    const std::vector<Complex> u = leading_eigenvector(h, n);
    for (size_t i = 0; i < channels.size(); ++i) channels[i].take = std::conj(u[i]) * weights[i], channels[i].give = u[i] / weights[i];
  }

  void take_largest(std::vector<Share>& channels, const Matrix& moments, const Matrix& energy) const {
    const int64_t per_group = s_.heads / s_.groups;
    const auto norms = [&](const Share& c) {
      double queries = 0;
      for (int64_t i = c.group * per_group; i < (c.group + 1) * per_group; ++i) queries += std::sqrt(energy(i, c.pair));
      const int64_t a = re(c.group, c.pair), b = im(c.group, c.pair);
      return queries * std::sqrt(moments(a, a) + moments(b, b));
    };
    Share& chosen = *std::ranges::max_element(channels, {}, norms);
    chosen.take = chosen.give = 1;
  }

  // The rotary key slot by slot, the queries that meet it, and what it leaves of the keys, which loses its rotation.
  void choose_rotary() {
    const int64_t D = s_.hidden, slots = o_.qk_rope_head_dim / 2;
    const std::vector<std::vector<int64_t>> pairs = this->slots();
    const Matrix moments = multiply(multiply(k_, c_), k_, Transposed::right), energy = query_energy();
    rest_ = k_;
    rotary_key_ = Matrix(2 * slots, D);
    rotary_query_ = Matrix(s_.heads * 2 * slots, D);
    for (int64_t slot = 0; slot < slots; ++slot) {
      std::vector<Share> channels;
      for (int64_t g = 0; g < s_.groups; ++g)
        for (int64_t pair : pairs[size_t(slot)]) channels.push_back({g, pair, 0, 0});
      if (o_.rotary == Rotary::norm)
        take_largest(channels, moments, energy);
      else
        take_direction(channels, moments, energy);
      double* key_re = rotary_key_.row(2 * slot);
      double* key_im = rotary_key_.row(2 * slot + 1);
      for (const Share& c : channels) add_scaled(c.take, k_.row(re(c.group, c.pair)), k_.row(im(c.group, c.pair)), key_re, key_im, D);
      for (const Share& c : channels) {
        add_scaled(-c.give, key_re, key_im, rest_.row(re(c.group, c.pair)), rest_.row(im(c.group, c.pair)), D);
        for (int64_t head = 0; head < s_.heads; ++head)
          if (group(head) == c.group)
            add_scaled(std::conj(c.give * folded(head, c.pair)), q_.row(re(head, c.pair)), q_.row(im(head, c.pair)),
                       rotary_query_.row(head * 2 * slots + 2 * slot), rotary_query_.row(head * 2 * slots + 2 * slot + 1), D);
      }
    }
    // Without its rotation a score is Re(conj(q) z k) = Re(conj(conj(z) q) k).
    still_query_ = Matrix(q_.rows, D);
    for (int64_t h = 0; h < s_.heads; ++h)
      for (int64_t p = 0; p < s_.pairs(); ++p)
        add_scaled(std::conj(constant(h, p)), q_.row(re(h, p)), q_.row(im(h, p)), still_query_.row(re(h, p)), still_query_.row(im(h, p)),
                   D);
  }

  // The square root of a block's metric, scaled so that the energy of the block's outputs is `share`, or by that alone where nothing is
  // balanced; `whole` is what would be a lot.
  Matrix metric_root(const Matrix& metric, const Matrix& outputs, double whole, double share) const {
    const double energy = o_.balance ? inner_product(metric, outputs) : 1;
    if (o_.balance && !(energy > 1e-10 * whole)) return identity(metric.rows);  // nothing is left there but rounding
    Matrix root = symmetric_power(metric, 0.5, 1e-6);
    for (double& x : root.data) x *= std::sqrt(share / energy);
    return root;
  }

  // [K_rest; V] ≈ up · down, in the metric of what keys and values do to scores and to the stream.
  LowRank factorise() {
    const int64_t d = s_.head_dim, n = s_.groups * d, per_group = s_.heads / s_.groups;
    Matrix joint(2 * n, s_.hidden), keys(n, n), values(n, n);
    put_rows(joint, 0, rest_);
    put_rows(joint, n, w_.v);
    if (o_.metric) {
      for (int64_t h = 0; h < s_.heads; ++h) {
        std::vector<int64_t> rows;
        for (int64_t i = 0; i < d; ++i) rows.push_back(h * d + i);
        const Matrix q = take_rows(still_query_, rows), o = take_columns(w_.o, rows);
        const Matrix qq = multiply(multiply(q, c_), q, Transposed::right), oo = multiply(o, o, Transposed::left);
        const int64_t at = h / per_group * d;
        for (int64_t i = 0; i < d; ++i)
          for (int64_t j = 0; j < d; ++j) keys(at + i, at + j) += qq(i, j) / double(d), values(at + i, at + j) += oo(i, j);
      }
    } else {
      keys = values = identity(n);
    }
    const Matrix outputs = multiply(multiply(joint, c_), joint, Transposed::right);
    Matrix root(2 * n, 2 * n);
    put_block(root, 0, metric_root(keys, block(outputs, 0, n), inner_product(keys, multiply(multiply(k_, c_), k_, Transposed::right)), 1));
    put_block(root, n, metric_root(values, block(outputs, n, n), 0, o_.value_share));
    FactorOptions options;
    options.seed = o_.seed;
    return factor(o_.method, joint, o_.latent_rank(), &c_, &root, options);
  }

  Matrix queries(double scale) const {
    const int64_t d = s_.head_dim, d_R = o_.qk_rope_head_dim;
    Matrix q(s_.heads * (d + d_R), s_.hidden);
    for (int64_t h = 0; h < s_.heads; ++h) {
      for (int64_t i = 0; i < d; ++i) std::copy_n(still_query_.row(h * d + i), s_.hidden, q.row(h * (d + d_R) + i));
      for (int64_t i = 0; i < d_R; ++i) std::copy_n(rotary_query_.row(h * d_R + i), s_.hidden, q.row(h * (d + d_R) + d + i));
    }
    for (double& x : q.data) x *= scale;
    return q;
  }

  // Heads of a group share their W_UK and W_UV.
  Matrix head_rows(const Matrix& up) const {
    const int64_t d = s_.head_dim, n = s_.groups * d;
    Matrix kv_b(s_.heads * 2 * d, o_.kv_lora_rank);
    for (int64_t h = 0; h < s_.heads; ++h)
      for (int64_t i = 0; i < d; ++i) {
        std::copy_n(up.row(group(h) * d + i), up.cols, kv_b.row(h * 2 * d + i));
        std::copy_n(up.row(n + group(h) * d + i), up.cols, kv_b.row(h * 2 * d + d + i));
      }
    return kv_b;
  }

  const GqaShape& s_;
  const GqaMatrices& w_;
  const LayerMoments& m_;
  const LayerOptions& o_;
  const Matrix c_;                     // the inputs' second moments, or the identity
  const Matrix q_, k_;                 // rows as [real | imaginary] of each head
  Matrix rest_;                        // keys without what the rotary key carries
  Matrix rotary_key_;                  // [d_R, D], pairs interleaved
  Matrix rotary_query_, still_query_;  // [h d_R, D], [h d, D]
};

// The row v that makes v·a nearest to `constant`: E[a aᵀ] v = constant E[a].
void put_functional(double* row, double constant, const LayerMoments& m) {
  Matrix b(m.inputs.rows, 1);
  double trace = 0;
  for (int64_t i = 0; i < b.rows; ++i) b(i, 0) = constant * m.mean[size_t(i)], trace += m.inputs(i, i);
  const Matrix v = solve_ridge(m.inputs, 1e-9 * trace, b);
  std::copy(v.data.begin(), v.data.end(), row);
}

}  // namespace

// RMSNorm divides the latent by rms = √((‖c‖² + B²)/r + ε). With B far above ‖c‖ that is one number, which the norm's weight undoes; the
// constant itself has weight 0, so that the cache keeps none of it.
NeutralNorm neutral_norm(LatentNorm which, Matrix& down, const LayerMoments& m, double eps) {
  const int64_t r = down.rows;
  NeutralNorm out;
  out.bias.assign(size_t(r), 0);
  double energy = 0, constant = 0;
  const Matrix covered = multiply(down, m.inputs);
  const int64_t kept = which == LatentNorm::scale ? r : r - 1;
  for (int64_t i = 0; i < kept; ++i) energy += std::inner_product(covered.row(i), covered.row(i) + down.cols, down.row(i), 0.0);
  if (which != LatentNorm::scale) {
    constant = std::exp2(std::ceil(std::log2(1024 * std::sqrt(std::max(energy, 1e-30)))));  // a power of two is exact in every type
    if (which == LatentNorm::constant)
      out.bias[size_t(r - 1)] = constant;
    else
      put_functional(down.row(r - 1), constant, m);
  }
  const double rms = std::sqrt((energy + constant * constant) / double(r) + eps);
  const double weight = double(bf16_to_f32(f32_to_bf16(float(rms))));  // what it lacks goes into what reads the latent
  out.weight.assign(size_t(r), weight);
  if (constant > 0) out.weight[size_t(r - 1)] = 0;
  out.factor = rms / weight;
  return out;
}

void neutralise_norm(MlaMatrices& m, int64_t rank, LatentNorm which, const LayerMoments& moments, double norm_eps) {
  Matrix down(rank, m.kv_a.cols);
  std::copy_n(m.kv_a.data.begin(), down.data.size(), down.data.begin());
  NeutralNorm norm = neutral_norm(which, down, moments, norm_eps);
  put_rows(m.kv_a, 0, down);
  m.kv_a_bias = std::move(norm.bias), m.kv_a_norm = std::move(norm.weight);
  m.kv_a_bias.resize(size_t(m.kv_a.rows));
  for (double& x : m.kv_b.data) x *= norm.factor;
}

void check_layer_options(const GqaShape& s, const LayerOptions& o) {
  const int64_t d_R = o.qk_rope_head_dim, most = std::min(2 * s.groups * s.head_dim, s.hidden), spare = o.kv_lora_rank - o.latent_rank();
  if (d_R < 2 || d_R > s.head_dim || d_R % 2 != 0 || (o.slots.empty() && s.head_dim % d_R != 0))
    fail_input("a rotary width of {} does not fit heads of {}; it must be even and no wider{}", d_R, s.head_dim,
               o.slots.empty() ? ", and divide that" : "");
  if (o.latent_rank() < 1 || o.latent_rank() > most)
    fail_input("a latent of {} elements is {}; give {} to {}{}", o.kv_lora_rank, o.latent_rank() < 1 ? "too small" : "more than full rank",
               1 + spare, most + spare, spare ? " (one holds the constant that makes the latent's norm harmless)" : "");
  if (!(o.value_share > 0) || !std::isfinite(o.value_share)) fail_input("the values' share β is {}; it must be above 0", o.value_share);
}

MlaMatrices factor_layer(const GqaShape& shape, const GqaMatrices& w, const LayerMoments& moments, const LayerOptions& options) {
  check_layer_options(shape, options);
  return Conversion(shape, w, moments, options).run();
}

}  // namespace mla
