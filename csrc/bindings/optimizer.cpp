#include "slidecore/optimizer.h"

#include "bindings.h"
#include "slidecore/status.h"

namespace slidecore::bindings {
namespace {

AdamWHyper make_hyper(double lr, double beta1, double beta2, double eps, double weight_decay, std::int64_t step,
                      bool maximize, float gradient_scale) {
  AdamWHyper hyper;
  hyper.lr = lr;
  hyper.beta1 = beta1;
  hyper.beta2 = beta2;
  hyper.eps = eps;
  hyper.weight_decay = weight_decay;
  hyper.step = step;
  hyper.maximize = maximize;
  hyper.gradient_scale = gradient_scale;
  return hyper;
}

}  // namespace

AdamWPlanes make_planes(std::uintptr_t weight, std::uintptr_t residual, std::uintptr_t weight32, std::uintptr_t exp_avg,
                        std::uintptr_t exp_avg_sq, std::uintptr_t exp_avg_scale, std::uintptr_t exp_avg_sq_scale) {
  const bool planes16 = weight != 0 && residual != 0;
  if (planes16 == (weight32 != 0) || exp_avg == 0 || exp_avg_sq == 0 ||
      (exp_avg_scale == 0) != (exp_avg_sq_scale == 0)) {
    throw Error(Code::invalid_argument,
                "AdamW needs exp_avg, exp_avg_sq, for 8-bit moments both of their scales, and either weight and "
                "residual, or weight32 alone");
  }
  AdamWPlanes planes;
  planes.weight = pointer<std::uint16_t>(weight);
  planes.residual = pointer<std::int16_t>(residual);
  planes.weight32 = pointer<float>(weight32);
  if (exp_avg_scale == 0) {
    planes.exp_avg = pointer<float>(exp_avg);
    planes.exp_avg_sq = pointer<float>(exp_avg_sq);
  } else {
    planes.exp_avg8 = pointer<std::int8_t>(exp_avg);
    planes.exp_avg_sq8 = pointer<std::uint8_t>(exp_avg_sq);
    planes.exp_avg_scale = pointer<float>(exp_avg_scale);
    planes.exp_avg_sq_scale = pointer<float>(exp_avg_sq_scale);
  }
  return planes;
}

void bind_optimizer(py::module_& m) {
  py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(m, "ThreadPool")
      .def(py::init<int>(), py::arg("threads") = 0)
      .def_property_readonly("threads", &ThreadPool::threads);
  m.def("usable_cpus", &usable_cpus);
  m.def("instruction_set", [] { return std::string(instruction_set()); });
  m.def("available_instruction_sets", &available_instruction_sets);
  m.def("force_instruction_set", &force_instruction_set, py::arg("name"));
  m.def(
      "split",
      [](ThreadPool& pool, std::uintptr_t master, std::uintptr_t weight, std::uintptr_t residual, std::size_t n) {
        split(pool, pointer<const float>(master), pointer<std::uint16_t>(weight), pointer<std::int16_t>(residual), n);
      },
      py::arg("pool"), py::arg("master"), py::arg("weight"), py::arg("residual"), py::arg("n"), ReleaseGil());
  m.def(
      "merge",
      [](ThreadPool& pool, std::uintptr_t weight, std::uintptr_t residual, std::uintptr_t master, std::size_t n) {
        merge(pool, pointer<const std::uint16_t>(weight), pointer<const std::int16_t>(residual), pointer<float>(master),
              n);
      },
      py::arg("pool"), py::arg("weight"), py::arg("residual"), py::arg("master"), py::arg("n"), ReleaseGil());
  m.def(
      "parallel_copy",
      [](ThreadPool& pool, std::uintptr_t to, std::uintptr_t source, std::size_t bytes) {
        parallel_copy(pool, pointer<void>(to), pointer<const void>(source), bytes);
      },
      py::arg("pool"), py::arg("to"), py::arg("source"), py::arg("nbytes"), ReleaseGil());
  py::class_<AdamWHyper>(m, "AdamWHyper")
      .def(py::init(&make_hyper), py::kw_only(), py::arg("lr") = 1e-3, py::arg("beta1") = 0.9, py::arg("beta2") = 0.999,
           py::arg("eps") = 1e-8, py::arg("weight_decay") = 1e-2, py::arg("step") = 1, py::arg("maximize") = false,
           py::arg("gradient_scale") = 1.f)
      .def_readwrite("lr", &AdamWHyper::lr)
      .def_readwrite("beta1", &AdamWHyper::beta1)
      .def_readwrite("beta2", &AdamWHyper::beta2)
      .def_readwrite("eps", &AdamWHyper::eps)
      .def_readwrite("weight_decay", &AdamWHyper::weight_decay)
      .def_readwrite("step", &AdamWHyper::step)
      .def_readwrite("maximize", &AdamWHyper::maximize)
      .def_readwrite("gradient_scale", &AdamWHyper::gradient_scale);
  m.def(
      "adamw",
      [](ThreadPool& pool, const AdamWHyper& hyper, std::size_t n, std::uintptr_t gradient, bool gradient_float32,
         std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq, std::uintptr_t weight, std::uintptr_t residual,
         std::uintptr_t weight32, std::uintptr_t exp_avg_scale, std::uintptr_t exp_avg_sq_scale) {
        adamw(pool, hyper,
              make_planes(weight, residual, weight32, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale),
              pointer<const void>(gradient), gradient_float32 ? GradientType::float32 : GradientType::bfloat16, n);
      },
      py::arg("pool"), py::arg("hyper"), py::kw_only(), py::arg("n"), py::arg("gradient"), py::arg("gradient_float32"),
      py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("weight") = 0, py::arg("residual") = 0,
      py::arg("weight32") = 0, py::arg("exp_avg_scale") = 0, py::arg("exp_avg_sq_scale") = 0, ReleaseGil());
  m.attr("MOMENTS_GROUP") = moments_group;
}

}  // namespace slidecore::bindings
