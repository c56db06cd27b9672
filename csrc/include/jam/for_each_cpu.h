// Functions that are compiled once for each of several instruction sets.
#pragma once

// The loader takes the best one there is.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JAM_FOR_EACH_CPU \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JAM_FOR_EACH_CPU
#endif

// What such functions call becomes part of each of them.
#define JAM_ALWAYS_INLINE __attribute__((always_inline))
