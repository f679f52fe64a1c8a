// ONNX Runtime: shapes and pointers in, the runtime's own threads, nothing computed here.

#include <array>
#include <cstdio>

#include "onnxruntime_abi.h"
#include "operators.h"

namespace tomexport::ort {
namespace {

constexpr const char *kDomain = "tomexport";
constexpr std::size_t kMostThreads = 8;  // a kernel of microseconds gains nothing from more

template <class Operator> struct Kernel {
    const Api &api;
    Operator op;
};

Status *fail(const Api &api, const char *name, const std::string &what) {
    char text[200];
    std::snprintf(text, sizeof text, "%s.%s: %s", kDomain, name, what.c_str());
    return api.create_status(ErrorCode::kInvalidArgument, text);
}

// Dims beyond the most that an operator has stay unread; the array does not fit then.
Status *read(const Api &api, const KernelContext *context, std::size_t index, const void **data,
             Dims *dims) {
    const Value *value = nullptr;
    ShapeInfo *info = nullptr;
    void *memory = nullptr;
    if (Status *s = api.input(context, index, &value)) return s;
    if (Status *s = api.data(const_cast<Value *>(value), &memory)) return s;
    if (Status *s = api.shape(value, &info)) return s;
    Status *status = api.n_dims(info, &dims->n);
    if (!status && dims->n <= kMostAxes) status = api.dims(info, dims->values, dims->n);
    api.release(info);
    *data = memory;
    return status;
}

Status *write(const Api &api, KernelContext *context, std::size_t index, const Dims &dims,
              void **data) {
    Value *value = nullptr;
    if (Status *s = api.output(context, index, dims.values, dims.n, &value)) return s;
    return api.data(value, data);
}

template <class Operator> Status *compute(void *kernel, KernelContext *context) {
    const auto &[api, op] = *static_cast<Kernel<Operator> *>(kernel);
    Call call;
    bool fits = true;
    for (std::size_t i = 0; i < kNumInputs<Operator>; ++i) {
        Dims dims;
        if (Status *s = read(api, context, i, &call.in[i], &dims)) return s;
        fits = fits && call.sizes.fit(Operator::kInputs[i].axes, dims);
    }
    if (!fits) return fail(api, Operator::kName, wanted<Operator>());
    if (const char *why = op.refusal(call.sizes['N'])) return fail(api, Operator::kName, why);
    call.sizes.set('M', call.sizes['N'] - op.removed());
    for (std::size_t i = 0; i < kNumOutputs<Operator>; ++i) {
        const Dims dims = call.sizes.of(Operator::kOutputs[i].axes);
        if (Status *s = write(api, context, i, dims, &call.out[i])) return s;
    }

    struct Caller {
        const Api &api;
        KernelContext *context;
        Status *status;
    } caller{api, context, nullptr};
    tomexport::run<float>(op, call, Threads(kMostThreads, &caller, [](void *data, Threads::Task task, std::size_t n, void *job) {
        auto &[api, context, status] = *static_cast<Caller *>(data);
        Status *now = api.parallel_for(context, task, n, 0, job);
        if (now) status ? api.release(now) : void(status = now);
    }));
    return caller.status;
}

template <class Operator> Status *create(const CustomOp *, const Api *api, const KernelInfo *info, void **out) {
    std::array<std::int64_t, std::size(Operator::kAttributes)> values{};
    std::int64_t *value = values.data();
    for (const Attribute &attribute : Operator::kAttributes)
        if (Status *s = api->attribute(info, attribute.name, value++)) {
            if (!attribute.optional) return s;
            api->release(s);
        }
    *out = new Kernel<Operator>{*api, Operator(values.data())};
    return nullptr;
}

ElementType element(const Port &port) {
    return port.type == Type::kInteger ? ElementType::kInt64 : ElementType::kFloat;
}

template <class Operator> const CustomOp *custom_op() {
    static const CustomOp op = [] {
        CustomOp o;
        o.name = [](const CustomOp *) { return Operator::kName; };
        o.provider = [](const CustomOp *) -> const char * { return nullptr; };  // any: the CPU
        o.input_type = [](const CustomOp *, std::size_t i) { return element(Operator::kInputs[i]); };
        o.n_inputs = [](const CustomOp *) { return kNumInputs<Operator>; };
        o.output_type = [](const CustomOp *, std::size_t i) { return element(Operator::kOutputs[i]); };
        o.n_outputs = [](const CustomOp *) { return kNumOutputs<Operator>; };
        o.input_characteristic = [](const CustomOp *, std::size_t) { return Characteristic::kRequired; };
        o.output_characteristic = o.input_characteristic;
        o.input_memory = [](const CustomOp *, std::size_t) { return 0; };
        o.variadic_input_min = [](const CustomOp *) { return 1; };
        o.variadic_input_same = o.variadic_input_min;
        o.variadic_output_min = o.variadic_input_min;
        o.variadic_output_same = o.variadic_input_min;
        o.create_kernel_v2 = create<Operator>;
        o.compute_v2 = compute<Operator>;
        o.destroy = [](void *kernel) { delete static_cast<Kernel<Operator> *>(kernel); };
        o.first_version = [](const CustomOp *) { return 1; };
        o.last_version = o.first_version;
        return o;
    }();
    return &op;
}

template <class... Operator> Status *add_all(const Api &api, OpDomain *domain, List<Operator...>) {
    Status *status = nullptr;
    ((status = status ? status : api.add_op(domain, custom_op<Operator>())), ...);
    return status;
}

}  // namespace
}  // namespace tomexport::ort

#if defined(_WIN32)
#define TOMEXPORT_EXPORT __declspec(dllexport)
#else
#define TOMEXPORT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" TOMEXPORT_EXPORT tomexport::ort::Status *
RegisterCustomOps(tomexport::ort::SessionOptions *options, const tomexport::ort::ApiBase *base) {
    using namespace tomexport;
    const ort::Api *api = base->get_api(ort::kApiVersion);
    if (!api) return nullptr;  // an older runtime: the nodes run as the functions that they carry
    static ort::OpDomain *domain = nullptr;  // lives as long as the library
    static ort::Status *status = [&] {
        ort::Status *s = api->create_domain(ort::kDomain, &domain);
        return s ? s : ort::add_all(*api, domain, Operators{});
    }();
    return status ? status : api->add_domain(options, domain);
}
