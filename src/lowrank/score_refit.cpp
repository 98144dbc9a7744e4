// Newton steps with a Kronecker-factored Hessian, one head at a time, over windows held in memory.
#include "lowrank/score_refit.h"

#include "core/threads.h"
#include "lowrank/layer_run.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace mla {
namespace {

constexpr double damping = 1e-3;  // of the mean diagonal, in both factors

// Scores are formed a tile of queries at a time, which stays in the cache and leaves out what no query of it sees.
constexpr int64_t tile_rows = 128;

class HeadRefit {
 public:
  HeadRefit(const ScoreShape& s, int64_t head, std::span<const ScoreWindow> windows, Matrix query)  // query: this head's rows of W_Q
      : s_(s), head_(head), T_(s.window), width_(s.gqa.head_dim + s.d_R), query_(std::move(query)) {
    for (int64_t t = 0; t < T_; ++t)
      for (double f : s.frequencies) turns_.push_back(float(std::cos(f * double(t)))), turns_.push_back(float(std::sin(f * double(t))));
    for (const ScoreWindow& w : windows) windows_.push_back({&w, keys(w), queries(w, query_), {}, {}});
  }

  // One step; inverse: of C. Returns Σ P e² before it and, in a quadratic's eyes, behind it.
  std::pair<double, double> step(const Matrix& inverse) {
    gradient_ = Matrix(width_, s_.gqa.hidden), covariance_ = Matrix(width_, width_);
    double error = 0, slope = 0, curvature = 1e-30;
    for (Window& w : windows_) error += add_gradient(w);
    const Matrix delta = multiply(scaled_gradient(), inverse);
    for (size_t i = 0; i < delta.data.size(); ++i) slope += gradient_.data[i] * delta.data[i];
    for (Window& w : windows_) curvature += move(w, delta);
    const double far = slope / curvature;
    for (size_t i = 0; i < delta.data.size(); ++i) query_.data[i] += far * delta.data[i];
    for (Window& w : windows_)
      for (size_t i = 0; i < w.queries.size(); ++i) w.queries[i] += float(far) * w.moved[i];
    return {error, error - slope * far};
  }

  const Matrix& query() const { return query_; }

 private:
  struct Window {
    const ScoreWindow* given;
    std::vector<float> keys, queries, moved;  // of this head; moved: what the queries gain by a step of 1 [T, d + d_R]
    std::vector<float> attention;             // the mean of both, tile after tile
  };
  struct Tile {
    int64_t from, rows, cols;  // queries, and the keys that the last of them sees
    float* attention;
  };

  // What the scores lack, by what they meet, is the gradient; the keys' covariance under attention goes with it. Returns Σ P e².
  double add_gradient(Window& w) {
    const GqaShape& g = s_.gqa;
    const int64_t d = g.head_dim, group = head_ / (g.heads / g.groups);
    std::vector<float> pulls(size_t(T_ * width_)), means(size_t(T_ * width_)), received(static_cast<size_t>(T_));
    std::vector<float> theirs(size_t(tile_rows * T_)), ours(size_t(tile_rows * T_)), errors(size_t(tile_rows * T_));
    double error = 0;
    each_tile(w, [&](const Tile& t) {
      score(t, w.given->query.data() + head_ * d, g.heads * d, w.given->key.data() + group * d, g.groups * d, d, s_.scale, theirs.data());
      score(t, w.queries.data(), width_, w.keys.data(), width_, width_, s_.fitted_scale, ours.data());
      for (int64_t i = 0; i < t.rows * t.cols; ++i) errors[size_t(i)] = theirs[size_t(i)] - ours[size_t(i)];
      causal_softmax(theirs.data(), t.from, t.rows, t.cols);
      causal_softmax(ours.data(), t.from, t.rows, t.cols);
      for (int64_t i = 0; i < t.rows * t.cols; ++i) t.attention[i] = (theirs[size_t(i)] + ours[size_t(i)]) / 2;
      for (int64_t i = 0; i < t.rows; ++i) {
        error += weigh(t, i, errors.data());
        for (int64_t s = 0; s < t.cols; ++s) received[size_t(s)] += t.attention[i * t.cols + s];
      }
      times_keys(t, t.attention, w.keys, 1, means.data());
      times_keys(t, errors.data(), w.keys, s_.fitted_scale, pulls.data());
    });
    for (int64_t t = 0; t < T_; ++t) turn(pulls.data() + t * width_ + d, t, true);
    const auto D = blasint(g.hidden), n = blasint(width_);
    std::vector<float> sum(gradient_.data.size());
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, n, D, blasint(T_), 1, pulls.data(), n, w.given->inputs.data(), D, 0, sum.data(),
                D);
    for (size_t i = 0; i < sum.size(); ++i) gradient_.data[i] += double(sum[i]);
    add_covariance(w.keys, received, means);
    return error;
  }

  // K⁻¹ G; the part that meets the rotary key turns with the query, so its covariance is taken pair by pair.
  Matrix scaled_gradient() const {
    const int64_t d = s_.gqa.head_dim, D = s_.gqa.hidden;
    Matrix still(d, d), right(d, D), out = gradient_;
    double ridge = 1e-30;  // of the whole: where one part's keys are nothing but rounding, nothing is to be fitted to them
    for (int64_t i = 0; i < width_; ++i) ridge += damping * covariance_(i, i) / double(width_);
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j) still(i, j) = covariance_(i, j) + (i == j ? ridge : 0);
    std::copy_n(gradient_.data.begin(), right.data.size(), right.data.begin());
    // A difference of f32 sums, so that small eigenvalues may come out below 0.
    const Matrix solved = multiply(symmetric_power(still, -1, damping), right);
    std::copy(solved.data.begin(), solved.data.end(), out.data.begin());
    for (int64_t i = d; i < width_; i += 2) {
      const double energy = std::max((covariance_(i, i) + covariance_(i + 1, i + 1)) / 2, 0.0) + ridge;
      for (int64_t j = 0; j < D; ++j) out(i, j) /= energy, out(i + 1, j) /= energy;
    }
    return out;
  }

  // What a step of 1 along delta adds to the queries, and Σ P ds² of what it adds to the scores, each query's mean taken off.
  double move(Window& w, const Matrix& delta) {
    w.moved = queries(*w.given, delta);
    std::vector<float> change(size_t(tile_rows * T_));
    double curvature = 0;
    each_tile(w, [&](const Tile& t) {
      score(t, w.moved.data(), width_, w.keys.data(), width_, width_, s_.fitted_scale, change.data());
      for (int64_t i = 0; i < t.rows; ++i) curvature += weigh(t, i, change.data());
    });
    return curvature;
  }

  // Row i of a tile less its mean under attention, times attention; 0 where its query does not see. Returns Σ P x² of what is weighed.
  static double weigh(const Tile& t, int64_t i, float* scores) {
    float* row = scores + i * t.cols;
    const float* p = t.attention + i * t.cols;
    const int64_t seen = t.from + i + 1;
    const float mean = cblas_sdot(blasint(seen), p, 1, row, 1);
    constexpr int64_t lanes = 8;  // of the sum, so that compilers may turn it into vectors
    float squares[lanes] = {};
    const auto one = [&](int64_t s, int64_t lane) {
      const float x = row[s] - mean;
      row[s] = p[s] * x;
      squares[lane] += row[s] * x;
    };
    int64_t s = 0;
    for (; s + lanes <= seen; s += lanes)
      for (int64_t lane = 0; lane < lanes; ++lane) one(s + lane, lane);
    for (; s < seen; ++s) one(s, 0);
    std::fill(row + seen, row + t.cols, 0.0F);
    return std::accumulate(squares, squares + 8, 0.0);
  }

  // The keys of this head [T, d + d_R].
  std::vector<float> keys(const ScoreWindow& w) const {
    const int64_t d = s_.gqa.head_dim;
    std::vector<float> out(size_t(T_ * width_));
    for (int64_t t = 0; t < T_; ++t) {
      std::copy_n(w.still.data() + (t * s_.gqa.heads + head_) * d, d, out.data() + t * width_);
      std::copy_n(w.rotary.data() + t * s_.d_R, s_.d_R, out.data() + t * width_ + d);
    }
    return out;
  }

  // The queries of these rows of W_Q [T, d + d_R].
  std::vector<float> queries(const ScoreWindow& w, const Matrix& rows) const {
    const std::vector<float> narrow(rows.data.begin(), rows.data.end());
    std::vector<float> out(size_t(T_ * width_));
    const auto D = blasint(s_.gqa.hidden);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, blasint(T_), blasint(width_), D, 1, w.inputs.data(), D, narrow.data(), D, 0,
                out.data(), blasint(width_));
    for (int64_t t = 0; t < T_; ++t) turn(out.data() + t * width_ + s_.gqa.head_dim, t);
    return out;
  }

  // A rotary part by the angles of position t, or back by them.
  void turn(float* row, int64_t t, bool back = false) const {
    const auto n = int64_t(s_.frequencies.size());
    for (int64_t p = 0; p < n; ++p) {
      const float c = turns_[size_t(2 * (t * n + p))], s = turns_[size_t(2 * (t * n + p) + 1)] * (back ? -1.0F : 1.0F);
      const float re = row[2 * p], im = row[2 * p + 1];
      row[2 * p] = re * c - im * s, row[2 * p + 1] = re * s + im * c;
    }
  }

  template <class What>
  void each_tile(Window& w, const What& what) const {
    int64_t size = 0;
    for (int64_t from = 0; from < T_; from += tile_rows) size += std::min(tile_rows, T_ - from) * std::min(from + tile_rows, T_);
    w.attention.resize(size_t(size));
    float* attention = w.attention.data();
    for (int64_t from = 0; from < T_; from += tile_rows) {
      const int64_t rows = std::min(tile_rows, T_ - from), cols = from + rows;
      what(Tile{from, rows, cols, attention});
      attention += rows * cols;
    }
  }

  static void score(const Tile& t, const float* q, int64_t q_stride, const float* k, int64_t k_stride, int64_t width, float scale,
                    float* out) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, blasint(t.rows), blasint(t.cols), blasint(width), scale, q + t.from * q_stride,
                blasint(q_stride), k, blasint(k_stride), 0, out, blasint(t.cols));
  }
  void times_keys(const Tile& t, const float* weights, const std::vector<float>& keys, float scale, float* out) const {
    const auto n = blasint(width_);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, blasint(t.rows), n, blasint(t.cols), scale, weights, blasint(t.cols),
                keys.data(), n, 0, out + t.from * width_, n);
  }

  void add_covariance(const std::vector<float>& keys, const std::vector<float>& received, const std::vector<float>& means) {
    std::vector<float> scaled = keys, sum(covariance_.data.size());
    for (int64_t t = 0; t < T_; ++t)
      for (int64_t i = 0; i < width_; ++i) scaled[size_t(t * width_ + i)] *= received[size_t(t)];
    const auto n = blasint(width_), rows = blasint(T_);
    const float square = s_.fitted_scale * s_.fitted_scale;
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, n, n, rows, square, scaled.data(), n, keys.data(), n, 0, sum.data(), n);
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, n, n, rows, -square, means.data(), n, means.data(), n, 1, sum.data(), n);
    for (size_t i = 0; i < sum.size(); ++i) covariance_.data[i] += double(sum[i]);
  }

  const ScoreShape& s_;
  int64_t head_, T_, width_;
  Matrix query_;
  std::vector<float> turns_;  // cosine and sine [T, d_R/2, 2]
  std::vector<Window> windows_;
  Matrix gradient_, covariance_;  // [d + d_R, D], [d + d_R, d + d_R]
};

}  // namespace

double refit_queries(Matrix& q, std::span<const ScoreWindow> windows, const ScoreShape& shape, const Matrix& inputs, int steps,
                     Threads& threads) {
  const int64_t h = shape.gqa.heads, width = shape.gqa.head_dim + shape.d_R, D = shape.gqa.hidden;
  double trace = 0;
  for (int64_t i = 0; i < D; ++i) trace += inputs(i, i);
  const Matrix inverse = solve_ridge(inputs, damping * trace / double(D), identity(D));
  std::vector<double> before(size_t(h), 0), after(size_t(h), 0);
  threads.parallel(h, [&](int64_t head, int) {
    Matrix rows(width, D);
    std::copy_n(q.row(head * width), rows.data.size(), rows.data.begin());
    HeadRefit refit(shape, head, windows, std::move(rows));
    for (int step = 0; step < steps; ++step) {
      const auto [error, left] = refit.step(inverse);
      if (step == 0) before[size_t(head)] = error;
      after[size_t(head)] = left;
    }
    std::ranges::copy(refit.query().data, q.row(head * width));
  });
  return std::accumulate(after.begin(), after.end(), 0.0) / std::max(std::accumulate(before.begin(), before.end(), 0.0), 1e-30);
}

}  // namespace mla
