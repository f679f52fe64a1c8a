// ONNX Runtime: shapes and pointers in, the runtime's own threads, nothing computed here.

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

struct Dims {
    std::int64_t values[4] = {};
    std::size_t n = 0;
};

Status *fail(const Api &api, const char *name, const char *what) {
    char text[200];
    std::snprintf(text, sizeof text, "%s.%s: %s", kDomain, name, what);
    return api.create_status(ErrorCode::kInvalidArgument, text);
}

Status *read(const Api &api, const KernelContext *context, std::size_t index, const float **data,
             Dims *dims) {
    const Value *value = nullptr;
    ShapeInfo *info = nullptr;
    void *memory = nullptr;
    if (Status *s = api.input(context, index, &value)) return s;
    if (Status *s = api.data(const_cast<Value *>(value), &memory)) return s;
    if (Status *s = api.shape(value, &info)) return s;
    Status *status = api.n_dims(info, &dims->n);
    if (!status && dims->n <= 4) status = api.dims(info, dims->values, dims->n);
    api.release(info);
    *data = static_cast<const float *>(memory);
    return status;
}

template <class T> Status *write(const Api &api, KernelContext *context, std::size_t index,
                                 std::initializer_list<std::int64_t> dims, T **data) {
    Value *value = nullptr;
    if (Status *s = api.output(context, index, dims.begin(), dims.size(), &value)) return s;
    return api.data(value, reinterpret_cast<void **>(data));
}

template <class Operator> Status *compute(void *kernel, KernelContext *context) {
    const auto &[api, op] = *static_cast<Kernel<Operator> *>(kernel);
    Call<float> call{};
    Dims x, size, signal;
    if (Status *s = read(api, context, 0, &call.x, &x)) return s;
    if (Status *s = read(api, context, 1, &call.size, &size)) return s;
    if (Status *s = read(api, context, 2, &call.signal, &signal)) return s;
    call.n_batch = x.values[0], call.n_tokens = x.values[1], call.n_channels = x.values[2];
    call.n_groups = signal.values[1], call.n_dims = signal.values[3];
    call.one_size = size.values[0] == 1;
    const bool fits = x.n == 3 && size.n == 3 && signal.n == 4 && size.values[2] == 1 &&
                      (call.one_size || size.values[0] == call.n_batch) &&
                      size.values[1] == call.n_tokens && signal.values[0] == call.n_batch &&
                      signal.values[2] == call.n_tokens;
    if (!fits) return fail(api, Operator::kName, "x (B,N,C), size (B,N,1), signal (B,G,N,D) wanted");
    if (const char *why = op.refusal(call.n_tokens)) return fail(api, Operator::kName, why);
    const std::int64_t n_out = call.n_tokens - op.removed();
    if (Status *s = write(api, context, 0, {call.n_batch, n_out, call.n_channels}, &call.x_out)) return s;
    if (Status *s = write(api, context, 1, {call.n_batch, n_out, 1}, &call.size_out)) return s;
    if (Status *s = write(api, context, 2, {call.n_batch, call.n_tokens}, &call.target)) return s;

    struct Caller {
        const Api &api;
        KernelContext *context;
        Status *status;
    } caller{api, context, nullptr};
    tomexport::run(op, call, Threads(kMostThreads, &caller, [](void *data, Threads::Task task, std::size_t n, void *job) {
        auto &[api, context, status] = *static_cast<Caller *>(data);
        Status *now = api.parallel_for(context, task, n, 0, job);
        if (now) status ? api.release(now) : void(status = now);
    }));
    return caller.status;
}

template <class Operator> Status *create(const CustomOp *, const Api *api, const KernelInfo *info, void **out) {
    std::int64_t r = 0, n_prefix = 0, raster = 0;
    if (Status *s = api->attribute(info, "r", &r)) return s;
    if (Status *s = api->attribute(info, "n_prefix", &n_prefix)) return s;
    if (Status *s = api->attribute(info, "raster", &raster)) api->release(s);  // it can be left out
    *out = new Kernel<Operator>{*api, Operator(r, n_prefix, raster != 0)};
    return nullptr;
}

template <class Operator> const CustomOp *custom_op() {
    static const CustomOp op = [] {
        CustomOp o;
        o.name = [](const CustomOp *) { return Operator::kName; };
        o.provider = [](const CustomOp *) -> const char * { return nullptr; };  // any: the CPU
        o.input_type = [](const CustomOp *, std::size_t) { return ElementType::kFloat; };
        o.n_inputs = [](const CustomOp *) { return std::size_t{3}; };
        o.output_type = [](const CustomOp *, std::size_t i) {
            return i == 2 ? ElementType::kInt64 : ElementType::kFloat;
        };
        o.n_outputs = [](const CustomOp *) { return std::size_t{3}; };
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
