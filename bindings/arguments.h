// The checks of a call's arguments: all that a kernel relies on, so that no arguments end the process or reach outside
// a tensor. A refusal reads `lr_kernels.<op>: <argument>: expected …, got …`.
//
// The checks add 0.2 us to a call of two sources, and 0.4 us where it has all tables. Entries of index lists are
// checked before the kernel runs and not in its inner loops: a few vector instructions check several entries, so the
// 40,000 entries of a layer of 4,096 tokens take 8 us, and the layer itself takes a second.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace lr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxTokens = (int64_t(1) << 31) - 1;  // of a table: index lists are int32

// An argument, or an entry of a list of tensors.
struct Name {
  const char* text;
  int64_t entry = -1;
  Name(const char* name, int64_t i = -1) : text(name), entry(i) {}
};

// The expected size of a dimension.
constexpr int64_t kAny = -1;
struct Extent {
  int64_t size;
  bool or_one;
  Extent(int64_t n, bool one = false) : size(n), or_one(one) {}
  bool fits(int64_t n) const { return size == kAny || n == size || (or_one && n == 1); }
};
inline Extent one_or(int64_t n) { return {n, true}; }
inline std::ostream& operator<<(std::ostream& s, const Extent& x) {
  if (x.size == kAny) return s << "any";
  return s << x.size << (x.or_one && x.size != 1 ? " or 1" : "");
}

// A tensor that has passed its check. Strides that are never used are 0: those of dimensions of one entry, such as the
// rows of a table that all batch rows share, and all those of an empty tensor.
struct View {
  static constexpr int kMaxDims = 4;
  void* data = nullptr;
  int64_t size[kMaxDims] = {}, stride[kMaxDims] = {};
  int64_t reach = 0;  // elements from the first to the last, both included; 0: empty
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Copies the strides of the first kDims dimensions.
template <int kDims>
void copy_strides(const View& x, int64_t (&out)[kDims]) {
  for (int i = 0; i < kDims; ++i) out[i] = x.stride[i];
}

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// The number that torch's stable ABI gives a dtype. Comparing it is faster than Tensor::scalar_type(), which searches
// all of torch's dtypes at every call.
inline int32_t code_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Bool:
      return aoti_torch_dtype_bool();
    case ScalarType::Char:
      return aoti_torch_dtype_int8();
    case ScalarType::Float8_e4m3fn:
      return aoti_torch_dtype_float8_e4m3fn();
    default:
      return aoti_torch_dtype_uint8();
  }
}

inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

// The checks of one call. All inputs are checked first, so that an output is compared with every one of them.
class Call {
 public:
  // All tensors are on the CPU, or on one CUDA device.
  explicit Call(const char* op) : op_(op), device_type_(aoti_torch_device_type_cpu()), device_(-1) {}
  Call(const char* op, int32_t cuda_device)
      : op_(op), device_type_(aoti_torch_device_type_cuda()), device_(cuda_device) {}

  // Whether the host may look into tensors.
  bool on_cpu() const { return device_ < 0; }

  template <class Got, class... Expected>
  void require(bool fits, Name name, const Got& got, const Expected&... expected) const {
    if (__builtin_expect(!fits, 0)) refuse(name, text(expected...), text(got));
  }

  // How many entries a list of tensors has, or how many lists go together.
  void count(size_t got, Name name, int64_t low, int64_t high) const {
    const auto n = static_cast<int64_t>(got);
    if (low == high)
      require(n == low, name, n, low, low == 1 ? " entry" : " entries");
    else
      require(n >= low && n <= high, name, n, low, " to ", high, " entries");
  }

  // The dtype of the tensor that decides it for others.
  ScalarType floating(const Tensor& x, Name name) const {
    require(x.defined(), name, "None", "a tensor");
    for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half})
      if (is(x, dtype)) return dtype;
    refuse(name, "float32, float16 or bfloat16", name_of(x.scalar_type()));
  }

  static bool is(const Tensor& x, ScalarType dtype) {
    int32_t code = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
    return code == code_of(dtype);
  }

  // A tensor that is read. The last `dense` dimensions lie in memory without gaps.
  View input(const Tensor& x, Name name, ScalarType dtype, std::initializer_list<Extent> shape, int dense) {
    const View view = look(x, name, dtype, shape, dense);
    take(view, dtype);
    return view;
  }

  // A tensor that is written: no two of its elements share memory, and none with another tensor of the call.
  View output(const Tensor& x, Name name, ScalarType dtype, std::initializer_list<Extent> shape, int dense) {
    const View view = look(x, name, dtype, shape, dense);
    if (view.reach == 0) return view;
    if (!distinct(view, static_cast<int>(shape.size()))) refuse(name, "elements that share no memory", layout_of(x));
    const Range range = range_of(view, dtype);
    for (int i = 0; i < taken_count_; ++i)
      require(range.end <= taken_[i].begin || taken_[i].end <= range.begin, name,
              "memory that another tensor of the call shares", "memory of its own");
    take(view, dtype);
    return view;
  }

  // Refuses entries of an int32 list outside low .. high. `low` is 0 or -1, and high - low at most kMaxTokens.
  void entries(Name name, const int32_t* list, int64_t n, int64_t low, int64_t high) const {
    const auto first = static_cast<uint32_t>(low), span = static_cast<uint32_t>(high - low);
    uint32_t outside = 0;  // the sign bit is set once an entry - low or high - entry was negative
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t x = static_cast<uint32_t>(list[i]) - first;
      outside |= x | (span - x);
    }
    if (__builtin_expect(outside >> 31, 0))
      for (int64_t i = 0; i < n; ++i) require(list[i] >= low && list[i] <= high, name, list[i], low, " to ", high);
  }

  // The same of a matrix; a row that all share is read once.
  void entries(Name name, const View& matrix, int64_t low, int64_t high) const {
    if (matrix.reach == 0) return;
    const int64_t rows = matrix.stride[0] == 0 ? 1 : matrix.size[0];
    for (int64_t r = 0; r < rows; ++r)
      entries(name, matrix.as<int32_t>() + r * matrix.stride[0], matrix.size[1], low, high);
  }

 private:
  struct Range {
    const char *begin, *end;
  };
  static constexpr int kMaxTaken = 256;  // attention's backward pass: 16 sources with 13 tensors each, and 8 others

  const char* op_;
  int32_t device_type_, device_;
  Range taken_[kMaxTaken];
  int taken_count_ = 0;

  template <class... Parts>
  static std::string text(const Parts&... parts) {
    std::ostringstream s;
    (s << ... << parts);
    return s.str();
  }

  [[noreturn]] __attribute__((noinline, cold)) void refuse(Name name, const std::string& expected,
                                                           const std::string& got) const {
    const std::string entry = name.entry < 0 ? "" : text('[', name.entry, ']');
    throw std::runtime_error(text("lr_kernels.", op_, ": ", name.text, entry, ": expected ", expected, ", got ", got));
  }

  template <class Sizes>
  static std::string tuple_of(const Sizes& sizes) {
    std::ostringstream s;
    const char* separator = "(";
    for (const auto& x : sizes) {
      s << separator << x;
      separator = ", ";
    }
    return s.str() + (*separator == '(' ? "()" : ")");
  }

  static std::string layout_of(const Tensor& x) {
    return text("shape ", tuple_of(x.sizes()), " with strides ", tuple_of(x.strides()));
  }

  View look(const Tensor& x, Name name, ScalarType dtype, std::initializer_list<Extent> shape, int dense) const {
    require(x.defined(), name, "None", "a tensor");
    int32_t device_type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
    const bool cuda = device_type_ == aoti_torch_device_type_cuda();
    require(device_type == device_type_ && (!cuda || x.get_device_index() == device_), name, "one elsewhere",
            cuda ? "a tensor on the CUDA device of the others" : "a tensor on the CPU");
    if (!is(x, dtype)) refuse(name, name_of(dtype), name_of(x.scalar_type()));

    const int dims = static_cast<int>(shape.size());
    int64_t *sizes = nullptr, *strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(x.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(x.get(), &strides));
    bool fits = x.dim() == dims, empty = false;
    for (int i = 0; fits && i < dims; ++i) {
      fits = shape.begin()[i].fits(sizes[i]);
      empty |= sizes[i] == 0;
    }
    if (!fits) refuse(name, "shape " + tuple_of(shape), tuple_of(x.sizes()));

    View view;
    int64_t packed = 1;
    view.reach = empty ? 0 : 1;
    for (int i = dims - 1; i >= 0; --i) {
      const bool used = !empty && sizes[i] > 1;
      view.size[i] = sizes[i];
      view.stride[i] = used ? strides[i] : 0;
      if (!used) continue;
      view.reach += (sizes[i] - 1) * strides[i];
      if (i < dims - dense) continue;
      if (strides[i] != packed)
        refuse(name, text("no gaps in the last ", dense, " of ", dims, " dimensions"), layout_of(x));
      packed *= sizes[i];
    }
    if (empty) return view;
    view.data = x.data_ptr();
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
    require(view.data && (x.storage_offset() + view.reach) * bytes_of(dtype) <= bytes, name,
            "memory that was released or resized", "memory for ", view.reach, " elements");
    return view;
  }

  // Whether the strides, from the smallest on, each step over all that the smaller ones reach.
  static bool distinct(const View& x, int dims) {
    int64_t reach = 0;
    for (int64_t below = -1;;) {
      int next = -1;
      for (int i = 0; i < dims; ++i) {
        if (x.size[i] < 2 || x.stride[i] <= below) continue;
        if (next < 0 || x.stride[i] < x.stride[next]) next = i;
      }
      if (next < 0) return true;
      int of_this_stride = 0;
      for (int i = 0; i < dims; ++i) of_this_stride += x.size[i] > 1 && x.stride[i] == x.stride[next];
      if (of_this_stride > 1 || x.stride[next] <= reach) return false;
      reach += (x.size[next] - 1) * x.stride[next];
      below = x.stride[next];
    }
  }

  static Range range_of(const View& x, ScalarType dtype) {
    const char* begin = x.as<const char>();
    return {begin, begin + x.reach * bytes_of(dtype)};
  }

  void take(const View& x, ScalarType dtype) {
    if (x.reach) taken_[taken_count_++] = range_of(x, dtype);
  }
};

}  // namespace lr
