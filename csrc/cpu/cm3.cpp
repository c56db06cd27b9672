// The CM3 objective on numpy arrays.
#include "jam/cm3.h"

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/numpy_rows.h"
#include "launchers.h"

namespace py = pybind11;

namespace jam {
namespace {

Cm3Scope scope_of(const std::string& name) {
  if (name == "block") return Cm3Scope::kBlock;
  if (name == "authors") return Cm3Scope::kAuthors;
  if (name == "document") return Cm3Scope::kDocument;
  throw py::value_error("cm3: unknown scope " + name);
}

// The objective and the class of its blocks.
class Transform {
 public:
  Transform(py::type block, double mean_spans, int64_t max_spans, double mask_whole_caption,
            const std::string& scope, int32_t pad, int32_t eos, int32_t break_, int32_t eoss,
            int32_t first_sentinel, int8_t text, int8_t image, const Row<int8_t>& modality)
      : cm3_({mean_spans, max_spans, mask_whole_caption, scope_of(scope)},
             {pad,
              eos,
              break_,
              eoss,
              first_sentinel,
              text,
              image,
              {modality.data(), modality.data() + modality.size()}}),
        make_block_(std::move(block)) {}

  // A block of what it makes of these tokens; of the arrays themselves if nothing moves.
  py::object transform(const py::array& tokens, const py::array& runs, int64_t seed,
                       int64_t index) const {
    const auto* const in = numbers_of<int32_t>(tokens, "cm3: tokens");
    const auto* const in_runs = numbers_of<int32_t>(runs, "cm3: runs");
    const py::ssize_t length = tokens.size();
    const RunView view(reinterpret_cast<const Run*>(in_runs), runs.size() / 2);
    if (tokens.ndim() != 1 || runs.ndim() != 2 || runs.shape(1) != 2 || !view.fit(length)) {
      throw py::value_error("cm3: tokens must be a row, and runs (document, stop) of it");
    }
    const auto pieces = cm3_.plan(in, view, length, seed, index);
    const auto moves = [](const Cm3Piece& piece) { return !piece.spans.empty(); };
    if (std::none_of(pieces.begin(), pieces.end(), moves)) return make_block_(tokens, runs, 0);
    Row<int32_t> out_tokens(length);
    Runs out_runs;
    const int64_t dropped =
        cm3_.carry_out(pieces, in, view, length, out_tokens.mutable_data(), out_runs);
    return make_block_(std::move(out_tokens), array_of(out_runs), dropped);
  }

 private:
  Cm3 cm3_;
  BlockMaker make_block_;
};

}  // namespace

void bind_cm3(py::module_& module) {
  py::class_<Transform>(module, "Cm3")
      .def(py::init<py::type, double, int64_t, double, const std::string&, int32_t, int32_t,
                    int32_t, int32_t, int32_t, int8_t, int8_t, const Row<int8_t>&>(),
           py::kw_only(), py::arg("block"), py::arg("mean_spans"), py::arg("max_spans"),
           py::arg("mask_whole_caption"), py::arg("scope"), py::arg("pad"), py::arg("eos"),
           py::arg("break_"), py::arg("eoss"), py::arg("first_sentinel"), py::arg("text"),
           py::arg("image"), py::arg("modality"))
      .def("transform", &Transform::transform, py::arg("tokens"), py::arg("runs"), py::arg("seed"),
           py::arg("index"));
}

}  // namespace jam
