#pragma once

// Marks a loop that is compiled for wider instructions too, of which the loader takes the CPU's
// widest.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JAM_WIDE __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define JAM_WIDE
#endif
