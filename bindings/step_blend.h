// step_blend: tensors -> StepBlendParams, checked, for the bindings of both backends. The public function leaves plain
// calls to these checks, which take 0.2 us: the same in Python (runtime/step_blend_checks.py) takes a third of a small
// call.
#pragma once
#include "bindings.h"

namespace lr {

constexpr int kStepBlendColumns = 9;  // after the weights of the predictions: a, e, sigma, h, p, q, c, d, s

// The parameters of a call; its coefficients are those of the first step.
inline StepBlendParams step_blend_params(Call& call, const Tensor& sample, const Tensors& predictions,
                                         const Tensor& coefficients, const MaybeTensor& mask,
                                         const MaybeTensor& background, const MaybeTensor& noise,
                                         const MaybeTensor& history, const MaybeTensor& keep_rows, const Tensor& out,
                                         const MaybeTensor& model_input, const MaybeTensor& history_out) {
  const ScalarType dtype = call.floating(sample, "sample");
  const View latents = call.input(sample, "sample", dtype, {kAny, kAny, kAny, kAny}, 3);
  const int64_t b = latents.size[0], c = latents.size[1], height = latents.size[2], width = latents.size[3];
  StepBlendParams p{};
  p.b = b;
  p.c = c;
  p.plane = latents.reach ? height * width : 0;
  p.dtype = dtype_of(dtype);
  p.sample = latents.data;
  p.sample_stride = latents.stride[0];
  call.count(predictions.size(), "predictions", 1, kMaxPredictions);
  p.predictions = static_cast<int32_t>(predictions.size());
  const auto read = [&](const Tensor& x, Name name, const void*& data, int64_t& stride) {
    const View view = call.input(x, name, dtype, {b, c, height, width}, 3);
    data = view.data;
    stride = view.stride[0];
  };
  for (int32_t k = 0; k < p.predictions; ++k)
    read(predictions[k], {"predictions", k}, p.prediction[k], p.prediction_stride[k]);
  if (background) read(*background, "background", p.background, p.background_stride);
  if (noise) read(*noise, "noise", p.noise, p.noise_stride);
  if (history) read(*history, "history", p.history, p.history_stride);
  const View table = call.input(coefficients, "coefficients", ScalarType::Float,
                                {kAny, one_or(b), p.predictions + kStepBlendColumns}, 3);
  p.coefficients = table.as<float>();
  p.coefficient_stride = table.stride[1];
  if (mask) {
    const View view = call.input(*mask, "mask", ScalarType::Float, {one_or(b), height, width}, 3);
    p.mask = view.as<float>();
    p.mask_stride = view.stride[0];
  }
  if (keep_rows) p.keep_rows = call.input(*keep_rows, "keep_rows", ScalarType::Bool, {b}, 1).as<uint8_t>();
  call.require(background || (!mask && !keep_rows), "background", "None", "a tensor, since mask or keep_rows is given");
  call.require(!background || mask || keep_rows, "mask", "None", "a tensor (or keep_rows), since background is given");

  p.out = call.output(out, "out", dtype, {b, c, height, width}, 4).data;
  if (model_input) {
    const View view = call.output(*model_input, "model_input", dtype, {kAny, c, height, width}, 4);
    p.copies = b ? view.size[0] / b : 0;
    call.require(p.copies * b == view.size[0] && (p.copies > 0 || b == 0), "model_input", view.size[0],
                 "the rows of sample once or more");
    p.model_input = view.data;
  }
  if (history_out) p.history_out = call.output(*history_out, "history_out", dtype, {b, c, height, width}, 4).data;
  return p;
}

// The counter of steps, an int32 of one element.
inline const int32_t* step_counter(Call& call, const Tensor& step) {
  const View view = step.defined() && step.dim() == 0 ? call.input(step, "step", ScalarType::Int, {}, 0)
                                                      : call.input(step, "step", ScalarType::Int, {1}, 1);
  return view.as<int32_t>();
}

}  // namespace lr
