// Compiles one body once per instruction set, each time with the register tile that fits it, and picks one at run
// time. target_clones would give every set the tile of the widest, and spill.
#pragma once

#include "gemm.h"
#include "machine.h"

namespace fastreg {

// Body has `template <class G> static FASTREG_INLINE void run(Args...)`, G a Gemm.
template <class T, class Body, class... Args>
struct PerIsa {
  using Run = void (*)(Args...);
#if FASTREG_HAS_CLONES
  __attribute__((target("arch=x86-64-v4"))) static void v4(Args... args) {
    Body::template run<Gemm<T, 64, 12>>(args...);
  }
  __attribute__((target("arch=x86-64-v3"))) static void v3(Args... args) {
    Body::template run<Gemm<T, 32, 6>>(args...);
  }
#endif
  static void base(Args... args) { Body::template run<Gemm<T, 16, 6>>(args...); }

  static Run best() {
#if FASTREG_HAS_CLONES
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return v4;
    if (__builtin_cpu_supports("x86-64-v3")) return v3;
#endif
    return base;
  }
};

}  // namespace fastreg
