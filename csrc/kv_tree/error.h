// Errors of the segment tree; native_tree.py has registered the classes of appo.errors under their
// names.
#pragma once

#include <tvm/ffi/error.h>

#include <sstream>

namespace appo {

// Throws an error of that class with the parts as its text. Callers handle these (a stale sequence,
// a pool too small), so there is no backtrace: looking one up takes milliseconds.
template <typename... Parts>
[[noreturn]] void fail(const char* error, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw tvm::ffi::Error(error, text.str(), "");
}

}  // namespace appo
