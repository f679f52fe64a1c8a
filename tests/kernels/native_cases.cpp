// Runs the fused kernels on the cases of a file, as a runtime would, and writes what they compute:
//   native_cases CASES RESULTS
// A case is the operator's name in 16 bytes, whether it is in bfloat16, whether its integers have 32
// bits, its attributes, the dims of each input, and all inputs, weight and offset of the LayerNorm
// among them; a result is all outputs. Every array has a heap block of exactly its size, so that
// sanitizers see each step past its end.

#include <array>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "operators.h"

namespace {

using namespace tomexport;

using Array = std::vector<char>;

constexpr float kEpsilon = 1e-6f;

std::int64_t number(std::istream &in) {
    std::int64_t value = 0;
    in.read(reinterpret_cast<char *>(&value), sizeof value);
    return value;
}

template <class T> Array array(const Port &port, const Dims &dims, bool narrow) {
    std::size_t n = bytes_of<T>(port.type, narrow);
    for (std::size_t i = 0; i < dims.n; ++i) n *= static_cast<std::size_t>(dims.values[i]);
    return Array(n);
}

// All at once, each in a thread of its own.
void together(void *, Threads::Task task, std::size_t n, void *data) {
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < n; ++i) threads.emplace_back(task, data, i);
    for (std::thread &thread : threads) thread.join();
}

// One after the other, the last first: nobody may wait for those who have not begun.
void backwards(void *, Threads::Task task, std::size_t n, void *data) {
    while (n--) task(data, n);
}

// What follows is computed only if it is asked for.
template <class T, class Operator>
std::vector<Array> compute(const Operator &op, Call call, bool follows, const Threads &threads) {
    const std::size_t n_out = kNumOutputs<Operator> + (follows ? kFollowing<Operator> : 0);
    for (std::size_t i = kNumInputs<Operator>; !follows && i < kMostPorts; ++i) call.in[i] = nullptr;
    std::vector<Array> out;
    for (std::size_t i = 0; i < n_out; ++i) {
        const Port &port = Operator::kOutputs[i];
        out.push_back(array<T>(port, call.sizes.of(port.axes), call.narrow));
        call.out[i] = out.back().data();
    }
    run<T>(op, call, threads);
    return out;
}

template <class T, class Operator>
std::string run_case(bool narrow, std::istream &in, std::ostream &out) {
    std::array<std::int64_t, std::size(Operator::kAttributes)> attributes;
    for (std::int64_t &attribute : attributes) attribute = number(in);
    const Operator op(attributes.data());
    Call call;
    call.narrow = narrow, call.epsilon = kEpsilon;
    std::vector<Array> given;
    for (const Port &port : Operator::kInputs) {
        Dims dims;
        for (; port.axes[dims.n]; ++dims.n) dims.values[dims.n] = number(in);
        if (!call.sizes.fit(port.axes, dims)) return wanted<Operator>();
        given.push_back(array<T>(port, dims, narrow));
    }
    for (std::size_t i = 0; i < given.size(); ++i) {
        in.read(given[i].data(), static_cast<std::streamsize>(given[i].size()));
        call.in[i] = given[i].data();
    }
    if (!in) return "the file ends too early";
    if (const char *why = op.refusal(call.sizes['N'])) return why;
    call.sizes.set('M', call.sizes['N'] - op.removed());

    const std::vector<Array> plain = compute<T>(op, call, false, Threads::none());
    const std::vector<Array> alone = compute<T>(op, call, true, Threads::none());
    if (!std::equal(plain.begin(), plain.end(), alone.begin()))
        return "the result depends on what follows";
    for (const Threads &threads : {Threads(4, nullptr, together), Threads(4, nullptr, backwards)})
        if (compute<T>(op, call, true, threads) != alone) return "the result depends on the threads";
    for (const Array &each : alone)
        out.write(each.data(), static_cast<std::streamsize>(each.size()));
    return {};
}

template <class Operator>
bool run_named(const std::string &name, std::istream &in, std::ostream &out, std::string *why) {
    if (name != Operator::kName) return false;
    const bool is_bfloat16 = number(in) != 0, narrow = number(in) != 0;
    *why = is_bfloat16 ? run_case<BFloat16, Operator>(narrow, in, out)
                       : run_case<float, Operator>(narrow, in, out);
    return true;
}

template <class... Operator>
std::string run_any(const std::string &name, std::istream &in, std::ostream &out,
                    List<Operator...>) {
    std::string why = "there is no kernel " + name;
    static_cast<void>((run_named<Operator>(name, in, out, &why) || ...));
    return why;
}

}  // namespace

int main(int, char **argv) {
    std::ifstream in(argv[1], std::ios::binary);
    std::ofstream out(argv[2], std::ios::binary);
    char name[17] = {};
    for (int index = 0; in.read(name, 16); ++index) {
        const std::string why = run_any(name, in, out, Operators{});
        if (why.empty()) continue;
        std::fprintf(stderr, "case %d: %s\n", index, why.c_str());
        return 1;
    }
    return 0;
}
