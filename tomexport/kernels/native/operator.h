// What an operator's kernel is given, and what it may ask of the runtime that calls it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace tomexport {

// One call: (x (B,N,C), size (S,N,1), signal (B,G,N,D)) -> (x (B,M,C), size (B,M,1), target (B,N)),
// with S either B or 1. All arrays are dense; T is float, or bfloat16 where the runtime has it.
template <class T> struct Call {
    std::int64_t n_batch, n_tokens, n_channels, n_groups, n_dims;
    bool one_size;  // S = 1: all images share their sizes
    const T *x;
    const float *size;
    const T *signal;
    T *x_out;
    float *size_out;
    std::int64_t *target;
    // What comes next in a transformer, while the token is at hand; nullptr where it is not wanted:
    // LayerNorm of x_out with a weight and an offset (C), and the logarithm of size_out.
    const float *norm_weight, *norm_offset;
    float epsilon;
    T *norm_out;
    T *log_size_out;
};

// The threads of the runtime itself.
class Threads {
  public:
    using Task = void (*)(void *data, std::size_t index);
    using Run = void (*)(void *context, Task task, std::size_t n, void *data);

    // `most`: how many can run at once; if that is not known, how many are worth asking for.
    Threads(std::size_t most, void *context, Run run) : most_(most), context_(context), run_(run) {}
    static Threads none() { return {1, nullptr, nullptr}; }

    std::size_t most() const { return most_; }

    // Calls f(0) … f(n − 1), some of them at once, and returns when all are done.
    template <class F> void run(std::size_t n, const F &f) const {
        if (most_ == 1 || n == 1) {
            for (std::size_t i = 0; i < n; ++i) f(i);
            return;
        }
        run_(context_, [](void *data, std::size_t i) { (*static_cast<const F *>(data))(i); }, n,
             const_cast<F *>(&f));
    }

  private:
    std::size_t most_;
    void *context_;
    Run run_;
};

// Work that is done in phases by all who come, in a single fork of the runtime's threads: a fork
// costs microseconds. Each member has a share of a phase, because the operations before and after
// divide the tokens so too, and its caches hold that share; a counter of its own for each share keeps
// the cores from pulling one line back and forth. Who is done takes from the others' shares, so that
// nobody is waited for who has not begun: a phase ends when the pieces that were taken are done.
class Team {
  public:
    static constexpr int kPhases = 4;
    static constexpr std::size_t kMembers = 16;  // at most

    explicit Team(std::size_t n_members) : n_members_(n_members) {}

    // Calls f(begin, end) on pieces of 0 … count. Every member calls this for the same phases.
    template <class F>
    void phase(int index, std::size_t member, std::int64_t count, std::int64_t grain, const F &f) {
        Share *const shares = shares_[index];
        for (std::size_t k = 0; k < n_members_; ++k) {
            const std::size_t whose = (member + k) % n_members_;
            const std::int64_t end = first(whose + 1, count, grain);
            for (std::int64_t begin; (begin = first(whose, count, grain) + shares[whose].n_taken.fetch_add(
                                                  grain, std::memory_order_relaxed)) < end;) {
                f(begin, std::min(begin + grain, end));
                shares[whose].n_done.fetch_add(grain, std::memory_order_release);
            }
        }
        for (std::size_t k = 0; k < n_members_; ++k) {
            const std::int64_t n = first(k + 1, count, grain) - first(k, count, grain);
            while (shares[k].n_done.load(std::memory_order_acquire) < n) relax();
        }
    }

  private:
    struct alignas(64) Share {
        std::atomic<std::int64_t> n_taken{0}, n_done{0};
    };
    std::size_t n_members_;
    Share shares_[kPhases][kMembers];

    // Where a member's share begins: at a piece.
    std::int64_t first(std::size_t member, std::int64_t count, std::int64_t grain) const {
        const std::int64_t n_pieces = (count + grain - 1) / grain;
        const auto n_members = static_cast<std::int64_t>(n_members_);
        return std::min(count, static_cast<std::int64_t>(member) * n_pieces / n_members * grain);
    }

    static void relax() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
};

// Memory that a thread keeps between calls: once warm, a call allocates nothing.
class Workspace {
  public:
    static constexpr std::size_t kLine = 64;  // arrays begin at cache lines

    // Makes room for `bytes` in `n_arrays` arrays.
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
template <class Operator, class T>
void run(const Operator &op, const Call<T> &call, const Threads &threads) {
    if (call.n_batch == 1) return op.run(call, 0, threads);
    threads.run(static_cast<std::size_t>(call.n_batch), [&](std::size_t image) {
        op.run(call, static_cast<std::int64_t>(image), Threads::none());
    });
}

}  // namespace tomexport
