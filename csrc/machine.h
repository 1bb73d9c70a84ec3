// What the CPU kernels may assume about the machine. No Python, no torch.
#pragma once

#include <cstdlib>

// FASTREG_CLONES compiles a function once per instruction set and lets the loader pick, so that one
// portable binary runs AVX-512 code where it exists. It needs ifunc (glibc) and a compiler that
// knows the micro-architecture levels; elsewhere the function is compiled once for the baseline.
// Lambdas and functions inlined into a clone are cloned with it; an OpenMP region is not, because
// it is outlined: put the attribute on the inner loop, not on the function that owns the region.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTREG_HAS_CLONES 1
#define FASTREG_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FASTREG_V4 __attribute__((target("arch=x86-64-v4")))
#define FASTREG_V3 __attribute__((target("arch=x86-64-v3")))
#else
#define FASTREG_HAS_CLONES 0
#define FASTREG_CLONES
#define FASTREG_V4
#define FASTREG_V3
#endif

namespace fastreg {

// Of one thing made for three instruction sets, that for this machine. For what target_clones cannot do: give every
// set a register tile of its own.
template <class X>
X for_this_machine(X v4, X v3, X base) {
#if FASTREG_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return v4;
  if (__builtin_cpu_supports("x86-64-v3")) return v3;
#endif
  return base;
}

// The clone that the loader picks on this machine: "x86-64-v4", "x86-64-v3" or "default".
const char* isa();

// Threads that an OpenMP region would use now; 1 when compiled without OpenMP.
int max_threads();

}  // namespace fastreg
