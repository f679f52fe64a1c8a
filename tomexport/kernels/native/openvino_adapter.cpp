// OpenVINO: shapes and pointers in, the runtime's own threads, nothing computed here.

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/op.hpp>

#include "operators.h"

namespace tomexport {
namespace {

template <class Operator> class Node : public ov::op::Op {
  public:
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
    Node(const ov::OutputVector &inputs, std::int64_t r, std::int64_t n_prefix, bool raster, float epsilon)
        : Op(inputs), r_(r), n_prefix_(n_prefix), raster_(raster), epsilon_(epsilon) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        ov::PartialShape x = get_input_partial_shape(0), size = get_input_partial_shape(1),
                         signal = get_input_partial_shape(2);
        ov::Dimension n_batch, n, n_out;
        const bool fits = x.merge_rank(3) && size.merge_rank(3) && signal.merge_rank(4) &&
                          ov::Dimension::merge(n, x[1], size[1]) && ov::Dimension::merge(n, n, signal[2]) &&
                          ov::Dimension::merge(n_batch, x[0], signal[0]) && size[2].compatible(1) &&
                          (size[0].compatible(1) || size[0].compatible(n_batch));
        NODE_VALIDATION_CHECK(this, fits, "x (B,N,C), size (B,N,1) and signal (B,G,N,D) wanted, not ", x,
                              ", ", size, " and ", signal);
        if (n.is_static()) {
            const char *why = Operator(r_, n_prefix_, raster_).refusal(n.get_length());
            NODE_VALIDATION_CHECK(this, !why, "r = ", r_, " of ", n, " tokens: ", why);
            n_out = n.get_length() - r_;
        }
        const ov::element::Type type = get_input_element_type(0);
        NODE_VALIDATION_CHECK(this, type == ov::element::f32 || type == ov::element::bf16, "x is ", type);
        NODE_VALIDATION_CHECK(this, get_input_element_type(2) == type, "signal is of another type than x");
        NODE_VALIDATION_CHECK(this, get_input_element_type(1) == ov::element::f32, "size is not f32");
        set_output_type(0, type, {n_batch, n_out, x[2]});
        set_output_type(1, ov::element::f32, {n_batch, n_out, 1});
        set_output_type(2, ov::element::i64, {n_batch, n});
        if (!normalises()) return;
        const ov::PartialShape channels{x[2]};
        const bool norm_fits = get_input_partial_shape(3).compatible(channels) &&
                               get_input_partial_shape(4).compatible(channels) &&
                               get_input_element_type(3) == ov::element::f32 &&
                               get_input_element_type(4) == ov::element::f32;
        NODE_VALIDATION_CHECK(this, norm_fits, "a weight and an offset (C) in f32 wanted, not ",
                              get_input_partial_shape(3), " and ", get_input_partial_shape(4));
        set_output_type(3, type, {n_batch, n_out, x[2]});
        set_output_type(4, type, {n_batch, n_out, 1});
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector &inputs) const override {
        return std::make_shared<Node>(inputs, r_, n_prefix_, raster_, epsilon_);
    }

    bool visit_attributes(ov::AttributeVisitor &visitor) override {
        visitor.on_attribute("r", r_);
        visitor.on_attribute("n_prefix", n_prefix_);
        visitor.on_attribute("raster", raster_);
        if (normalises()) visitor.on_attribute("epsilon", epsilon_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector &out, const ov::TensorVector &in) const override {
        if (in[0].get_element_type() == ov::element::bf16) compute<BFloat16>(out, in);
        else compute<float>(out, in);
        return true;
    }

  private:
    std::int64_t r_ = 0, n_prefix_ = 0;
    bool raster_ = false;
    float epsilon_ = 0.f;

    // Only our own sessions make such nodes, of a node and the LayerNorm and logarithm after it.
    bool normalises() const { return get_input_size() == 5; }

    static void shape(ov::Tensor &tensor, const ov::Shape &wanted) {
        if (tensor.get_shape() != wanted) tensor.set_shape(wanted);
    }

    template <class T> void compute(ov::TensorVector &out, const ov::TensorVector &in) const {
        const Operator op(r_, n_prefix_, raster_);
        const ov::Shape &x = in[0].get_shape(), &signal = in[2].get_shape();
        Call<T> call{};
        call.n_batch = x[0], call.n_tokens = x[1], call.n_channels = x[2];
        call.n_groups = signal[1], call.n_dims = signal[3];
        call.one_size = in[1].get_shape()[0] == 1;
        const std::size_t n_out = x[1] - op.removed();
        shape(out[0], {x[0], n_out, x[2]});
        shape(out[1], {x[0], n_out, 1});
        shape(out[2], {x[0], x[1]});
        call.x = static_cast<const T *>(in[0].data());
        call.size = in[1].data<const float>();
        call.signal = static_cast<const T *>(in[2].data());
        call.x_out = static_cast<T *>(out[0].data());
        call.size_out = out[1].data<float>();
        call.target = out[2].data<std::int64_t>();
        if (normalises()) {
            shape(out[3], {x[0], n_out, x[2]});
            shape(out[4], {x[0], n_out, 1});
            call.norm_weight = in[3].data<const float>(), call.norm_offset = in[4].data<const float>();
            call.epsilon = epsilon_;
            call.norm_out = static_cast<T *>(out[3].data());
            call.log_size_out = static_cast<T *>(out[4].data());
        }
        const auto n_threads = static_cast<std::size_t>(parallel_get_max_threads());
        run(op, call, Threads(n_threads, nullptr, [](void *, Threads::Task task, std::size_t n, void *job) {
            ov::parallel_for(n, [=](std::size_t i) { task(job, i); });
        }));
    }
};

// An ONNX node becomes ours. It can leave out `raster`.
template <class Operator> ov::OutputVector convert(const ov::frontend::NodeContext &node) {
    ov::OutputVector inputs;
    for (std::size_t i = 0; i < node.get_input_size(); ++i) inputs.push_back(node.get_input(static_cast<int>(i)));
    const auto r = node.get_attribute<std::int64_t>("r");
    const auto n_prefix = node.get_attribute<std::int64_t>("n_prefix");
    const auto raster = node.get_attribute<std::int64_t>("raster", 0);
    return std::make_shared<Node<Operator>>(inputs, r, n_prefix, raster != 0, 0.f)->outputs();
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
