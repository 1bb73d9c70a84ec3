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
#else
#define FASTREG_HAS_CLONES 0
#define FASTREG_CLONES
#endif

namespace fastreg {

// The clone that the loader picks on this machine: "x86-64-v4", "x86-64-v3" or "default".
const char* isa();

// Threads that an OpenMP region would use now; 1 when compiled without OpenMP.
int max_threads();

}  // namespace fastreg
