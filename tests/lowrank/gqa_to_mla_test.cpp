// The algebra of one layer, step by step: what is exact is exact, and every bound on options is said.
#include "lowrank/gqa_to_mla.h"

#include "core/check.h"
#include "random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <numeric>

namespace mla::test {
namespace {

constexpr GqaShape shape{4, 2, 8, 20, false};
constexpr double eps = 1e-6;

GqaMatrices random_weights(const GqaShape& s, uint64_t seed) {
  return {random_matrix(s.heads * s.head_dim, s.hidden, seed), random_matrix(s.groups * s.head_dim, s.hidden, seed + 1),
          random_matrix(s.groups * s.head_dim, s.hidden, seed + 2), random_matrix(s.hidden, s.heads * s.head_dim, seed + 3)};
}

LayerMoments random_moments(const GqaShape& s, uint64_t seed, bool constants) {
  LayerMoments m;
  m.inputs = covariance(s.hidden, 4 * s.hidden, seed);
  for (double& x : m.inputs.data) x /= double(4 * s.hidden);
  m.mean.assign(size_t(s.hidden), 0.1);
  for (int64_t i = 0; constants && i < s.heads * s.pairs(); ++i)
    m.constants.push_back(std::polar(random_uniform(seed + 1, uint64_t(i)), 6.28 * random_uniform(seed + 2, uint64_t(i))));
  return m;
}

std::vector<double> times(const Matrix& w, const std::vector<double>& x, const std::vector<double>& bias = {}) {
  std::vector<double> y(static_cast<size_t>(w.rows));
  for (int64_t i = 0; i < w.rows; ++i)
    y[size_t(i)] = std::inner_product(x.begin(), x.end(), w.row(i), bias.empty() ? 0.0 : bias[size_t(i)]);
  return y;
}

std::vector<double> random_vector(int64_t n, uint64_t seed) { return random_matrix(1, n, seed).data; }

void turn(double* re, double* im, double angle) {
  const std::complex<double> y = std::complex<double>(*re, *im) * std::polar(1.0, angle);
  *re = y.real(), *im = y.imag();
}

// The latent behind its RMSNorm.
std::vector<double> normed_latent(const MlaMatrices& m, const std::vector<double>& x) {
  const auto r = int64_t(m.kv_a_norm.size());
  const std::vector<double> row = times(m.kv_a, x, m.kv_a_bias);
  double squares = 0;
  for (int64_t i = 0; i < r; ++i) squares += row[size_t(i)] * row[size_t(i)];
  std::vector<double> latent;
  for (int64_t i = 0; i < r; ++i) latent.push_back(row[size_t(i)] / std::sqrt(squares / double(r) + eps) * m.kv_a_norm[size_t(i)]);
  return latent;
}

// The softmax's argument for query position t and key position s.
double mla_score(const GqaShape& s, int64_t d_R, const MlaMatrices& m, int64_t head, const std::vector<double>& xt,
                 const std::vector<double>& xs, double t, double u) {
  const int64_t d = s.head_dim, r = m.kv_b.cols;
  std::vector<double> q = times(m.q, xt), kv = times(m.kv_b, normed_latent(m, xs)), row = times(m.kv_a, xs, m.kv_a_bias);
  double* qr = q.data() + head * (d + d_R) + d;
  double* kr = row.data() + r;
  for (int64_t p = 0; p < d_R / 2; ++p) {
    const double theta = std::pow(10000.0, -2.0 * double(p) / double(d_R));
    turn(qr + 2 * p, qr + 2 * p + 1, theta * t), turn(kr + 2 * p, kr + 2 * p + 1, theta * u);
  }
  const double still = std::inner_product(q.data() + head * (d + d_R), qr, kv.data() + head * 2 * d, 0.0);
  return (still + std::inner_product(qr, qr + d_R, kr, 0.0)) / std::sqrt(double(d + d_R));
}

double gqa_score(const GqaShape& s, const GqaMatrices& w, int64_t head, const std::vector<double>& xt, const std::vector<double>& xs,
                 double t, double u) {
  std::vector<double> q = times(w.q, xt), k = times(w.k, xs);
  const int64_t d = s.head_dim;
  double* qh = q.data() + head * d;
  double* kh = k.data() + head / (s.heads / s.groups) * d;
  for (int64_t p = 0; p < d / 2; ++p) {
    const double theta = std::pow(10000.0, -2.0 * double(p) / double(d));
    const int64_t re = s.interleaved ? 2 * p : p, im = s.interleaved ? 2 * p + 1 : p + d / 2;
    turn(qh + re, qh + im, theta * t), turn(kh + re, kh + im, theta * u);
  }
  return std::inner_product(qh, qh + d, kh, 0.0) / std::sqrt(double(d));
}

LayerOptions full(const GqaShape& s, int64_t d_R) {
  LayerOptions o;
  o.qk_rope_head_dim = d_R;
  o.kv_lora_rank = std::min(2 * s.groups * s.head_dim, s.hidden) + 1;
  return o;
}

MlaMatrices convert_layer(const GqaShape& s, const GqaMatrices& w, const LayerMoments& moments, const LayerOptions& o, double norm_eps) {
  MlaMatrices m = factor_layer(s, w, moments, o);
  neutralise_norm(m, o.kv_lora_rank, o.latent_norm, moments, norm_eps);
  return m;
}

// The merge of the heads into one latent: at full rank, and without any rotation, nothing is lost, for any rotary width and method.
TEST(ConvertLayer, MergingTheHeadsIsExactAtFullRank) {
  for (bool interleaved : {false, true})
    for (int64_t d_R : {2, 4, 8})
      for (Method method : all_methods) {
        GqaShape s = shape;
        s.interleaved = interleaved;
        const GqaMatrices w = random_weights(s, 1);
        LayerOptions o = full(s, d_R);
        o.method = method;
        const MlaMatrices m = convert_layer(s, w, random_moments(s, 5, false), o, eps);
        const auto xt = random_vector(s.hidden, 7), xs = random_vector(s.hidden, 8);
        const auto v = times(w.v, xs), kv = times(m.kv_b, normed_latent(m, xs));
        for (int64_t h = 0; h < s.heads; ++h) {
          EXPECT_NEAR(mla_score(s, d_R, m, h, xt, xs, 0, 0), gqa_score(s, w, h, xt, xs, 0, 0), 1e-4) << name(method) << " " << d_R;
          for (int64_t i = 0; i < s.head_dim; ++i) EXPECT_NEAR(kv[size_t(h * 16 + 8 + i)], v[size_t(h / 2 * 8 + i)], 1e-4) << name(method);
        }
      }
}

// Heads whose keys are, frequency by frequency, complex multiples of each other lie in one direction across heads: the rotation is exact
// at any distance.
TEST(ConvertLayer, RotatingAcrossHeadsIsExactForKeysInOneDirection) {
  for (bool interleaved : {false, true}) {
    GqaShape s = shape;
    s.interleaved = interleaved;
    GqaMatrices w = random_weights(s, 11);
    for (int64_t p = 0; p < 4; ++p) {
      const int64_t re = interleaved ? 2 * p : p, im = interleaved ? 2 * p + 1 : p + 4;
      const auto c = std::polar(0.5 + double(p), 1.0 + double(p));
      for (int64_t j = 0; j < s.hidden; ++j) {
        const std::complex<double> k = c * std::complex<double>(w.k(re, j), w.k(im, j));
        w.k(8 + re, j) = k.real(), w.k(8 + im, j) = k.imag();
      }
    }
    const MlaMatrices m = convert_layer(s, w, random_moments(s, 15, true), full(s, 8), eps);
    const auto xt = random_vector(s.hidden, 17), xs = random_vector(s.hidden, 18);
    for (int64_t h = 0; h < s.heads; ++h)
      EXPECT_NEAR(mla_score(s, 8, m, h, xt, xs, 900, 23), gqa_score(s, w, h, xt, xs, 900, 23), 1e-4) << h;
  }
}

// A channel that loses its rotation has its constant instead: a layer whose rotary key is empty of it shows z alone.
TEST(ConvertLayer, LostRotationsBecomeTheirConstants) {
  GqaMatrices w = random_weights(shape, 21);
  // Group 1 has pair 3 alone, faint, and independent of group 0's, which takes the rotary key's pair 3.
  for (int64_t p = 0; p < 3; ++p)
    for (int64_t j = 0; j < shape.hidden; ++j) w.k(8 + p, j) = w.k(12 + p, j) = 0;
  for (int64_t j = 0; j < shape.hidden; ++j) {
    w.k(3, j) *= j < 10 ? 1 : 0, w.k(7, j) *= j < 10 ? 1 : 0;
    w.k(11, j) *= j < 10 ? 0 : 0.1, w.k(15, j) *= j < 10 ? 0 : 0.1;
  }
  LayerMoments moments = random_moments(shape, 25, true);
  moments.inputs = identity(shape.hidden);
  LayerOptions o = full(shape, 8);
  o.metric = false;
  const MlaMatrices m = convert_layer(shape, w, moments, o, eps);
  const auto xt = random_vector(shape.hidden, 27), xs = random_vector(shape.hidden, 28);
  const std::vector<double> q = times(w.q, xt), k = times(w.k, xs);
  for (int64_t h : {2, 3}) {
    const std::complex<double> z = moments.constants[size_t(h * 4 + 3)], qc(q[size_t(h * 8 + 3)], q[size_t(h * 8 + 7)]), kc(k[11], k[15]);
    const double wanted = (std::conj(qc) * z * kc).real() / std::sqrt(8.0);
    EXPECT_NEAR(mla_score(shape, 8, m, h, xt, xs, 40, 2), wanted, 1e-4) << h;
  }
}

TEST(ConvertLayer, TheNormIsHarmlessWithAConstantChannel) {
  const GqaMatrices w = random_weights(shape, 31);
  const LayerMoments moments = random_moments(shape, 35, true);
  LayerOptions o = full(shape, 4);
  o.kv_lora_rank = 12;
  const auto distance = [&](LatentNorm norm, double scale) {
    o.latent_norm = norm;
    o.kv_lora_rank = norm == LatentNorm::scale ? 11 : 12;  // as many elements for keys and values
    const MlaMatrices m = convert_layer(shape, w, moments, o, eps);
    Matrix down(o.kv_lora_rank, shape.hidden);
    std::copy_n(m.kv_a.data.begin(), down.data.size(), down.data.begin());
    const double factor = neutral_norm(norm, down, moments, eps).factor;  // which kv_b has, and the norm takes away again
    double worst = 0, largest = 0;
    for (uint64_t seed = 0; seed < 20; ++seed) {
      std::vector<double> x = random_vector(shape.hidden, 40 + seed);
      for (double& v : x) v *= scale;
      // Without the norm, W_UK and W_UV meet the latent itself.
      const std::vector<double> latent = normed_latent(m, x), row = times(m.kv_a, x);
      std::vector<double> plain(row.begin(), row.begin() + o.kv_lora_rank);
      if (norm == LatentNorm::constant) plain[11] = 0;
      const std::vector<double> with = times(m.kv_b, latent), without = times(m.kv_b, plain);
      for (size_t i = 0; i < with.size(); ++i)
        worst = std::max(worst, std::fabs(with[i] - without[i] / factor)), largest = std::max(largest, std::fabs(with[i]));
      if (norm == LatentNorm::constant) {
        EXPECT_EQ(latent[11], 0);  // nothing of it in the cache
        double rms = 0;
        for (size_t i = 0; i < 12; ++i) rms += std::pow(row[i] + m.kv_a_bias[i], 2);
        EXPECT_NEAR(std::sqrt(rms / 12 + eps) / (m.kv_a_bias[11] / std::sqrt(12.0)), 1, 1e-4);
      }
    }
    return worst / largest;
  };
  EXPECT_LT(distance(LatentNorm::constant, 1), 1e-5);
  EXPECT_LT(distance(LatentNorm::constant, 8), 1e-4);  // inputs far from what was calibrated
  EXPECT_GT(distance(LatentNorm::scale, 1), 1e-2);
}

// With less rank than channels, the metric makes the scores nearer than no metric does, and activations nearer than none.
TEST(ConvertLayer, WeightsBringScoresAndValuesNearer) {
  const GqaMatrices w = random_weights(shape, 51);
  GqaMatrices skewed = w;
  for (int64_t i = 0; i < skewed.q.rows; ++i)
    for (int64_t j = 0; j < shape.hidden; ++j) skewed.q(i, j) *= i % 8 < 2 ? 4 : 0.2;
  LayerMoments moments = random_moments(shape, 55, false);
  const Matrix stretch = random_matrix(shape.hidden, 3, 56);
  const Matrix few = multiply(stretch, stretch, Transposed::right);
  for (size_t i = 0; i < few.data.size(); ++i) moments.inputs.data[i] = 0.01 * moments.inputs.data[i] + few.data[i];
  const Matrix root = symmetric_power(moments.inputs, 0.5);
  const auto missed = [&](bool activations, bool metric) {
    LayerOptions o = full(shape, 2);
    o.kv_lora_rank = 6;
    o.activations = activations, o.metric = metric;
    const MlaMatrices m = convert_layer(shape, skewed, moments, o, eps);
    double sum = 0;
    for (uint64_t seed = 0; seed < 50; ++seed) {
      const auto xt = times(root, random_vector(shape.hidden, 60 + seed)), xs = times(root, random_vector(shape.hidden, 200 + seed));
      for (int64_t h = 0; h < shape.heads; ++h)
        sum += std::pow(mla_score(shape, 2, m, h, xt, xs, 0, 0) - gqa_score(shape, skewed, h, xt, xs, 0, 0), 2);
    }
    return sum;
  };
  const double none = missed(false, false), activations = missed(true, false), both = missed(true, true);
  EXPECT_LT(activations, none);
  EXPECT_LT(both, activations);
}

// Scales a pair of a head's rows to a norm.
void set_norm(const GqaShape& s, Matrix& w, int64_t head, int64_t pair, double norm) {
  const int64_t re = head * s.head_dim + (s.interleaved ? 2 * pair : pair), im = re + (s.interleaved ? 1 : s.pairs());
  double squares = 0;
  for (int64_t r : {re, im}) squares += std::inner_product(w.row(r), w.row(r) + w.cols, w.row(r), 0.0);
  for (int64_t r : {re, im})
    for (int64_t j = 0; j < w.cols; ++j) w(r, j) *= norm / std::sqrt(squares);
}

// All norms 1 but a few: of pairs 0 and 1 head group 1's pair 1 has the largest Σ|q| |k|, though not the largest |q| or |k|; of pairs 2 and
// 3 group 0's pair 3, though its queries' root mean square is not the largest.
GqaMatrices weights_of_known_norms(const GqaShape& s, uint64_t seed) {
  GqaMatrices w = random_weights(s, seed);
  for (int64_t p = 0; p < s.pairs(); ++p) {
    for (int64_t h = 0; h < s.heads; ++h) set_norm(s, w.q, h, p, 1);
    for (int64_t g = 0; g < s.groups; ++g) set_norm(s, w.k, g, p, 1);
  }
  set_norm(s, w.k, 1, 1, 3), set_norm(s, w.q, 2, 1, 3), set_norm(s, w.q, 3, 1, 3);
  set_norm(s, w.k, 0, 0, 6), set_norm(s, w.q, 0, 1, 6), set_norm(s, w.q, 1, 1, 6);
  set_norm(s, w.q, 0, 2, 10), set_norm(s, w.q, 0, 3, 6), set_norm(s, w.q, 1, 3, 6);
  return w;
}

// up · down of a layer as [W_K; W_V] of the groups.
Matrix latent_product(const GqaShape& s, const MlaMatrices& m) {
  const int64_t d = s.head_dim, n = s.groups * d;
  Matrix down(m.kv_b.cols, s.hidden), up(2 * n, m.kv_b.cols);
  std::copy_n(m.kv_a.data.begin(), down.data.size(), down.data.begin());
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t i = 0; i < d; ++i) {
      const int64_t row = g * (s.heads / s.groups) * 2 * d + i;
      std::copy_n(m.kv_b.row(row), up.cols, up.row(g * d + i));
      std::copy_n(m.kv_b.row(row + d), up.cols, up.row(n + g * d + i));
    }
  return multiply(up, down);
}

// [W_K without the pairs (1, 1) and (0, 3); W_V], values times a factor.
Matrix keys_left_and_values(const GqaMatrices& w, double factor) {
  Matrix joint(w.k.rows + w.v.rows, w.k.cols);
  std::copy(w.k.data.begin(), w.k.data.end(), joint.data.begin());
  for (int64_t r : {8 + 1, 8 + 5, 3, 7}) std::fill_n(joint.row(r), joint.cols, 0);
  for (size_t i = 0; i < w.v.data.size(); ++i) joint.data[w.k.data.size() + i] = factor * w.v.data[i];
  return joint;
}

Matrix truncated(const Matrix& a, int64_t rank) {
  Svd f = svd(a);
  Matrix out(a.rows, a.cols);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t k = 0; k < rank; ++k)
      for (int64_t j = 0; j < a.cols; ++j) out(i, j) += f.u(i, k) * f.s[size_t(k)] * f.vt(k, j);
  return out;
}

// One pair of one head goes to each rotary pair as it is, for its own queries alone; all else is the latent's.
TEST(ConvertLayer, NormsChooseOnePairOfOneHead) {
  for (bool interleaved : {false, true}) {
    GqaShape s = shape;
    s.interleaved = interleaved;
    const GqaMatrices w = weights_of_known_norms(s, 61);
    const auto row = [&](int64_t head, int64_t pair, int64_t part) { return head * 8 + (interleaved ? 2 * pair + part : pair + 4 * part); };
    LayerMoments moments = random_moments(s, 65, false);
    LayerOptions o = full(s, 4);
    o.rotary = Rotary::norm;
    const auto expect_chosen = [&](int64_t slot, int64_t group, int64_t pair) {
      const MlaMatrices m = factor_layer(s, w, moments, o);
      for (int64_t part : {0, 1})
        for (int64_t j = 0; j < s.hidden; ++j) {
          EXPECT_NEAR(m.kv_a(o.kv_lora_rank + 2 * slot + part, j), w.k(row(group, pair, part), j), 1e-12);
          for (int64_t h = 0; h < s.heads; ++h)
            EXPECT_NEAR(m.q(h * 12 + 8 + 2 * slot + part, j), h / 2 == group ? std::sqrt(1.5) * w.q(row(h, pair, part), j) : 0, 1e-12) << h;
        }
      const Matrix latent = latent_product(s, m);  // whose heads are [real | imaginary]
      for (int64_t part : {0, 1})
        for (int64_t j = 0; j < s.hidden; ++j) EXPECT_NEAR(latent(group * 8 + pair + 4 * part, j), 0, 1e-8);
    };
    o.activations = false;
    for (bool metric : {false, true}) {
      o.metric = metric;
      expect_chosen(0, 1, 1);
      expect_chosen(1, 0, 3);
    }
    o.slots = {{0}, {2, 3}};  // what a slot does not stand for it does not choose
    expect_chosen(0, 0, 0);
    o.slots.clear();
    // With activations norms are those of queries and keys: few inputs are in the directions of pair (1, 1), many in those of (0, 0).
    o.activations = true;
    moments.inputs = identity(s.hidden);
    Matrix& c = moments.inputs;
    for (int64_t part : {0, 1})
      for (int64_t i = 0; i < s.hidden; ++i)
        for (int64_t j = 0; j < s.hidden; ++j) c(i, j) += 1e3 * w.k(row(0, 0, part), i) * w.k(row(0, 0, part), j);
    expect_chosen(0, 0, 0);
  }
}

// Without weights and balance the factorisation is the SVD of keys and values as they are, β being the values' factor.
TEST(ConvertLayer, WithoutBalanceKeysAndValuesAreOneMatrix) {
  GqaMatrices w = weights_of_known_norms(shape, 71);
  for (double& x : w.v.data) x *= 0.1;
  LayerOptions o = full(shape, 4);
  o.rotary = Rotary::norm;
  o.kv_lora_rank = 7;
  o.activations = o.metric = o.balance = false;
  const LayerMoments moments = random_moments(shape, 75, false);
  const auto product = [&] { return latent_product(shape, factor_layer(shape, w, moments, o)); };
  for (double share : {1.0, 4.0}) {
    o.value_share = share;
    Matrix wanted = truncated(keys_left_and_values(w, std::sqrt(share)), 6);
    for (size_t i = w.k.data.size(); i < wanted.data.size(); ++i) wanted.data[i] /= std::sqrt(share);
    EXPECT_LT(frobenius_norm(difference(product(), wanted)), 1e-8) << share;
  }
  o.value_share = 1;
  const Matrix joint = keys_left_and_values(w, 1);
  const double plain = frobenius_norm(difference(joint, product()));
  o.balance = true;
  EXPECT_GT(frobenius_norm(difference(joint, product())), 1.1 * plain);
}

TEST(ConvertLayer, RefusesSizesThatDoNotFit) {
  const auto refused = [](const std::function<void(LayerOptions&)>& change, const char* said) {
    LayerOptions o = full(shape, 8);
    change(o);
    try {
      check_layer_options(shape, o);
      FAIL() << said;
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::input);
      EXPECT_NE(std::string(e.what()).find(said), std::string::npos) << e.what();
    }
  };
  for (int64_t d_R : {0, 1, 3, 6, 16, -2}) refused([&](LayerOptions& o) { o.qk_rope_head_dim = d_R; }, "rotary width");
  refused([](LayerOptions& o) { o.kv_lora_rank = 1; }, "too small");
  refused([](LayerOptions& o) { o.kv_lora_rank = 22; }, "more than full rank");
  refused([](LayerOptions& o) { o.value_share = 0; }, "above 0");
}

}  // namespace
}  // namespace mla::test
