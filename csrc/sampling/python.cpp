// Sampling from logits in memory, and the noise itself.

#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "sampling/checks.h"

namespace appo {
namespace {

// Samples a token per row of logits[rows, vocab] float32; for seeds … entropy see checks.h.
void sample_logits(Tensor logits, Tensor seeds, Tensor positions, Tensor inv_temp, Tensor greedy,
                   Tensor tokens, Tensor logp, Tensor entropy, int64_t threads, ffi::String isa) {
  const int64_t rows = rows_of(logits), vocab = logits.size(1);
  TVM_FFI_CHECK(vocab >= 1, ValueError) << "logits have no columns";
  const float* from = floats(logits, "logits", rows, vocab);
  const auto tile = [&](int64_t first, int64_t columns, int64_t row, int64_t some, float* to) {
    for (int64_t i = 0; i < some; ++i) {
      std::memcpy(to + i * kTile, from + (row + i) * vocab + first,
                  static_cast<size_t>(columns) * 4);
    }
    return static_cast<const float*>(to);
  };
  // To wake a thread takes as long as some 20,000 logits.
  threads = std::clamp<int64_t>(rows * vocab / 40000, 1, std::max<int64_t>(threads, 1));
  sample_rows(sample_kernels_for(isa), params_of(seeds, positions, inv_temp, greedy, rows), vocab,
              threads, tile, sampled_into(tokens, logp, entropy, rows));
}

// The 64 noise bits of tokens first … first+n-1 into out[n], as int64.
void sample_bits(int64_t seed, int64_t position, int64_t first, Tensor out, ffi::String isa) {
  const int64_t n = out.ndim() == 1 ? out.size(0) : 0;
  check_vector(out, "out", kDLInt, 64, n);
  const SampleKernels& k = sample_kernels_for(isa);
  const SampleParams params = sample_params(seed, position, 1.0f, false);
  std::vector<uint32_t> high(round_up(n, k.lanes)), low(high.size());
  k.hash(params.key, first, high.size(), high.data());
  k.hash(params.key + 2, first, low.size(), low.data());
  for (int64_t i = 0; i < n; ++i) {
    data<int64_t>(out)[i] = static_cast<int64_t>(static_cast<uint64_t>(high[i]) << 32 | low[i]);
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample_logits, sample_logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample_bits, sample_bits);

}  // namespace appo
