// The version of the interface that Python finds here.

#include <tvm/ffi/function.h>

#include <cstdint>

namespace appo {
namespace {

// Raised whenever a signature changes; kernels/common/native.py refuses a library of another version.
int64_t abi_version() { return 7; }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(abi_version, abi_version);

}  // namespace appo
