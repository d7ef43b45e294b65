// Warpgroup matrix products (wgmma): D[64, N] (+)= A[64, 16] B[16, N], bf16 in, fp32 out.
//
// Operands in shared memory are named by descriptors (PTX ISA 9.0, section 9.7.15.5). Tiles lie as
// the copy engine leaves them: columns in chunks of one swizzle width (64 bf16 in 128 bytes, or 32
// in 64), a chunk's rows one after the other. "Row-major" operands have the summed dimension along
// the columns; "transposed" ones along the rows.
//
// A thread's part of D: d[4j], d[4j+1] in row g, columns 8j+2c, 8j+2c+1; d[4j+2], d[4j+3] the same
// in row g+8, where g = 16 * (warp of the warpgroup) + lane / 4 and c = lane % 4.
#pragma once

#include "sm90_primitives.cuh"

namespace megatron_kanana::sm90 {

// The upper of this thread's two rows of D.
__device__ __forceinline__ int accumulator_row() {
  return threadIdx.x % kWarpgroup / kWarp * 16 + threadIdx.x % kWarp / 4;
}

enum class Swizzle : uint64_t { k128 = 1, k64 = 2 };  // bytes; the field's encoding

// `chunk_stride`: bytes from one chunk of columns to the next; only transposed operands wider than
// a chunk need it. Groups of eight rows follow each other closely.
template <Swizzle kSwizzle>
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t chunk_stride = 16) {
  constexpr uint64_t kGroup = kSwizzle == Swizzle::k128 ? 1024 : 512;
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(chunk_stride >> 4) << 16 | (kGroup >> 4) << 32 |
         static_cast<uint64_t>(kSwizzle) << 62;
}

// The operand `bytes` further on, of which the compiler makes one addition.
__device__ __forceinline__ uint64_t advance(uint64_t operand, uint32_t bytes) {
  return operand + (bytes >> 4);
}

// Registers written before it may be read by products issued after it.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving work on these registers across it.
template <int kCount>
__device__ __forceinline__ void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

#define REGISTERS_0                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, " \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_1                          \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_2                          \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_3                          \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_4                          \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79"
#define REGISTERS_5                          \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_6                              \
  "%96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111"
#define REGISTERS_7                                  \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define IN_OUT_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define IN_OUT_16(k) \
  IN_OUT_4(16 * k), IN_OUT_4(16 * k + 4), IN_OUT_4(16 * k + 8), IN_OUT_4(16 * k + 12)

#define IN_OUT_32 IN_OUT_16(0)
#define IN_OUT_64 IN_OUT_16(0), IN_OUT_16(1)
#define IN_OUT_96 IN_OUT_16(0), IN_OUT_16(1), IN_OUT_16(2)
#define IN_OUT_128 IN_OUT_16(0), IN_OUT_16(1), IN_OUT_16(2), IN_OUT_16(3)
#define IN_OUT_192 \
  IN_OUT_16(0), IN_OUT_16(1), IN_OUT_16(2), IN_OUT_16(3), IN_OUT_16(4), IN_OUT_16(5)
#define IN_OUT_256                                                                    \
  IN_OUT_16(0), IN_OUT_16(1), IN_OUT_16(2), IN_OUT_16(3), IN_OUT_16(4), IN_OUT_16(5), \
      IN_OUT_16(6), IN_OUT_16(7)

// The numbers are those of the operands that follow the accumulators.
#define WGMMA_SHARED(n, registers, in_out, a_, b_, accumulate_, transpose_a_, transpose_b_)      \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #accumulate_               \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" registers "}, %" #a_ \
               ", %" #b_ ", accumulate, 1, 1, %" #transpose_a_ ", %" #transpose_b_ ";\n}\n"      \
               : in_out                                                                          \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)),                              \
                 "n"(static_cast<int>(kTransposeA)), "n"(static_cast<int>(kTransposeB)))

#define WGMMA_REGISTERS(n, registers, in_out, a0_, a1_, a2_, a3_, b_, accumulate_, transpose_b_)   \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #accumulate_                 \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" registers "}, {%" #a0_ \
               ", %" #a1_ ", %" #a2_ ", %" #a3_ "}, %" #b_ ", accumulate, 1, 1, %" #transpose_b_   \
               ";\n}\n"                                                                            \
               : in_out                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                               \
                 "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposeB)))

// Both operands in shared memory, by their descriptors.
template <bool kTransposeA, bool kTransposeB, int kHalf>
__device__ __forceinline__ void wgmma(float (&d)[kHalf], uint64_t a, uint64_t b, bool accumulate) {
  constexpr int kColumns = 2 * kHalf;
  if constexpr (kColumns == 32) {
    WGMMA_SHARED(32, REGISTERS_0, IN_OUT_32, 16, 17, 18, 19, 20);
  } else if constexpr (kColumns == 64) {
    WGMMA_SHARED(64, REGISTERS_0 ", " REGISTERS_1, IN_OUT_64, 32, 33, 34, 35, 36);
  } else if constexpr (kColumns == 96) {
    WGMMA_SHARED(96, REGISTERS_0 ", " REGISTERS_1 ", " REGISTERS_2, IN_OUT_96, 48, 49, 50, 51, 52);
  } else if constexpr (kColumns == 128) {
    WGMMA_SHARED(128, REGISTERS_0 ", " REGISTERS_1 ", " REGISTERS_2 ", " REGISTERS_3, IN_OUT_128,
                 64, 65, 66, 67, 68);
  } else if constexpr (kColumns == 192) {
    WGMMA_SHARED(192,
                 REGISTERS_0 ", " REGISTERS_1 ", " REGISTERS_2 ", " REGISTERS_3 ", " REGISTERS_4
                             ", " REGISTERS_5,
                 IN_OUT_192, 96, 97, 98, 99, 100);
  } else if constexpr (kColumns == 256) {
    WGMMA_SHARED(256,
                 REGISTERS_0 ", " REGISTERS_1 ", " REGISTERS_2 ", " REGISTERS_3 ", " REGISTERS_4
                             ", " REGISTERS_5 ", " REGISTERS_6 ", " REGISTERS_7,
                 IN_OUT_256, 128, 129, 130, 131, 132);
  } else {
    static_assert(kColumns == 0, "this width is not there");
  }
}

// A in registers: a[0], a[1] rows g and g+8 of columns 2c, 2c+1; a[2], a[3] of columns 2c+8, 2c+9.
template <bool kTransposeB, int kHalf>
__device__ __forceinline__ void wgmma(float (&d)[kHalf], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  constexpr int kColumns = 2 * kHalf;
  if constexpr (kColumns == 64) {
    WGMMA_REGISTERS(64, REGISTERS_0 ", " REGISTERS_1, IN_OUT_64, 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (kColumns == 128) {
    WGMMA_REGISTERS(128, REGISTERS_0 ", " REGISTERS_1 ", " REGISTERS_2 ", " REGISTERS_3, IN_OUT_128,
                    64, 65, 66, 67, 68, 69, 70);
  } else {
    static_assert(kColumns == 0, "this width is not there");
  }
}

// D[64, 128] (+)= A[64, 32] B[32, 128], e4m3 in, both row-major in shared memory. The sums have 14
// bits or so: they are to be added to fp32 ones now and then.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], uint64_t a, uint64_t b,
                                           bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" REGISTERS_0 ", " REGISTERS_1
      ", " REGISTERS_2 ", " REGISTERS_3 "}, %64, %65, accumulate, 1, 1;\n}\n"
      : IN_OUT_128
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

// The same with A in registers: a[0] row g and a[1] row g+8 of columns 4c to 4c+3, a[2] and a[3]
// those of columns 4c+16 to 4c+19.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                           bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" REGISTERS_0 ", " REGISTERS_1
      ", " REGISTERS_2 ", " REGISTERS_3 "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1;\n}\n"
      : IN_OUT_128
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}

#undef WGMMA_SHARED
#undef WGMMA_REGISTERS
#undef REGISTERS_0
#undef REGISTERS_1
#undef REGISTERS_2
#undef REGISTERS_3
#undef REGISTERS_4
#undef REGISTERS_5
#undef REGISTERS_6
#undef REGISTERS_7
#undef IN_OUT_4
#undef IN_OUT_16
#undef IN_OUT_32
#undef IN_OUT_64
#undef IN_OUT_96
#undef IN_OUT_128
#undef IN_OUT_192
#undef IN_OUT_256

}  // namespace megatron_kanana::sm90
