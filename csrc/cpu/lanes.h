// What a set of instructions includes before its `Lanes` and cpu/guided_rows.h.
//
// Lanes are vectors of `kWidth` floats, on which + - * and, on their bits, + and << work as on one
// float and its uint32_t. beyond(a, nearest) is a less its nearest integer; integers(a) are the
// nearest, the even one of two, to 0 <= a < 2^31; sum_of(Ints) is exact.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "cpu/workspace.h"
#include "jam/backend.h"
#include "jam/guided_draw.h"

#define JAM_INLINE __attribute__((always_inline))

// GCC's pragmas choose instructions for a part of a file.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JAM_HAS_X86_LANES
// GCC 12's own header sets variables to themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif
