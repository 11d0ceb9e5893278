// wgmma with A from registers: m64nNk16, float16 or bf16 in, float32 sums. Sums of m64 x
// n(8j..8j+7) are d[4j .. 4j + 3], as those of mma.sync m16n8k16 for each warp's 16 rows.
#pragma once

#include <cstdint>

namespace fd::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FD_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define FD_D8(i) FD_D4(i), FD_D4((i) + 4)
#define FD_D16(i) FD_D8(i), FD_D8((i) + 8)

#define FD_D32(i) FD_D16(i), FD_D16((i) + 16)
#define FD_D64(i) FD_D32(i), FD_D32((i) + 32)

#define FD_R4 "%0,%1,%2,%3"
#define FD_R8 FD_R4 ",%4,%5,%6,%7"
#define FD_R12 FD_R8 ",%8,%9,%10,%11"
#define FD_R16 FD_R12 ",%12,%13,%14,%15"
#define FD_R20 FD_R16 ",%16,%17,%18,%19"
#define FD_R32 FD_R20 ",%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FD_R48 FD_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define FD_R64 FD_R48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FD_R72 FD_R64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define FD_R80 FD_R72 ",%72,%73,%74,%75,%76,%77,%78,%79"

/// `b`: descriptor of [N][16] in shared memory. float16 and bf16.
template <int kN>
struct Wgmma;
template <int kN>
struct WgmmaBf16;

/// One of them: names of the sums, of the four registers of A and of B, then the sums.
#define FD_WGMMA(Name, type, n, sums, a_names, b_name, ...)                                        \
  template <>                                                                                      \
  struct Name<n> {                                                                                 \
    __device__ static __forceinline__ void add(float (&d)[n / 2], const uint32_t (&a)[4],          \
                                               uint64_t b) {                                       \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                               \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" sums "}, {" a_names \
          "}, " b_name ", p, 1, 1, 0;\n}\n"                                                        \
          : __VA_ARGS__                                                                            \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                   \
    }                                                                                              \
  };

FD_WGMMA(Wgmma, "f16", 8, FD_R4, "%4,%5,%6,%7", "%8", FD_D4(0))
FD_WGMMA(Wgmma, "f16", 16, FD_R8, "%8,%9,%10,%11", "%12", FD_D8(0))
FD_WGMMA(Wgmma, "f16", 24, FD_R12, "%12,%13,%14,%15", "%16", FD_D8(0), FD_D4(8))
FD_WGMMA(Wgmma, "f16", 32, FD_R16, "%16,%17,%18,%19", "%20", FD_D16(0))
FD_WGMMA(Wgmma, "f16", 40, FD_R20, "%20,%21,%22,%23", "%24", FD_D16(0), FD_D4(16))
FD_WGMMA(Wgmma, "f16", 64, FD_R32, "%32,%33,%34,%35", "%36", FD_D32(0))
FD_WGMMA(Wgmma, "f16", 96, FD_R48, "%48,%49,%50,%51", "%52", FD_D32(0), FD_D16(32))
FD_WGMMA(Wgmma, "f16", 128, FD_R64, "%64,%65,%66,%67", "%68", FD_D64(0))
FD_WGMMA(Wgmma, "f16", 144, FD_R72, "%72,%73,%74,%75", "%76", FD_D64(0), FD_D8(64))
FD_WGMMA(WgmmaBf16, "bf16", 32, FD_R16, "%16,%17,%18,%19", "%20", FD_D16(0))
FD_WGMMA(WgmmaBf16, "bf16", 64, FD_R32, "%32,%33,%34,%35", "%36", FD_D32(0))
FD_WGMMA(WgmmaBf16, "bf16", 96, FD_R48, "%48,%49,%50,%51", "%52", FD_D32(0), FD_D16(32))
FD_WGMMA(WgmmaBf16, "bf16", 128, FD_R64, "%64,%65,%66,%67", "%68", FD_D64(0))
FD_WGMMA(WgmmaBf16, "bf16", 160, FD_R80, "%80,%81,%82,%83", "%84", FD_D64(0), FD_D16(64))

#undef FD_WGMMA
#undef FD_D4
#undef FD_D8
#undef FD_D16
#undef FD_D32
#undef FD_D64
#undef FD_R4
#undef FD_R8
#undef FD_R12
#undef FD_R16
#undef FD_R20
#undef FD_R32
#undef FD_R48
#undef FD_R64
#undef FD_R72
#undef FD_R80

#define FD_TILE(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FD_EIGHT_TILES(d, i)                                                                 \
  FD_TILE(d, i), FD_TILE(d, i + 1), FD_TILE(d, i + 2), FD_TILE(d, i + 3), FD_TILE(d, i + 4), \
      FD_TILE(d, i + 5), FD_TILE(d, i + 6), FD_TILE(d, i + 7)

/// bf16, 64 columns; onto d, or in its place where `onto` is 0.
__device__ __forceinline__ void wgmma_bf16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b,
                                           int onto) {
  asm volatile(
      "{\n"
      ".reg .pred onto;\n"
      "setp.ne.b32 onto, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, onto, 1, 1, 0;\n"
      "}\n"
      : FD_EIGHT_TILES(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(onto));
}

/// bf16, 128 columns, onto d.
__device__ __forceinline__ void wgmma_bf16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;\n"
      : FD_EIGHT_TILES(d, 0), FD_EIGHT_TILES(d, 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef FD_TILE
#undef FD_EIGHT_TILES

/// Before products whose registers others have written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most kPending groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Pins the registers of products between the instructions around this call: the compiler must not
/// use them before the products were waited for, nor put off what is to overlap with the next.
template <int kTiles>
__device__ __forceinline__ void pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
}
#endif

}  // namespace fd::cuda
