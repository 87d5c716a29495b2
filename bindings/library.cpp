// Registers the ops of all files of this library.
#include "library.h"

#include <vector>

namespace lr {
namespace {

using torch::stable::detail::StableLibrary;

struct Entry {
  const char* key;
  void (*add)(StableLibrary&);
};

// Within a function, since other files add to it before main.
std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

}  // namespace

Implementations::Implementations(const char* key, void (*add)(StableLibrary&)) { entries().push_back({key, add}); }

}  // namespace lr

// Called once by whoever loads the library. The registrations last as long as the process.
extern "C" __attribute__((visibility("default"))) void lr_kernels_register(const char* op_namespace) {
  for (const lr::Entry& entry : lr::entries())
    entry.add(*new lr::StableLibrary(lr::StableLibrary::Kind::IMPL, op_namespace, entry.key, __FILE__, __LINE__));
}
