// Vectors as wide as the target's registers, in the extension that GCC and Clang share.
#pragma once

#include <cstdint>
#include <cstring>

namespace tomexport {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::int32_t Ints __attribute__((vector_size(kLanes * sizeof(std::int32_t))));

inline Floats load(const float *from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float *to, Floats v) { std::memcpy(to, &v, sizeof v); }

// The sum of n floats, n a power of two, by halves.
template <int n = kLanes> inline float sum(const float *from) {
    if constexpr (n == 1) {
        return *from;
    } else {
        typedef float Half __attribute__((vector_size(n / 2 * sizeof(float))));
        Half low, high;
        std::memcpy(&low, from, sizeof low);
        std::memcpy(&high, from + n / 2, sizeof high);
        low += high;
        float halves[n / 2];
        std::memcpy(halves, &low, sizeof low);
        return sum<n / 2>(halves);
    }
}
inline float sum(Floats v) { return sum<>(reinterpret_cast<const float *>(&v)); }

}  // namespace tomexport
