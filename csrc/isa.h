// Compiles one body once per instruction set, each time with the register tile that fits it, and picks one at run
// time.
#pragma once

#include "gemm.h"
#include "machine.h"

namespace fastreg {

// Body has `template <class G> static FASTREG_INLINE void run(Args...)`, G a Gemm.
template <class T, class Body, class... Args>
struct PerIsa {
  using Run = void (*)(Args...);
  FASTREG_V4 static void v4(Args... args) { Body::template run<Gemm<T, 64, 12>>(args...); }
  FASTREG_V3 static void v3(Args... args) { Body::template run<Gemm<T, 32, 6>>(args...); }
  static void base(Args... args) { Body::template run<Gemm<T, 16, 6>>(args...); }

  static Run best() { return for_this_machine(v4, v3, base); }
};

}  // namespace fastreg
