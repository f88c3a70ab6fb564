// Which instruction set the kernels run with on this machine.

#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#ifdef APPO_LINEAR_KERNELS
#include "common/isa.h"
#endif

namespace appo {
namespace {

// "": none, because of the processor or because the library was built without kernels.
tvm::ffi::String native_isa() {
#ifdef APPO_LINEAR_KERNELS
  return best_isa();
#else
  return "";
#endif
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(native_isa, native_isa);

}  // namespace appo
