// Newton steps with a Kronecker-factored Hessian, one head at a time, over windows held in memory.
#include "lowrank/score_refit.h"

#include "core/threads.h"
#include "lowrank/layer_run.h"

#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mla {
namespace {

constexpr double damping = 1e-3;  // of the mean diagonal, in both factors

// Scores are formed a tile of queries at a time, which stays in the cache and leaves out what no query of it sees.
constexpr int64_t tile_rows = 128;

class HeadRefit {
 public:
  HeadRefit(const ScoreShape& s, int64_t head, Matrix query)  // query: this head's rows of W_Q
      : s_(s),
        head_(head),
        T_(s.window),
        width_(s.gqa.head_dim + s.d_R),
        query_(std::move(query)),
        gradient_(width_, s.gqa.hidden),
        covariance_(width_, width_) {
    for (int64_t t = 0; t < T_; ++t)
      for (double f : s.frequencies) turns_.push_back(float(std::cos(f * double(t)))), turns_.push_back(float(std::sin(f * double(t))));
  }

  void add_gradient(const ScoreWindow& w) {
    gather(w);
    std::vector<float> pulls(size_t(T_ * width_)), means(size_t(T_ * width_)), received(static_cast<size_t>(T_));
    each_tile(w, [&](const Tile& t) {
      for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t s = 0; s < t.cols; ++s) received[size_t(s)] += attention_[size_t(i * t.cols + s)];
      times_keys(t, attention_.data(), 1, means.data() + t.from * width_);
      for (int64_t i = 0; i < t.rows * t.cols; ++i) errors_[size_t(i)] *= attention_[size_t(i)];
      times_keys(t, errors_.data(), s_.fitted_scale, pulls.data() + t.from * width_);
    });
    for (int64_t t = 0; t < T_; ++t) turn(pulls.data() + t * width_ + s_.gqa.head_dim, t, true);
    const auto D = blasint(s_.gqa.hidden);
    std::vector<float> sum(gradient_.data.size());
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, blasint(width_), D, blasint(T_), 1, pulls.data(), blasint(width_), w.inputs.data(),
                D, 0, sum.data(), D);
    for (size_t i = 0; i < sum.size(); ++i) gradient_.data[i] += double(sum[i]);
    add_covariance(received, means);
  }

  // K⁻¹ G; the part that meets the rotary key turns with the query, so its covariance is taken pair by pair.
  Matrix direction() const {
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

  // What a step along `delta` would do: Σ P e ds, Σ P ds² and Σ P e².
  void add_curve(const ScoreWindow& w, const Matrix& delta, double& slope, double& curvature, double& error) {
    gather(w);
    const std::vector<float> moved = queries(w, delta);
    std::vector<float> change(size_t(tile_rows * T_));
    each_tile(w, [&](const Tile& t) {
      score(t, moved.data(), width_, keys_.data(), width_, width_, s_.fitted_scale, change.data());
      for (int64_t i = 0; i < t.rows; ++i) {
        centre(t, i, change.data());
        float a = 0, b = 0, c = 0;
        for (int64_t s = i * t.cols; s < (i + 1) * t.cols; ++s) {
          const float p = attention_[size_t(s)], e = errors_[size_t(s)], ds = change[size_t(s)];
          a += p * e * ds, b += p * ds * ds, c += p * e * e;
        }
        slope += double(a), curvature += double(b), error += double(c);
      }
    });
  }

 private:
  struct Tile {
    int64_t from, rows, cols;  // queries, and the keys that the last of them sees
  };

  // Keys and queries of this head.
  void gather(const ScoreWindow& w) {
    const int64_t d = s_.gqa.head_dim;
    keys_.resize(size_t(T_ * width_));
    for (int64_t t = 0; t < T_; ++t) {
      std::copy_n(w.still.data() + (t * s_.gqa.heads + head_) * d, d, keys_.data() + t * width_);
      std::copy_n(w.rotary.data() + t * s_.d_R, s_.d_R, keys_.data() + t * width_ + d);
    }
    fitted_ = queries(w, query_);
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

  // Calls what(tile) with both attentions' mean in attention_ and, in errors_, what the scores lack, less each query's mean.
  template <class What>
  void each_tile(const ScoreWindow& w, const What& what) {
    const GqaShape& g = s_.gqa;
    const int64_t d = g.head_dim, group = head_ / (g.heads / g.groups);
    attention_.resize(size_t(tile_rows * T_)), errors_.resize(attention_.size()), now_.resize(attention_.size());
    for (int64_t from = 0; from < T_; from += tile_rows) {
      const int64_t rows = std::min(tile_rows, T_ - from);
      const Tile t{from, rows, from + rows};
      score(t, w.query.data() + head_ * d, g.heads * d, w.key.data() + group * d, g.groups * d, d, s_.scale, errors_.data());
      score(t, fitted_.data(), width_, keys_.data(), width_, width_, s_.fitted_scale, now_.data());
      std::copy_n(errors_.begin(), rows * t.cols, attention_.begin());
      for (int64_t i = 0; i < rows * t.cols; ++i) errors_[size_t(i)] -= now_[size_t(i)];
      causal_softmax(attention_.data(), from, rows, t.cols);
      causal_softmax(now_.data(), from, rows, t.cols);
      for (int64_t i = 0; i < rows * t.cols; ++i) attention_[size_t(i)] = (attention_[size_t(i)] + now_[size_t(i)]) / 2;
      for (int64_t i = 0; i < rows; ++i) centre(t, i, errors_.data());
      what(t);
    }
  }

  void score(const Tile& t, const float* q, int64_t q_stride, const float* k, int64_t k_stride, int64_t width, float scale,
             float* out) const {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, blasint(t.rows), blasint(t.cols), blasint(width), scale, q + t.from * q_stride,
                blasint(q_stride), k, blasint(k_stride), 0, out, blasint(t.cols));
  }
  void times_keys(const Tile& t, const float* weights, float scale, float* out) const {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, blasint(t.rows), blasint(width_), blasint(t.cols), scale, weights,
                blasint(t.cols), keys_.data(), blasint(width_), 0, out, blasint(width_));
  }

  // A row of the tile less its mean under attention; 0 where its query does not see.
  void centre(const Tile& t, int64_t i, float* scores) const {
    float* row = scores + i * t.cols;
    const float* p = attention_.data() + i * t.cols;
    const int64_t seen = t.from + i + 1;
    float mean = 0;
    for (int64_t s = 0; s < seen; ++s) mean += p[s] * row[s];
    for (int64_t s = 0; s < seen; ++s) row[s] -= mean;
    std::fill(row + seen, row + t.cols, 0.0F);
  }

  void add_covariance(const std::vector<float>& received, const std::vector<float>& means) {
    std::vector<float> scaled = keys_, sum(covariance_.data.size());
    for (int64_t t = 0; t < T_; ++t)
      for (int64_t i = 0; i < width_; ++i) scaled[size_t(t * width_ + i)] *= received[size_t(t)];
    const auto n = blasint(width_), rows = blasint(T_);
    const float square = s_.fitted_scale * s_.fitted_scale;
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, n, n, rows, square, scaled.data(), n, keys_.data(), n, 0, sum.data(), n);
    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, n, n, rows, -square, means.data(), n, means.data(), n, 1, sum.data(), n);
    for (size_t i = 0; i < sum.size(); ++i) covariance_.data[i] += double(sum[i]);
  }

  const ScoreShape& s_;
  int64_t head_, T_, width_;
  Matrix query_;
  std::vector<float> turns_;                     // cosine and sine [T, d_R/2, 2]
  std::vector<float> keys_, fitted_;             // [T, d + d_R]
  std::vector<float> errors_, attention_, now_;  // of a tile
  Matrix gradient_, covariance_;                 // [d + d_R, D], [d + d_R, d + d_R]
};

}  // namespace

double refit_queries(Matrix& q, std::span<const ScoreWindow> windows, const ScoreShape& shape, const Matrix& inputs, int steps,
                     Threads& threads) {
  const int64_t h = shape.gqa.heads, width = shape.gqa.head_dim + shape.d_R, D = shape.gqa.hidden;
  double trace = 0;
  for (int64_t i = 0; i < D; ++i) trace += inputs(i, i);
  const double ridge = damping * trace / double(D);
  const auto rows_of = [&](const Matrix& all, int64_t head) {
    Matrix rows(width, D);
    std::copy_n(all.row(head * width), rows.data.size(), rows.data.begin());
    return rows;
  };
  std::vector<double> before(size_t(h), 0), after(size_t(h), 0);
  for (int step = 0; step < steps; ++step) {
    Matrix directions(h * width, D);
    threads.parallel(h, [&](int64_t head, int) {
      HeadRefit refit(shape, head, rows_of(q, head));
      for (const ScoreWindow& w : windows) refit.add_gradient(w);
      const Matrix direction = refit.direction();
      std::copy(direction.data.begin(), direction.data.end(), directions.row(head * width));
    });
    directions = transpose(solve_ridge(inputs, ridge, transpose(directions)));
    threads.parallel(h, [&](int64_t head, int) {
      const Matrix delta = rows_of(directions, head);
      HeadRefit refit(shape, head, rows_of(q, head));
      double slope = 0, curvature = 1e-30, error = 0;
      for (const ScoreWindow& w : windows) refit.add_curve(w, delta, slope, curvature, error);
      const double far = slope / curvature;
      for (size_t i = 0; i < delta.data.size(); ++i) q.data[size_t(head * width * D) + i] += far * delta.data[i];
      if (step == 0) before[size_t(head)] = error;
      after[size_t(head)] = error - slope * far;
    });
  }
  return std::accumulate(after.begin(), after.end(), 0.0) / std::max(std::accumulate(before.begin(), before.end(), 0.0), 1e-30);
}

}  // namespace mla
