// What Python hands over for sampling, checked.
#pragma once

#include <tvm/ffi/error.h>
#include <tvm/ffi/string.h>

#include <string>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "common/tensors.h"
#include "sampling/run.h"

namespace appo {

inline const SampleKernels& sample_kernels_for(const std::string& isa) {
  if ((isa.empty() || isa == "avx512") && has_avx512()) return sample_avx512();
  TVM_FFI_CHECK((isa.empty() || isa == "avx2") && has_avx2(), ValueError)
      << "isa is '" << isa << "'; tokens are drawn with avx512 or avx2, on a machine that has it";
  return sample_avx2();
}

// Per row: seeds and positions int64, inv_temp float32 above 0, greedy uint8.
inline std::vector<SampleParams> params_of(const Tensor& seeds, const Tensor& positions,
                                           const Tensor& inv_temp, const Tensor& greedy,
                                           int64_t rows) {
  check_vector(seeds, "seeds", kDLInt, 64, rows);
  check_vector(positions, "positions", kDLInt, 64, rows);
  check_vector(inv_temp, "inv_temp", kDLFloat, 32, rows);
  check_vector(greedy, "greedy", kDLUInt, 8, rows);
  std::vector<SampleParams> params;
  for (int64_t i = 0; i < rows; ++i) {
    const float by = data<const float>(inv_temp)[i];
    TVM_FFI_CHECK(by > 0.0f && by <= 1e30f, ValueError)
        << "inv_temp[" << i << "] is " << by << ", expected a number above 0, up to 1e30";
    params.push_back(sample_params(data<const int64_t>(seeds)[i], data<const int64_t>(positions)[i],
                                   by, data<const uint8_t>(greedy)[i] != 0));
  }
  return params;
}

// Per row: tokens int64 (-1 where nothing can be sampled), logp and entropy float32.
inline Sampled sampled_into(const Tensor& tokens, const Tensor& logp, const Tensor& entropy,
                            int64_t rows) {
  check_vector(tokens, "tokens", kDLInt, 64, rows);
  check_vector(logp, "logp", kDLFloat, 32, rows);
  check_vector(entropy, "entropy", kDLFloat, 32, rows);
  return {data<int64_t>(tokens), data<float>(logp), data<float>(entropy)};
}

}  // namespace appo
