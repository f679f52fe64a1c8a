// What is done with tokens once it is known which of them share a slot: one pass over x, and, where it
// is asked for, what comes next in a transformer.
#pragma once

#include <cmath>

#include "operator.h"
#include "simd.h"

namespace tomexport {

template <class T> struct Slots {
    std::int64_t channels;
    const T *x;                               // (N,C)
    const float *weight, *mass;               // (N) of each token in its slot: in x, and in size
    bool mean;                                // whether weights are relative
    T *x_out;                                 // (M,C)
    float *size_out;                          // (M)
    const float *norm_weight, *norm_offset;   // (C)
    float epsilon;
    T *norm_out, *log_size_out;               // (M,C) and (M), or nullptr where they are not wanted
    std::int32_t *first;  // (M) the token that a slot begins with, or −1
    std::int32_t *next;   // (N) the token that shares its slot and comes after it, or −1

    void reduce(std::int64_t slot) const {
        float total = 0.f, size = 0.f;
        for (std::int32_t token = first[slot]; token >= 0; token = next[token])
            total += weight[token], size += mass[token];
        size_out[slot] = size;
        const std::int32_t head = first[slot];
        const float divisor = mean ? total : 1.f;
        const bool alone = head >= 0 && next[head] < 0 && total / divisor == 1.f;
        if (alone) std::copy_n(x + head * channels, channels, x_out + slot * channels);
        else sum_up(head, divisor, x_out + slot * channels);
        follow(slot);
    }

    // Of a slot that is there: its norm and its logarithm.
    void follow(std::int64_t slot) const {
        if (!norm_out) return;
        const float size = size_out[slot];  // of most, 1
        store_one(log_size_out + slot, size == 1.f ? 0.f : std::log(size));
        layer_norm(x_out + slot * channels, norm_out + slot * channels);
    }

  private:
    void sum_up(std::int32_t head, float divisor, T *out) const {
        constexpr std::int64_t kBlock = 64;  // channels whose sums stay in registers or close by
        for (std::int64_t begin = 0; begin < channels; begin += kBlock) {
            const std::int64_t n = std::min(kBlock, channels - begin);
            float sums[kBlock] = {};
            for (std::int32_t token = head; token >= 0; token = next[token]) {
                const T *in = x + token * channels + begin;
                for (std::int64_t c = 0; c < n; ++c) sums[c] += load_one(in + c) * weight[token];
            }
            for (std::int64_t c = 0; c < n; ++c) store_one(out + begin + c, sums[c] / divisor);
        }
    }

    void layer_norm(const T *in, T *out) const {
        const float n = static_cast<float>(channels);
        const float mean = sum_of(in, [](auto v) { return v; }) / n;
        const float variance = sum_of(in, [mean](auto v) { return (v - mean) * (v - mean); }) / n;
        const float scale = 1.f / std::sqrt(variance + epsilon);
        std::int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes)
            store(out + c, (load(in + c) - mean) * scale * load(norm_weight + c) +
                               load(norm_offset + c));
        for (; c < channels; ++c)
            store_one(out + c, (load_one(in + c) - mean) * scale * norm_weight[c] + norm_offset[c]);
    }

    // The sum of f(value) over a token's values.
    template <class F> float sum_of(const T *in, const F &f) const {
        constexpr int kChains = 4;  // of additions, which wait for each other within one
        Floats lanes[kChains] = {};
        float rest = 0.f;
        std::int64_t c = 0;
        for (; c + kChains * kLanes <= channels; c += kChains * kLanes)
            for (int i = 0; i < kChains; ++i) lanes[i] += f(load(in + c + i * kLanes));
        for (; c + kLanes <= channels; c += kLanes) lanes[0] += f(load(in + c));
        for (; c < channels; ++c) rest += f(load_one(in + c));
        return sum((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + rest;
    }
};

// The slots of a call of one image: x and size come out first; what follows is last, in and out.
template <class Operator, class T>
Slots<T> slots(const Call &call, const float *weight, const float *mass, bool mean) {
    constexpr std::size_t in = kNumInputs<Operator>, out = kNumOutputs<Operator>;
    Slots<T> s{};
    s.channels = call.sizes['C'], s.x = call.input<T>(0);
    s.weight = weight, s.mass = mass, s.mean = mean;
    s.x_out = call.output<T>(0), s.size_out = call.output<float>(1);
    s.norm_weight = call.input<float>(in), s.norm_offset = call.input<float>(in + 1);
    s.epsilon = call.epsilon;
    s.norm_out = call.output<T>(out), s.log_size_out = call.output<T>(out + 1);
    return s;
}

}  // namespace tomexport
