// subject_mask for one instruction set (LR_ISA). In double: the maps are small, and a threshold magnifies rounding.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "params.h"

namespace lr::LR_ISA {
namespace {

constexpr int kOtsuBins = 256;

// Not std::vector: its functions would be shared by the objects of all instruction sets.
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

void resize(const double* in, int64_t h, int64_t w, double* out, int64_t out_h, int64_t out_w) {
  const Array<Tap> columns(out_w);
  for (int64_t i = 0; i < out_w; ++i) columns.data[i] = tap(i, w, out_w);
  for (int64_t i = 0; i < out_h; ++i) {
    const Tap y = tap(i, h, out_h);
    const double *top = in + y.first * w, *bottom = in + y.second * w;
    for (int64_t j = 0; j < out_w; ++j) {
      const Tap x = columns.data[j];
      const double above = (1 - x.share) * top[x.first] + x.share * top[x.second];
      const double below = (1 - x.share) * bottom[x.first] + x.share * bottom[x.second];
      out[i * out_w + j] = (1 - y.share) * above + y.share * below;
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
  const double level = p.otsu ? otsu_threshold(image, pixels) : p.threshold;
  for (int64_t i = 0; i < pixels; ++i) out[i] = image[i] > level;
}

}  // namespace

void subject_mask_kernel(const SubjectMaskParams& p, const Parallel& parallel) {
  parallel.run(p.b, mask_row, const_cast<SubjectMaskParams*>(&p));
}

}  // namespace lr::LR_ISA
