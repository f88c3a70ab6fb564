// What this machine's processor can do; the files named after an instruction set may run only where
// it is there.
#pragma once

namespace appo {

static inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
static inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static inline bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

// The best of them, or "": such files are of no use here.
static inline const char* best_isa() {
  return has_avx512_bf16() ? "avx512_bf16" : has_avx512() ? "avx512" : has_avx2() ? "avx2" : "";
}

}  // namespace appo
