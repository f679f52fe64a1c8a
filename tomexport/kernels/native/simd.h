// Vectors as wide as the target's registers, in the extension that GCC and Clang share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

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

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(kLanes * 2)));

// The upper half of a float's bits.
struct BFloat16 {
    std::uint16_t bits;
};

template <class To, class From> inline To bits_of(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Floats as whole numbers in the opposite order; −0 is 0, and NaN is −∞.
inline std::uint32_t descending(float value) {
    value += 0.f;
    const float number = value == value ? value : -std::numeric_limits<float>::infinity();
    const auto bits = bits_of<std::uint32_t>(number);
    return bits >> 31 ? bits : 0x7fffffffu - bits;
}

inline Floats load(const float *from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline Floats load(const BFloat16 *from) {
    Halves v;
    std::memcpy(&v, from, sizeof v);
    return bits_of<Floats>(__builtin_convertvector(v, Words) << 16);
}
inline float load_one(const float *from) { return *from; }
inline float load_one(const BFloat16 *from) {
    return bits_of<float>(static_cast<std::uint32_t>(from->bits) << 16);
}

inline void store(float *to, Floats v) { std::memcpy(to, &v, sizeof v); }
// To the nearest, ties to even; NaN stays NaN.
inline void store(BFloat16 *to, Floats v) {
    const Words bits = bits_of<Words>(v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Halves halves = __builtin_convertvector(v == v ? rounded : (bits >> 16 | 0x40), Halves);
    std::memcpy(to, &halves, sizeof halves);
}
inline void store_one(float *to, float value) { *to = value; }
// To the nearest, ties to even; NaN stays NaN.
inline void store_one(BFloat16 *to, float value) {
    const std::uint32_t bits = bits_of<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to->bits = static_cast<std::uint16_t>(value == value ? rounded : bits >> 16 | 0x40);
}

template <std::size_t Bytes> struct Half;
template <> struct Half<64> { typedef float Vector __attribute__((vector_size(32))); };
template <> struct Half<32> { typedef float Vector __attribute__((vector_size(16))); };
template <> struct Half<16> { typedef float Vector __attribute__((vector_size(8))); };

// By halves, which stay in registers.
template <class Vector> inline float sum(const Vector &v) {
    if constexpr (sizeof v == 8) {
        return v[0] + v[1];
    } else {
        typename Half<sizeof v>::Vector halves[2];
        std::memcpy(halves, &v, sizeof v);
        return sum(halves[0] + halves[1]);
    }
}

}  // namespace tomexport
