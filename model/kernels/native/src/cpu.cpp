// What this processor can run, where the threads of the kernels run, and what becomes of the memory between them.
#include "cpu.h"

#include <omp.h>

#include <cstdlib>
#include <vector>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

// 2: AVX-512 with VNNI; 1: AVX2, FMA and F16C; 0: neither. Asked of the library that has no special instruction.
extern "C" int moray_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// All threads allocate from one heap: call it before they are started.
extern "C" void moray_share_heap() {
#if defined(__GLIBC__)
  mallopt(M_ARENA_MAX, 1);
#endif
}

// From here on memory that is freed stays with the process. A step's tensors are the same size as those of the step
// before; fresh pages for them cost a third of a millisecond a megabyte, more than some of the kernels.
extern "C" void moray_keep_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, 0x7fffffff);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

static std::vector<int> bound_cpus;

void bind_thread(int n) {
#if defined(__linux__)
  if (n >= (int)bound_cpus.size()) return;
  cpu_set_t mask;
  CPU_ZERO(&mask);
  CPU_SET(bound_cpus[n], &mask);
  sched_setaffinity(0, sizeof mask, &mask);
#endif
}

// Keeps the calling thread on the first of the processors, and the threads that help it on the others.
extern "C" void moray_bind_threads(const int* cpus, int num_threads) {
  bound_cpus.assign(cpus, cpus + num_threads);
#pragma omp parallel num_threads(num_threads)
  bind_thread(omp_get_thread_num());
}
