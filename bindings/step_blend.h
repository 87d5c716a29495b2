// step_blend: tensors -> StepBlendParams, checked. Both backends' bindings use it.
#pragma once
#include "bindings.h"

namespace lr {

using MaybeTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

constexpr int kStepBlendColumns = 9;  // after the weights of the predictions: a, e, sigma, h, p, q, c, d, s

inline void require(bool fits, const char* name, const char* expected) {
  STD_TORCH_CHECK(fits, "lr_kernels.step_blend: ", name, ": expected ", expected);
}

// Refuses what would be read or written out of bounds, and an output that shares memory with another tensor. The public
// function leaves plain calls to it: this costs 0.2 us, the same in Python a third of a small call.
class StepBlendGuard {
 public:
  explicit StepBlendGuard(const Tensor& sample) : dtype_(sample.scalar_type()) {
    require(sample.dim() == 4, "sample", "4 dimensions");
    for (int i = 0; i < 4; ++i) size_[i] = sample.size(i);
    row_ = size_[1] * size_[2] * size_[3];
  }

  // A tensor like sample, each row dense.
  void input(const Tensor& x, const char* name) { take(like(x, name, size_[0])); }

  // A tensor that is read whole.
  void input(const Tensor& x, const char* name, bool fits, int64_t element_size) {
    require(fits && x.is_contiguous(), name, "another shape or dtype");
    const char* begin = static_cast<const char*>(x.data_ptr());
    take({begin, begin + x.numel() * element_size});
  }

  // A contiguous tensor of `rows` rows like those of sample, in memory of its own.
  void output(const Tensor& x, const char* name, int64_t rows) {
    require(x.is_contiguous(), name, "a contiguous tensor");
    const Range range = like(x, name, rows);
    for (int i = 0; i < count_; ++i)
      require(range.end <= taken_[i].begin || taken_[i].end <= range.begin, name, "memory of its own");
    take(range);
  }

 private:
  struct Range {
    const char *begin, *end;
  };

  Range like(const Tensor& x, const char* name, int64_t rows) const {
    require(x.dim() == 4 && x.scalar_type() == dtype_, name, "4 dimensions and the dtype of sample");
    const auto sizes = x.sizes(), strides = x.strides();
    const bool empty = rows * row_ == 0;
    bool fits = sizes[0] == rows;
    int64_t dense = 1;
    for (int i = 3; i > 0; --i) {
      fits = fits && sizes[i] == size_[i] && (sizes[i] == 1 || empty || strides[i] == dense);
      dense *= sizes[i];
    }
    require(fits, name, "the shape of sample, each row dense");
    const int64_t reach = empty ? 0 : (rows - 1) * strides[0] + row_;
    const char* begin = static_cast<const char*>(x.data_ptr());
    return {begin, begin + reach * (dtype_ == ScalarType::Float ? 4 : 2)};
  }

  void take(Range range) {
    if (range.begin != range.end) taken_[count_++] = range;
  }

  ScalarType dtype_;
  int64_t size_[4], row_;
  Range taken_[kMaxPredictions + 10];
  int count_ = 0;
};

// The parameters of a call; its coefficients are those of the first step.
inline StepBlendParams step_blend_params(const Tensor& sample, const std::vector<Tensor>& predictions,
                                         const Tensor& coefficients, const MaybeTensor& mask,
                                         const MaybeTensor& background, const MaybeTensor& noise,
                                         const MaybeTensor& history, const MaybeTensor& keep_rows, Tensor& out,
                                         MaybeTensor& model_input, MaybeTensor& history_out) {
  const int64_t count = predictions.size();
  require(count >= 1 && count <= kMaxPredictions, "predictions", "1 to 6");
  StepBlendGuard guard(sample);
  StepBlendParams p{};
  p.b = sample.size(0);
  p.c = sample.size(1);
  p.plane = sample.size(2) * sample.size(3);
  p.dtype = dtype_of(sample);
  p.predictions = static_cast<int32_t>(count);
  const auto read = [&](const Tensor& x, const char* name, const void*& data, int64_t& stride) {
    guard.input(x, name);
    data = x.data_ptr();
    stride = x.stride(0);
  };
  read(sample, "sample", p.sample, p.sample_stride);
  for (int64_t k = 0; k < count; ++k) read(predictions[k], "predictions", p.prediction[k], p.prediction_stride[k]);
  if (background) read(*background, "background", p.background, p.background_stride);
  if (noise) read(*noise, "noise", p.noise, p.noise_stride);
  if (history) read(*history, "history", p.history, p.history_stride);

  const auto rows_fit = [&](int64_t rows) { return rows == 1 || rows == p.b; };
  guard.input(coefficients, "coefficients",
              coefficients.dim() == 3 && coefficients.scalar_type() == ScalarType::Float &&
                  rows_fit(coefficients.size(1)) && coefficients.size(2) == count + kStepBlendColumns,
              4);
  p.coefficients = static_cast<const float*>(coefficients.data_ptr());
  p.coefficient_stride = shared_stride(coefficients, 1);
  if (mask) {
    guard.input(*mask, "mask",
                mask->dim() == 3 && mask->scalar_type() == ScalarType::Float && rows_fit(mask->size(0)) &&
                    mask->size(1) == sample.size(2) && mask->size(2) == sample.size(3),
                4);
    p.mask = static_cast<const float*>(mask->data_ptr());
    p.mask_stride = shared_stride(*mask, 0);
  }
  if (keep_rows) {
    guard.input(*keep_rows, "keep_rows",
                keep_rows->dim() == 1 && keep_rows->scalar_type() == ScalarType::Bool && keep_rows->size(0) == p.b, 1);
    p.keep_rows = static_cast<const uint8_t*>(keep_rows->data_ptr());
  }
  require(background || (!mask && !keep_rows), "background", "a tensor, since mask or keep_rows is given");

  guard.output(out, "out", p.b);
  p.out = out.data_ptr();
  if (model_input) {
    p.copies = p.b ? model_input->size(0) / p.b : 0;
    require(p.copies > 0 || p.b == 0, "model_input", "the rows of sample once or more");
    guard.output(*model_input, "model_input", p.copies * p.b);
    p.model_input = model_input->data_ptr();
  }
  if (history_out) {
    guard.output(*history_out, "history_out", p.b);
    p.history_out = history_out->data_ptr();
  }
  return p;
}

}  // namespace lr
