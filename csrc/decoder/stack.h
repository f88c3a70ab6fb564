// The packed layers of a model as Python holds them.
#pragma once

#include <tvm/ffi/object.h>

#include <string>
#include <vector>

#include "decoder/checks.h"
#include "decoder/run.h"

namespace appo {

// All layers of a model, in one piece of memory.
class StackObj : public ffi::Object {
 public:
  const LayerKernels* k = nullptr;
  std::string isa;  // as it was asked for
  LayerShape shape{};
  std::vector<LayerWeights> layers;
  Scratch data{0};
  int64_t floats = 0;

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("appo.LayerStack", StackObj, ffi::Object);

  LayerWeights& layer(int64_t index) {
    TVM_FFI_CHECK(index >= 0 && index < static_cast<int64_t>(layers.size()), ValueError)
        << "layer is " << index << ", expected 0 … " << layers.size() - 1;
    return layers[index];
  }
};
class Stack : public ffi::ObjectRef {
 public:
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(Stack, ffi::ObjectRef, StackObj);
};

}  // namespace appo
