// The ops of attention on Hopper: tensors -> AttentionSm90Params. A Machine says what runs them: a card (cuda.cpp) or,
// in tests, the emulator.
#pragma once
#include "attention.h"
#include "cuda/attention_sm90.h"

namespace lr {

// All tensors of a call in one list, which costs the host half of what many lists do: query, then of each source key,
// value and those of the others that bits of `present` name, in the order of SourceTensors; then, where present[S] has
// bit 0, query_order and class_start, and for each further bit the weight of a softmax group.
class FlatTensors {
 public:
  FlatTensors(const Call& call, const Tensors& all, const std::vector<int64_t>& present)
      : sources_(present.size() - 1) {
    call.count(sources_, "key", 1, kMaxSources);
    size_t next = 1;
    const auto take = [&](bool there, MaybeTensor& to) {
      if (!there) return;
      call.require(next < all.size(), "tensors", all.size(), "as many as `present` names");
      to = all[next++];
    };
    for (size_t i = 0; i < sources_; ++i) {
      take(true, of_source_[i][0]);
      take(true, of_source_[i][1]);
      for (size_t k = 2; k < kOfSource; ++k) take(present[i] >> (k - 2) & 1, of_source_[i][k]);
    }
    take(present[sources_] & 1, query_order);
    take(present[sources_] & 1, class_start);
    for (size_t g = 0; g < kMaxSources; ++g) take(present[sources_] >> (g + 1) & 1, weight[g]);
    call.require(next == all.size(), "tensors", all.size(), next, " tensors");
  }
  size_t count(const Call&) const { return sources_; }
  SourceTensors operator[](size_t i) const {
    const auto& x = of_source_[i];
    return {*x[0], *x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8]};
  }
  MaybeTensor query_order, class_start, weight[kMaxSources];

 private:
  static constexpr size_t kOfSource = 9;
  MaybeTensor of_source_[kMaxSources][kOfSource];
  size_t sources_;
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

  // A traced call cannot know where its tensors start, so one that starts off a multiple of 16 bytes is copied here.
  static void align(Tensor& x) {
    if (x.defined() && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 != 0) x = torch::stable::clone(x);
  }

  static void op(Tensor query, Tensors key, Tensors value, MaybeTensors rows, MaybeTensors key_index,
                 MaybeTensors key_count, MaybeTensors value_index, MaybeTensors key_bias, MaybeTensors logit_scale,
                 MaybeTensors logit_bias, MaybeTensor query_order, MaybeTensor class_start,
                 std::vector<int64_t> softmax_group, MaybeTensors weight, double scale, Tensor out, MaybeTensor lse) {
    Call call = Machine::call("multi_source_attention", query);
    align(query);
    for (Tensors* all : {&key, &value})
      for (Tensor& x : *all) align(x);
    const Lists lists{key, value, rows, key_index, key_count, value_index, key_bias, logit_scale, logit_bias};
    AttentionParams p = forward_params(call, query, lists, query_order, class_start, softmax_group, weight.data(),
                                       weight.size(), scale);
    read_outputs(call, p, query.scalar_type(), out, lse);
    const char* lacking = attention_sm90_lacks(p);
    call.require(!lacking, "query", lacking ? lacking : "", "what the kernel for Hopper takes");
    launch(p, query);
  }

  // out, and its fp32 lse where it is wanted; nothing where the kernel does not take the call.
  static Tensors flat_op(Tensors tensors, std::vector<int64_t> present, std::vector<int64_t> softmax_group,
                         double scale, bool return_lse) {
    STD_TORCH_CHECK(!tensors.empty() && !present.empty(),
                    "lr_kernels.multi_source_attention: query: expected a tensor");
    const Tensor& query = tensors[0];
    Call call = Machine::call("multi_source_attention", query);
    const FlatTensors sources(call, tensors, present);
    const size_t groups = softmax_group.empty() ? 0 : static_cast<size_t>(softmax_group.back()) + 1;
    AttentionParams p = forward_params(call, query, sources, sources.query_order, sources.class_start, softmax_group,
                                       sources.weight, groups, scale);
    Tensors results{torch::stable::new_empty(query, {p.b, p.n, p.h, p.d})};
    if (return_lse) results.push_back(torch::stable::new_empty(query, {p.b, p.n, p.h}, ScalarType::Float));
    read_outputs(call, p, query.scalar_type(), results[0], return_lse ? MaybeTensor(results[1]) : MaybeTensor());
    if (attention_sm90_lacks(p)) return {};
    launch(p, query);
    return results;
  }
};

}  // namespace lr
