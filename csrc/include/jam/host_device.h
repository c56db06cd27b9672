// Functions of include/jam/ are compiled for the host and, by nvcc, for the device too.
#pragma once

#ifdef __CUDACC__
#define JAM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JAM_HOST_DEVICE inline
#endif
