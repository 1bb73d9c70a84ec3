#include "machine.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastreg {

const char* isa() { return for_this_machine("x86-64-v4", "x86-64-v3", "default"); }

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace fastreg
