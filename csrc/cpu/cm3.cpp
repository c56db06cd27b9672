// The CM3 objective on numpy arrays.
#include "jam/cm3.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "launchers.h"

namespace py = pybind11;

namespace jam {
namespace {

template <typename Item>
using Row = py::array_t<Item, py::array::c_style>;

Cm3Scope scope_of(const std::string& name) {
  if (name == "block") return Cm3Scope::kBlock;
  if (name == "authors") return Cm3Scope::kAuthors;
  if (name == "document") return Cm3Scope::kDocument;
  throw py::value_error("cm3: unknown scope " + name);
}

Cm3 make(double mean_spans, int64_t max_spans, double mask_whole_caption, const std::string& scope,
         int32_t pad, int32_t eos, int32_t break_, int32_t eoss, int32_t first_sentinel,
         int8_t text, int8_t image, const Row<int8_t>& modality) {
  return Cm3({mean_spans, max_spans, mask_whole_caption, scope_of(scope)},
             {pad,
              eos,
              break_,
              eoss,
              first_sentinel,
              text,
              image,
              {modality.data(), modality.data() + modality.size()}});
}

// (tokens, documents, dropped); the arrays that went in if nothing moves.
py::tuple transform(const Cm3& cm3, const Row<int32_t>& tokens, const Row<int32_t>& documents,
                    int64_t seed, int64_t index) {
  const py::ssize_t length = tokens.size();
  if (tokens.ndim() != 1 || documents.ndim() != 1 || documents.size() != length) {
    throw py::value_error("cm3: tokens and documents must be two rows of one length");
  }
  const auto pieces = cm3.plan(tokens.data(), documents.data(), length, seed, index);
  const auto moves = [](const Cm3Piece& piece) { return !piece.spans.empty(); };
  if (std::none_of(pieces.begin(), pieces.end(), moves)) {
    return py::make_tuple(tokens, documents, 0);
  }
  Row<int32_t> out_tokens(length), out_documents(length);
  const int64_t dropped = cm3.carry_out(pieces, tokens.data(), documents.data(), length,
                                        out_tokens.mutable_data(), out_documents.mutable_data());
  return py::make_tuple(std::move(out_tokens), std::move(out_documents), dropped);
}

}  // namespace

void bind_cm3(py::module_& module) {
  py::class_<Cm3>(module, "Cm3")
      .def(py::init(&make), py::kw_only(), py::arg("mean_spans"), py::arg("max_spans"),
           py::arg("mask_whole_caption"), py::arg("scope"), py::arg("pad"), py::arg("eos"),
           py::arg("break_"), py::arg("eoss"), py::arg("first_sentinel"), py::arg("text"),
           py::arg("image"), py::arg("modality"))
      .def("__call__", &transform, py::arg("tokens").noconvert(), py::arg("documents").noconvert(),
           py::arg("seed"), py::arg("index"));
}

}  // namespace jam
