// subject_mask for one instruction set (LR_ISA). In double: the maps are small, and a threshold magnifies rounding.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "params.h"

namespace lr::LR_ISA {
namespace {

constexpr int kOtsuBins = 256;

// Not std::vector<double>: the linker would keep one copy of its functions for all instruction sets, which may use
// instructions that this processor lacks.
template <class T>
struct Array {
  explicit Array(int64_t n) : data(new T[n]) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { delete[] data; }
  T* const data;
};

// [l, pixels] -> [pixels] in [0, 1]; false where the mean is constant or not finite.
bool normalized_mean(const float* maps, int64_t l, int64_t pixels, double* mean) {
  std::fill(mean, mean + pixels, 0.0);
  for (int64_t k = 0; k < l; ++k)
    for (int64_t i = 0; i < pixels; ++i) mean[i] += maps[k * pixels + i];
  double low = INFINITY, high = -INFINITY;
  bool finite = true;
  for (int64_t i = 0; i < pixels; ++i) {
    mean[i] /= static_cast<double>(l);
    low = std::min(low, mean[i]);
    high = std::max(high, mean[i]);
    finite &= std::isfinite(mean[i]);
  }
  if (!finite || !(high > low)) return false;
  for (int64_t i = 0; i < pixels; ++i) mean[i] = (mean[i] - low) / (high - low);
  return true;
}

// Where an output coordinate reads: (1 - share) * in[first] + share * in[second], half-pixel centres.
struct Tap {
  int64_t first, second;
  double share;
};

Tap tap(int64_t i, int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double x = std::max(0.0, scale * (static_cast<double>(i) + 0.5) - 0.5);
  const int64_t first = std::min(static_cast<int64_t>(x), in - 1);
  return {first, std::min(first + 1, in - 1), std::min(1.0, x - static_cast<double>(first))};
}

// Exactly a where both are a: pixels past the last source pixel stay equal, as a quantile needs.
double between(double a, double b, double share) { return a + share * (b - a); }

void resize(const double* in, int64_t h, int64_t w, double* out, int64_t out_h, int64_t out_w) {
  const Array<Tap> columns(out_w);
  for (int64_t i = 0; i < out_w; ++i) columns.data[i] = tap(i, w, out_w);
  for (int64_t i = 0; i < out_h; ++i) {
    const Tap y = tap(i, h, out_h);
    const double *top = in + y.first * w, *bottom = in + y.second * w;
    for (int64_t j = 0; j < out_w; ++j) {
      const Tap x = columns.data[j];
      out[i * out_w + j] = between(between(top[x.first], top[x.second], x.share),
                                   between(bottom[x.first], bottom[x.second], x.share), y.share);
    }
  }
}

// Mean over a square of the given side around each pixel, edges repeated; `sums` has the size of the image.
void smooth(double* image, int64_t h, int64_t w, int64_t side, double* sums) {
  const int64_t half = side / 2;
  for (int64_t y = 0; y < h; ++y)
    for (int64_t x = 0; x < w; ++x) {
      double sum = 0;
      for (int64_t k = x - half; k <= x + half; ++k) sum += image[y * w + std::clamp<int64_t>(k, 0, w - 1)];
      sums[y * w + x] = sum;
    }
  for (int64_t y = 0; y < h; ++y) {
    double* row = image + y * w;
    std::fill(row, row + w, 0.0);
    for (int64_t k = y - half; k <= y + half; ++k) {
      const double* other = sums + std::clamp<int64_t>(k, 0, h - 1) * w;
      for (int64_t x = 0; x < w; ++x) row[x] += other[x];
    }
    for (int64_t x = 0; x < w; ++x) row[x] /= static_cast<double>(side * side);
  }
}

// Upper edge of the first bin that maximizes the between-class variance: N. Otsu, IEEE Trans. SMC 9(1), 1979.
double otsu_threshold(const double* image, int64_t pixels) {
  double counts[kOtsuBins] = {};
  for (int64_t i = 0; i < pixels; ++i)
    counts[std::clamp(static_cast<int>(image[i] * kOtsuBins), 0, kOtsuBins - 1)] += 1;
  double n = 0, s = 0;
  for (int k = 0; k < kOtsuBins; ++k) {
    n += counts[k];
    s += counts[k] * k;
  }
  double n_below = 0, s_below = 0, best = -1;
  int bin = 0;
  for (int k = 0; k < kOtsuBins; ++k) {
    n_below += counts[k];
    s_below += counts[k] * k;
    const double split = n_below * (n - n_below), difference = s * n_below - s_below * n;
    const double variance = split > 0 ? difference * difference / split : -1;
    if (variance > best) {
      best = variance;
      bin = k;
    }
  }
  return (bin + 1.0) / kOtsuBins;
}

// The value of a rank in ascending order. Bytes of non-negative doubles order as the numbers do, so eight histograms
// of the values that share the bytes found so far lead there.
double value_of_rank(const double* image, int64_t pixels, int64_t rank) {
  uint64_t found = 0, mask = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < pixels; ++i) {
      uint64_t bits;
      std::memcpy(&bits, image + i, 8);
      counts[bits >> shift & 255] += (bits & mask) == found;
    }
    uint64_t byte = 0;
    while (rank >= counts[byte]) rank -= counts[byte++];
    found |= byte << shift;
    mask |= uint64_t(255) << shift;
  }
  double value;
  std::memcpy(&value, &found, 8);
  return value;
}

double level_of(const SubjectMaskParams& p, const double* image, int64_t pixels) {
  switch (p.level) {
    case SubjectMaskParams::Level::kOtsu:
      return otsu_threshold(image, pixels);
    case SubjectMaskParams::Level::kQuantile:
      return value_of_rank(image, pixels, static_cast<int64_t>(p.value * static_cast<double>(pixels - 1)));
    case SubjectMaskParams::Level::kThreshold:
      break;
  }
  return p.value;
}

void mask_row(void* context, int64_t b) {
  const auto& p = *static_cast<const SubjectMaskParams*>(context);
  const int64_t in_pixels = p.h * p.w, pixels = p.out_h * p.out_w;
  uint8_t* out = p.out + b * pixels;
  const Array<double> mean(in_pixels), resized(pixels), sums(p.smoothing > 1 ? pixels : 0);
  if (!normalized_mean(p.maps + b * p.l * in_pixels, p.l, in_pixels, mean.data)) {
    std::memset(out, 0, pixels);
    return;
  }
  double* image = mean.data;
  if (p.h != p.out_h || p.w != p.out_w) {
    image = resized.data;
    resize(mean.data, p.h, p.w, image, p.out_h, p.out_w);
  }
  if (p.smoothing > 1) smooth(image, p.out_h, p.out_w, p.smoothing, sums.data);
  const double level = level_of(p, image, pixels);
  for (int64_t i = 0; i < pixels; ++i) out[i] = image[i] > level;
}

}  // namespace

void subject_mask_kernel(const SubjectMaskParams& p, const Parallel& parallel) {
  parallel.run(p.b, mask_row, const_cast<SubjectMaskParams*>(&p));
}

}  // namespace lr::LR_ISA
