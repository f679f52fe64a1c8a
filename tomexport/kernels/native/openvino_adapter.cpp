// OpenVINO: shapes and pointers in, the runtime's own threads, nothing computed here.

#include <array>
#include <map>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/op.hpp>

#include "operators.h"

namespace tomexport {
namespace {

using Dimensions = std::map<char, ov::Dimension>;  // by their letters; -1 is any

template <class Operator> class Node : public ov::op::Op {
  public:
    using Attributes = std::array<std::int64_t, std::size(Operator::kAttributes)>;

    static const ov::DiscreteTypeInfo &get_type_info_static() {
        static const ov::DiscreteTypeInfo info = [] {
            ov::DiscreteTypeInfo i{Operator::kName, "tomexport", &ov::op::Op::get_type_info_static()};
            i.hash();
            return i;
        }();
        return info;
    }
    const ov::DiscreteTypeInfo &get_type_info() const override { return get_type_info_static(); }

    Node() = default;
    Node(const ov::OutputVector &inputs, const Attributes &attributes, float epsilon)
        : Op(inputs), attributes_(attributes), epsilon_(epsilon) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const ov::element::Type real = get_input_element_type(0);
        const bool computes = real == ov::element::f32 || real == ov::element::bf16;
        NODE_VALIDATION_CHECK(this, computes, Operator::kInputs[0].name, " is ", real);
        Dimensions sizes;
        for (std::size_t i = 0; i < n_inputs(); ++i) {
            const auto &[name, type, axes] = Operator::kInputs[i];
            const ov::PartialShape &shape = get_input_partial_shape(i);
            const ov::element::Type found = get_input_element_type(i);
            NODE_VALIDATION_CHECK(this, fit(axes, shape, sizes), wanted<Operator>(), ", and ", name,
                                  " is ", shape);
            const bool narrow = type == Type::kInteger && found == ov::element::i32;
            const bool right = narrow || found == element(type, real);
            NODE_VALIDATION_CHECK(this, right, name, " is ", found, ", not ", element(type, real));
            if (type == Type::kReal) input(i).get_rt_info()["tomexport.real"] = true;  // for sessions
        }
        if (sizes['N'].is_static()) {
            const Operator op(attributes_.data());
            const char *why = op.refusal(sizes['N'].get_length());
            NODE_VALIDATION_CHECK(this, !why, "r = ", op.removed(), " of ", sizes['N'], " tokens: ",
                                  why);
            sizes['M'] = sizes['N'].get_length() - op.removed();
        }
        for (std::size_t i = 0; i < n_outputs(); ++i) {
            auto [name, type, axes] = Operator::kOutputs[i];
            ov::PartialShape shape{};
            for (; *axes; ++axes) shape.push_back(*axes == '1' ? ov::Dimension(1) : sizes[*axes]);
            // OpenVINO computes with integers of 32 bits, and would convert those of a file
            const bool narrow = type == Type::kInteger && follows();
            set_output_type(i, narrow ? ov::element::i32 : element(type, real), shape);
        }
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector &inputs) const override {
        return std::make_shared<Node>(inputs, attributes_, epsilon_);
    }

    bool visit_attributes(ov::AttributeVisitor &visitor) override {
        for (std::size_t i = 0; i < attributes_.size(); ++i)
            visitor.on_attribute(Operator::kAttributes[i].name, attributes_[i]);
        if (follows()) visitor.on_attribute("epsilon", epsilon_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector &out, const ov::TensorVector &in) const override {
        const Operator op(attributes_.data());
        Call call;
        call.epsilon = epsilon_;
        for (std::size_t i = 0; i < n_inputs(); ++i) {
            if (!call.sizes.fit(Operator::kInputs[i].axes, dims(in[i].get_shape()))) return false;
            call.in[i] = in[i].data();
            call.narrow = call.narrow || in[i].get_element_type() == ov::element::i32;
        }
        call.sizes.set('M', call.sizes['N'] - op.removed());
        for (std::size_t i = 0; i < n_outputs(); ++i) {
            const Dims wanted = call.sizes.of(Operator::kOutputs[i].axes);
            const ov::Shape shape(wanted.values, wanted.values + wanted.n);
            if (out[i].get_shape() != shape) out[i].set_shape(shape);
            call.out[i] = out[i].data();
            call.narrow = call.narrow || out[i].get_element_type() == ov::element::i32;
        }
        const auto n_threads = static_cast<std::size_t>(parallel_get_max_threads());
        const Threads::Run run_all = [](void *, Threads::Task task, std::size_t n, void *job) {
            ov::parallel_for(n, [=](std::size_t i) { task(job, i); });
        };
        const Threads threads(n_threads, nullptr, run_all);
        if (in[0].get_element_type() == ov::element::bf16) run<BFloat16>(op, call, threads);
        else run<float>(op, call, threads);
        return true;
    }

  private:
    Attributes attributes_{};
    float epsilon_ = 0.f;

    // Only our own sessions make such nodes, of a node and the LayerNorm and logarithm after it.
    bool follows() const {
        return Operator::kFollowed && get_input_size() == std::size(Operator::kInputs);
    }
    std::size_t n_inputs() const { return kNumInputs<Operator> + n_following(); }
    std::size_t n_outputs() const { return kNumOutputs<Operator> + n_following(); }
    std::size_t n_following() const { return follows() ? kFollowing<Operator> : 0; }

    static ov::element::Type element(Type type, ov::element::Type real) {
        if (type == Type::kReal) return real;
        return type == Type::kFloat ? ov::element::f32 : ov::element::i64;
    }

    // As Sizes::fit, of shapes that are not all known.
    static bool fit(const char *axes, ov::PartialShape shape, Dimensions &sizes) {
        if (!shape.merge_rank(static_cast<std::int64_t>(std::strlen(axes)))) return false;
        for (const ov::Dimension &size : shape) {
            const char axis = *axes++;
            const bool one = size.compatible(1);
            if (axis == '1' && !one) return false;
            if (axis == 'S' && !one && !size.compatible(sizes['B'])) return false;
            if (axis != '1' && !ov::Dimension::merge(sizes[axis], sizes[axis], size)) return false;
        }
        return true;
    }

    static Dims dims(const ov::Shape &shape) {
        Dims dims;
        dims.n = shape.size();
        std::copy_n(shape.begin(), std::min(dims.n, kMostAxes), dims.values);
        return dims;
    }
};

// An ONNX node becomes ours.
template <class Operator> ov::OutputVector convert(const ov::frontend::NodeContext &node) {
    ov::OutputVector inputs;
    for (std::size_t i = 0; i < node.get_input_size(); ++i) inputs.push_back(node.get_input(static_cast<int>(i)));
    typename Node<Operator>::Attributes values;
    std::int64_t *value = values.data();
    for (const auto &[name, optional] : Operator::kAttributes)
        *value++ = optional ? node.get_attribute<std::int64_t>(name, 0)
                            : node.get_attribute<std::int64_t>(name);
    return std::make_shared<Node<Operator>>(inputs, values, 0.f)->outputs();
}

template <class... Operator> std::vector<ov::Extension::Ptr> extensions(List<Operator...>) {
    std::vector<ov::Extension::Ptr> all;
    (all.insert(all.end(), {std::make_shared<ov::OpExtension<Node<Operator>>>(),
                            std::make_shared<ov::frontend::onnx::ConversionExtension>(
                                Operator::kName, "tomexport", convert<Operator>)}),
     ...);
    return all;
}

}  // namespace
}  // namespace tomexport

OPENVINO_CREATE_EXTENSIONS(tomexport::extensions(tomexport::Operators{}));
