// Functions of include/jam/ are compiled for the host and, by nvcc, for the device too.
//
// On the host they are always inlined: files compiled for wider instruction sets use them too, and
// a copy out of line, which the linker may take for all files, would not run on every CPU.
#pragma once

#ifdef __CUDACC__
#define JAM_HOST_DEVICE __host__ __device__ __forceinline__
#define JAM_DEVICE __device__ __forceinline__
#else
#define JAM_HOST_DEVICE inline __attribute__((always_inline))
#define JAM_DEVICE JAM_HOST_DEVICE  // templates that call what nvcc compiles for the device alone
#endif
