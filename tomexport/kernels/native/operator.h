// What an operator's kernel is given, and what it may ask of the runtime that calls it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace tomexport {

// One call: (x (B,N,C), size (S,N,1), signal (B,G,N,D)) -> (x (B,M,C), size (B,M,1), target (B,N)),
// with S either B or 1. All arrays are dense.
struct Call {
    std::int64_t n_batch, n_tokens, n_channels, n_groups, n_dims;
    bool one_size;  // S = 1: all images share their sizes
    const float *x, *size, *signal;
    float *x_out, *size_out;
    std::int64_t *target;
};

// The threads of the runtime itself.
class Threads {
  public:
    using Task = void (*)(void *data, std::size_t index);
    using Run = void (*)(void *context, Task task, std::size_t n, void *data);

    Threads(void *context, Run run) : context_(context), run_(run) {}

    // Calls f(begin, end) on pieces of 0 … count of at most `grain`, and returns when all are done.
    template <class F> void split(std::int64_t count, std::int64_t grain, const F &f) const {
        if (count <= grain) return f(std::int64_t{0}, count);
        struct Job {
            const F &f;
            std::int64_t count, grain;
        } job{f, count, grain};
        run_(context_, [](void *data, std::size_t index) {
            const Job &j = *static_cast<Job *>(data);
            const std::int64_t begin = static_cast<std::int64_t>(index) * j.grain;
            j.f(begin, std::min(begin + j.grain, j.count));
        }, static_cast<std::size_t>((count + grain - 1) / grain), &job);
    }

    // No others: every piece runs where it is called.
    static Threads none() {
        return {nullptr, [](void *, Task task, std::size_t n, void *data) {
            for (std::size_t i = 0; i < n; ++i) task(data, i);
        }};
    }

  private:
    void *context_;
    Run run_;
};

// Memory that a thread keeps between calls: once warm, a call allocates nothing.
class Workspace {
  public:
    static constexpr std::size_t kLine = 64;  // arrays begin at cache lines

    // Makes room for `bytes`, and a line for each array that will be taken.
    void reserve(std::size_t bytes, std::size_t n_arrays) {
        const std::size_t wanted = bytes + (n_arrays + 1) * kLine;
        if (wanted > capacity_) {
            memory_ = std::make_unique<unsigned char[]>(wanted);
            capacity_ = wanted;
        }
        next_ = memory_.get();
    }

    template <class T> T *take(std::int64_t count) {
        const auto address = reinterpret_cast<std::uintptr_t>(next_);
        unsigned char *begin = next_ + (kLine - address % kLine) % kLine;
        next_ = begin + static_cast<std::size_t>(count) * sizeof(T);
        return reinterpret_cast<T *>(begin);
    }

  private:
    std::unique_ptr<unsigned char[]> memory_;
    std::size_t capacity_ = 0;
    unsigned char *next_ = nullptr;
};

// Computes all images of a call: one image on all threads, or each on one.
template <class Operator> void run(const Operator &op, const Call &call, const Threads &threads) {
    if (call.n_batch == 1) return op.run(call, 0, threads);
    threads.split(call.n_batch, 1, [&](std::int64_t begin, std::int64_t) {
        op.run(call, begin, Threads::none());
    });
}

}  // namespace tomexport
