// The ops of attention on Hopper: tensors -> AttentionSm90Params. A Machine says what runs them: a card (cuda.cpp) or,
// in tests, the emulator.
#pragma once
#include <cmath>

#include "attention.h"
#include "cuda/attention_sm90.h"

namespace lr {

// All tensors of a call in one list, which costs the host half of what many lists do. layout says which they are, one
// number for each source and one for the call: query; of each source key, value and those of the others, in the order
// of SourceTensors, whose bit is set (bits 0 to 8; from bit 9 on the number of its softmax group); query_order and
// class_start where bit 0 of the last number is set, and the weight of softmax group g where bit g + 1 is.
class FlatTensors {
 public:
  FlatTensors(const Call& call, Tensors& all, const std::vector<int64_t>& layout) : sources_(layout.size() - 1) {
    call.count(sources_, "key", 1, kMaxSources);
    given_.reserve(all.size() + 1);
    given_.emplace_back();  // none
    for (Tensor& x : all) given_.emplace_back(std::move(x));
    int32_t next = 2;
    const auto take = [&](bool there) { return there ? next++ : 0; };
    for (size_t i = 0; i < sources_; ++i) {
      for (size_t k = 0; k < kOfSource; ++k) places_[i][k] = take(k < 2 || layout[i] >> (k - 2) & 1);
      groups.push_back(layout[i] >> 9);
      call.require(groups[i] >= 0 && groups[i] < kMaxSources, {"softmax_group", static_cast<int64_t>(i)}, groups[i],
                   "0 to ", kMaxSources - 1);
    }
    order_ = take(layout[sources_] & 1);
    start_ = take(layout[sources_] & 1);
    const size_t count = static_cast<size_t>(groups.back()) + 1;
    for (size_t g = 0; g < count; ++g) weight_places_[g] = take(layout[sources_] >> (g + 1) & 1);
    call.require(next == static_cast<int32_t>(given_.size()), "tensors", all.size(), "as many as layout says");
    for (size_t g = 0; g < count; ++g) weight.push_back(given_[weight_places_[g]]);
  }
  const MaybeTensor& query_order() const { return given_[order_]; }
  const MaybeTensor& class_start() const { return given_[start_]; }
  size_t count(const Call&) const { return sources_; }
  SourceTensors operator[](size_t i) const {
    const auto at = [&](size_t k) -> const MaybeTensor& { return given_[places_[i][k]]; };
    return {*at(0), *at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), &at(9), &at(10)};
  }
  std::vector<int64_t> groups;
  MaybeTensors weight;  // of each softmax group

 private:
  static constexpr size_t kOfSource = 11;
  MaybeTensors given_;  // after one that is none
  size_t sources_;
  int32_t places_[kMaxSources][kOfSource], weight_places_[kMaxSources], order_, start_;
};

template <class Machine>
struct AttentionSm90 {
  static void launch(const AttentionParams& attention, const Tensor& query) {
    if (attention.b == 0 || attention.n == 0 || attention.h == 0) return;
    const Machine machine(query);
    AttentionSm90Params p{};
    p.attention = attention;
    machine.run(p);
  }

  // A traced call cannot know where its tensors start, so one that starts off a multiple of 8 numbers is copied here.
  static void align(Tensor& x) {
    if (x.defined() && reinterpret_cast<uintptr_t>(x.data_ptr()) % (8 * x.element_size()) != 0)
      x = torch::stable::clone(x);
  }

  static void op(Tensor query, Tensors key, Tensors value, MaybeTensors rows, MaybeTensors key_index,
                 MaybeTensors key_count, std::vector<int64_t> key_block, MaybeTensors key_range,
                 MaybeTensors value_index, MaybeTensors key_bias, MaybeTensors logit_scale, MaybeTensors logit_bias,
                 MaybeTensor query_order, MaybeTensor class_start, int64_t query_block,
                 std::vector<int64_t> softmax_group, MaybeTensors weight, MaybeTensors key_scale,
                 MaybeTensors value_scale, double scale, Tensor out, MaybeTensor lse) {
    Call call = Machine::call("multi_source_attention", query);
    align(query);
    for (Tensors* all : {&key, &value})
      for (Tensor& x : *all) align(x);
    const Lists lists{key,         value,    rows,        key_index,  key_count,  key_block,   key_range,
                      value_index, key_bias, logit_scale, logit_bias, &key_scale, &value_scale};
    AttentionParams p = forward_params(call, query, lists, query_order, class_start, query_block, softmax_group,
                                       weight.data(), weight.size(), scale);
    read_outputs(call, p, query.scalar_type(), out, lse);
    const char* lacking = attention_sm90_lacks(p);
    call.require(!lacking, "query", lacking ? lacking : "", "what the kernel for Hopper takes");
    launch(p, query);
  }

  // out, and its fp32 lse where it is wanted; nothing where something is wrong with the call, or the kernel does not
  // take it: then the checks in Python say what. No error leaves this op, since in torch 2.11 that ends the process.
  static Tensors flat_op(Tensors tensors, std::vector<int64_t> layout, double scale, bool return_lse) {
    if (tensors.empty() || layout.empty() || !std::isfinite(static_cast<float>(scale))) return {};
    Tensors results;
    AttentionParams p{};
    const Tensor query = tensors[0];
    std::optional<FlatTensors> given;  // lives until the launch: the workspace must not take its tensors' memory
    try {
      Call call = Machine::call("multi_source_attention", query);
      given.emplace(call, tensors, layout);
      p = forward_params(call, query, *given, given->query_order(), given->class_start(), 0, given->groups,
                         given->weight.data(), given->weight.size(), scale);
      results.push_back(torch::stable::new_empty(query, {p.b, p.n, p.h, p.e}));
      if (return_lse) results.push_back(torch::stable::new_empty(query, {p.b, p.n, p.h}, ScalarType::Float));
      read_outputs(call, p, query.scalar_type(), results[0], return_lse ? MaybeTensor(results[1]) : MaybeTensor());
      if (attention_sm90_lacks(p)) return {};
      launch(p, query);
    } catch (const std::exception&) {
      return {};
    }
    return results;
  }
};

}  // namespace lr
