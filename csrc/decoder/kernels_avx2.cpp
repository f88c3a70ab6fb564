// Float32 models on machines without AVX-512.

#include "common/simd/avx2.h"
#include "decoder/kernels.h"

namespace appo {
namespace {

struct Floats : Avx2 {
  using Dot = FloatDot<Avx2>;
  static constexpr Dtype number = Dtype::f32;
  static F round_number(F v) { return v; }
  static void store_number(char* p, F v) { store(reinterpret_cast<float*>(p), v); }
  static F evens(F a) { return _mm256_moveldup_ps(a); }
  static F odds(F a) { return _mm256_movehdup_ps(a); }
  static F swapped(F a) { return _mm256_permute_ps(a, 0xb1); }
  static F subtract_add(F a, F b) { return _mm256_addsub_ps(a, b); }
};

}  // namespace

const LayerKernels& layer_avx2() {
  static const LayerKernels table = layer_kernels<Floats>(matrix_avx2());
  return table;
}

}  // namespace appo
