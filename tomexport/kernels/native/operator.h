// What an operator says of itself, what its kernel is given, and what it may ask of the runtime that
// calls it.
//
// An operator is a class with
//   kName, kAttributes            its op type, and the integers that its constructor takes, in order
//   kInputs, kOutputs             its arrays; of one that gives tokens, x and size come out first
//   kFollowed                     whether it gives tokens, so that a LayerNorm can follow
//   removed()                     how many tokens fewer come out
//   refusal(n)                    why it cannot be computed for n tokens, or nullptr
//   run<T>(call, threads)         computes a call of one image
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>

namespace tomexport {

// --- what an operator says of itself

// What an array holds. kReal is float, or bfloat16 where the runtime computes in it.
enum class Type { kReal, kFloat, kInteger };

// An array. Its axes are letters, and every axis of one letter has the same size: B images, N tokens
// in, M tokens out. S is B, or 1 where one array serves all images; 1 is 1.
struct Port {
    const char *name;
    Type type;
    const char *axes;
};

struct Attribute {
    const char *name;
    bool optional = false;  // 0 where it is left out
};

// What comes next in a transformer, while the token is at hand: LayerNorm of x with a weight and an
// offset, and the logarithm of size. Of an operator that gives tokens, the last two arrays, in and out,
// which only sessions of ours ask for.
constexpr Port kNormWeight{"weight", Type::kFloat, "C"}, kNormOffset{"offset", Type::kFloat, "C"};
constexpr Port kNorm{"norm", Type::kReal, "BMC"}, kLogSize{"log_size", Type::kReal, "BM1"};
template <class Operator> constexpr std::size_t kFollowing = Operator::kFollowed ? 2 : 0;
template <class Operator>
constexpr std::size_t kNumInputs = std::size(Operator::kInputs) - kFollowing<Operator>;
template <class Operator>
constexpr std::size_t kNumOutputs = std::size(Operator::kOutputs) - kFollowing<Operator>;
constexpr std::size_t kMostPorts = 8, kMostAxes = 4;

// "x (B,N,C), size (B,N,1) wanted"
template <class Operator> std::string wanted() {
    std::string text;
    for (std::size_t i = 0; i < kNumInputs<Operator>; ++i) {
        const Port &port = Operator::kInputs[i];
        text += (i ? ", " : "") + std::string(port.name);
        for (const char *axis = port.axes; *axis; ++axis)
            text += std::string(axis == port.axes ? " (" : ",") + (*axis == 'S' ? 'B' : *axis);
        text += ")";
    }
    return text + " wanted";
}

// --- what its kernel is given

struct Dims {
    std::int64_t values[kMostAxes] = {};
    std::size_t n = 0;
};

// How long each axis is, by its letter.
class Sizes {
  public:
    Sizes() { std::fill(std::begin(values_), std::end(values_), kUnknown); }
    std::int64_t operator[](char axis) const { return axis == '1' ? 1 : values_[axis - 'A']; }
    void set(char axis, std::int64_t size) { values_[axis - 'A'] = size; }

    // Whether an array has these axes; those that are new are known from then on.
    bool fit(const char *axes, const Dims &dims) {
        if (std::strlen(axes) != dims.n) return false;
        for (std::size_t i = 0; i < dims.n; ++i) {
            const std::int64_t size = dims.values[i];
            if (axes[i] != '1' && (*this)[axes[i]] == kUnknown) set(axes[i], size);
            if ((*this)[axes[i]] != size) return false;
            if (axes[i] == 'S' && size != 1 && size != (*this)['B']) return false;
        }
        return true;
    }

    Dims of(const char *axes) const {
        Dims dims;
        for (; axes[dims.n]; ++dims.n) dims.values[dims.n] = (*this)[axes[dims.n]];
        return dims;
    }

  private:
    static constexpr std::int64_t kUnknown = -1;
    std::int64_t values_[26];
};

// Whole numbers in the width that the runtime has.
struct Integers {
    void *data;
    bool narrow;  // 32 bits, not 64
    std::int64_t operator[](std::int64_t i) const {
        if (narrow) return static_cast<const std::int32_t *>(data)[i];
        return static_cast<const std::int64_t *>(data)[i];
    }
    void set(std::int64_t i, std::int64_t value) const {
        if (narrow) static_cast<std::int32_t *>(data)[i] = static_cast<std::int32_t>(value);
        else static_cast<std::int64_t *>(data)[i] = value;
    }
};

// One call: dense arrays in the order of an operator's ports; nullptr where none is wanted.
struct Call {
    Sizes sizes;
    const void *in[kMostPorts] = {};
    void *out[kMostPorts] = {};
    bool narrow = false;  // integers have 32 bits, those given and those taken; not 64
    float epsilon = 0.f;  // of the LayerNorm

    template <class T> const T *input(std::size_t port) const {
        return static_cast<const T *>(in[port]);
    }
    template <class T> T *output(std::size_t port) const { return static_cast<T *>(out[port]); }
    Integers given(std::size_t port) const { return {const_cast<void *>(in[port]), narrow}; }
    Integers taken(std::size_t port) const { return {out[port], narrow}; }
};

// --- what it may ask of the runtime

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

// How many bytes an element has.
template <class T> std::size_t bytes_of(Type type, bool narrow) {
    if (type == Type::kReal) return sizeof(T);
    return type == Type::kFloat || narrow ? 4 : 8;
}

// The part of a call that is one image's.
template <class Operator, class T> Call image(const Call &call, std::int64_t index) {
    Call one = call;
    const auto offset = [&](const Port &port) {
        if (*port.axes == 'C' || call.sizes[*port.axes] == 1) return std::int64_t{0};  // it serves all
        auto bytes = index * static_cast<std::int64_t>(bytes_of<T>(port.type, call.narrow));
        for (const char *axis = port.axes + 1; *axis; ++axis) bytes *= call.sizes[*axis];
        return bytes;
    };
    for (std::size_t i = 0; i < std::size(Operator::kInputs); ++i)
        if (one.in[i]) one.in[i] = call.input<char>(i) + offset(Operator::kInputs[i]);
    for (std::size_t i = 0; i < std::size(Operator::kOutputs); ++i)
        if (one.out[i]) one.out[i] = call.output<char>(i) + offset(Operator::kOutputs[i]);
    return one;
}

// Computes all images of a call: one image on all threads, or each on one. T is float or BFloat16.
template <class T, class Operator>
void run(const Operator &op, const Call &call, const Threads &threads) {
    const std::int64_t n_images = call.sizes['B'];
    if (n_images == 1) return op.template run<T>(call, threads);
    threads.run(static_cast<std::size_t>(n_images), [&](std::size_t index) {
        const auto one = image<Operator, T>(call, static_cast<std::int64_t>(index));
        op.template run<T>(one, Threads::none());
    });
}

}  // namespace tomexport
