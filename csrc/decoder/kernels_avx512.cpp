// Float32 models with AVX-512.

#include "decoder/avx512.h"

namespace appo {
namespace {

struct Floats : Avx512Pairs<Avx512> {
  using Dot = FloatDot<Avx512>;
  static constexpr Dtype number = Dtype::f32;
  static F round_number(F v) { return v; }
  static void store_number(char* p, F v) { store(reinterpret_cast<float*>(p), v); }
};

}  // namespace

const LayerKernels& layer_avx512() {
  static const LayerKernels table = layer_kernels<Floats>(matrix_avx512());
  return table;
}

}  // namespace appo
