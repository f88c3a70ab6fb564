// The linears of a decoder layer (Llama, Qwen2, Qwen3) on a CPU: what its parts share. Compiled
// with wide instructions too: nothing here may become an external symbol (see common/matrix.h).
//
//   stack.cpp          packing and adapters, exported functions
//   step.cpp           a forward pass, likewise
//   head.cpp           the output head, likewise
//   checks.h, stack.h  what these three share
//   packed.*           weights as panels, kept between calls, and their products
//   forward.*          the order of the work in a forward pass
//   run.*              the order of the work in the two halves of a layer
//   kernels.h          what happens to a row, templates that kernels_<isa>.cpp compile into a table
//   product.h          the product of few rows with a panel, likewise
//
// Rounding is that of the PyTorch runner: the residual stream, norms, rotation and all sums are
// float32; "numbers" (bfloat16 or float32, the model's dtype) are what goes into a product and what
// every linear, silu and product of the MLP returns. A row's bits depend on that row and the
// weights alone: not on other rows, not on threads.
#pragma once

#include <cstdint>

#include "common/matrix.h"

namespace appo {

constexpr int64_t kLayerRows =
    48;  // rows per unit of work: their sums stay in the caches beside a panel

struct LayerKernels {
  const MatrixKernels* linear;
  Dtype dtype;  // of the numbers

  void (*widen)(const char* numbers, int64_t n, float* out);
  // out[0 … n) = (x / rms(x)) · weight, as numbers; zero from n to `width`. The second: as float32.
  void (*norm)(const float* x, const float* weight, int64_t n, float eps, int64_t width, void* out);
  void (*norm_to_floats)(const float* x, const float* weight, int64_t n, float eps, int64_t width,
                         void* out);
  // y = y + bias, rounded to a number; then y = y + more, rounded likewise. Either may be null.
  void (*finish)(float* y, const float* bias, const float* more, int64_t n);
  void (*add)(float* x, const float* y, int64_t n);  // x += y
  // One head of q or k: optional rms norm, pairs turned by `turn` (dim/2 complex numbers), as
  // numbers.
  void (*turn)(float* y, int64_t dim, const float* weight, float eps, const float* turn, void* out);
  void (*gate)(float* g, const float* u, int64_t n,
               void* out);  // silu(g) · u, as numbers; g is overwritten
  // c[rows][columns] = a · one panel; rows of a are `row` floats apart. In the second, a holds
  // floats while the panel holds words of bf16; it is null for float32 models.
  void (*product)(int64_t rows, int64_t columns, int64_t words, const float* a, int64_t row,
                  const float* panel, float* c, int64_t ldc);
  void (*product_of_floats)(int64_t rows, int64_t columns, int64_t words, const float* a,
                            int64_t row, const float* panel, float* c, int64_t ldc);
};

const LayerKernels& layer_avx512_bf16();
const LayerKernels& layer_avx512();
const LayerKernels& layer_avx2();

}  // namespace appo
