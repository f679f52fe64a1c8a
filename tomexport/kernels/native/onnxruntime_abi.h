// The part of ONNX Runtime's C interface that a custom operator needs, written from its published
// layout: tables of function pointers that only ever grow at the end. No header, no library of
// ONNX Runtime is needed to build; tests/kernels/test_native.py compares the offsets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tomexport::ort {

constexpr std::uint32_t kApiVersion = 17;  // the first with ParallelFor for custom operators

struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct OpDomain;
struct SessionOptions;

enum class ElementType : int { kFloat = 1, kInt64 = 7 };
enum class Characteristic : int { kRequired = 0, kOptional = 1 };
enum class ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// A slot of OrtApi by its number, as the type of function that stands there.
struct Api {
    void *slots[275];
    template <int slot, class Result, class... Args> Result call(Args... args) const {
        return reinterpret_cast<Result (*)(Args...)>(slots[slot])(args...);
    }
    Status *create_status(ErrorCode code, const char *text) const {
        return call<0, Status *>(code, text);
    }
    void release(Status *status) const { call<93, void>(status); }
    void release(ShapeInfo *info) const { call<99, void>(info); }
    Status *create_domain(const char *name, OpDomain **out) const {
        return call<26, Status *>(name, out);
    }
    Status *add_op(OpDomain *domain, const void *op) const {
        return call<27, Status *>(domain, op);
    }
    Status *add_domain(SessionOptions *options, OpDomain *domain) const {
        return call<28, Status *>(options, domain);
    }
    Status *data(Value *value, void **out) const { return call<51, Status *>(value, out); }
    Status *n_dims(const ShapeInfo *info, std::size_t *out) const {
        return call<61, Status *>(info, out);
    }
    Status *dims(const ShapeInfo *info, std::int64_t *out, std::size_t n) const {
        return call<62, Status *>(info, out, n);
    }
    Status *shape(const Value *value, ShapeInfo **out) const {
        return call<65, Status *>(value, out);
    }
    Status *attribute(const KernelInfo *info, const char *name, std::int64_t *out) const {
        return call<86, Status *>(info, name, out);
    }
    Status *input(const KernelContext *context, std::size_t index, const Value **out) const {
        return call<90, Status *>(context, index, out);
    }
    Status *output(KernelContext *context, std::size_t index, const std::int64_t *dims,
                   std::size_t n, Value **out) const {
        return call<91, Status *>(context, index, dims, n, out);
    }
    Status *parallel_for(const KernelContext *context, void (*task)(void *, std::size_t),
                         std::size_t n, std::size_t n_batches, void *data) const {
        return call<274, Status *>(context, task, n, n_batches, data);
    }
};

struct ApiBase {
    const Api *(*get_api)(std::uint32_t version);
    const char *(*get_version)();
};

// OrtCustomOp: what the runtime asks an operator.
struct CustomOp {
    std::uint32_t version = kApiVersion;
    void *(*create_kernel)(const CustomOp *, const Api *, const KernelInfo *) = nullptr;
    const char *(*name)(const CustomOp *) = nullptr;
    const char *(*provider)(const CustomOp *) = nullptr;
    ElementType (*input_type)(const CustomOp *, std::size_t) = nullptr;
    std::size_t (*n_inputs)(const CustomOp *) = nullptr;
    ElementType (*output_type)(const CustomOp *, std::size_t) = nullptr;
    std::size_t (*n_outputs)(const CustomOp *) = nullptr;
    void (*compute)(void *, KernelContext *) = nullptr;
    void (*destroy)(void *) = nullptr;
    Characteristic (*input_characteristic)(const CustomOp *, std::size_t) = nullptr;
    Characteristic (*output_characteristic)(const CustomOp *, std::size_t) = nullptr;
    int (*input_memory)(const CustomOp *, std::size_t) = nullptr;
    int (*variadic_input_min)(const CustomOp *) = nullptr;
    int (*variadic_input_same)(const CustomOp *) = nullptr;
    int (*variadic_output_min)(const CustomOp *) = nullptr;
    int (*variadic_output_same)(const CustomOp *) = nullptr;
    Status *(*create_kernel_v2)(const CustomOp *, const Api *, const KernelInfo *, void **) = nullptr;
    Status *(*compute_v2)(void *, KernelContext *) = nullptr;
    Status *(*infer_shapes)(const CustomOp *, void *) = nullptr;
    int (*first_version)(const CustomOp *) = nullptr;
    int (*last_version)(const CustomOp *) = nullptr;
};

}  // namespace tomexport::ort
