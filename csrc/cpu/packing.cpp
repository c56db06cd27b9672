// Rows of tokens out of memory-mapped sets, as numpy arrays.
#include "jam/packing.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "launchers.h"

namespace py = pybind11;

namespace jam {
namespace {

template <typename Item>
using Row = py::array_t<Item, py::array::c_style>;

// Writes the stream's tokens [start, stop) to `out_tokens` and `out_documents` from place `filled`
// on; (filled, document) afterwards.
template <typename Token>
py::tuple read(const Row<Token>& tokens, const Row<int64_t>& starts, const Row<uint32_t>& order,
               const Row<int64_t>& ends, int64_t start, int64_t stop, int64_t filled,
               int32_t document, Row<int32_t>& out_tokens, Row<int32_t>& out_documents) {
  const int64_t num_documents = order.size();
  if (ends.size() != num_documents || out_documents.size() != out_tokens.size() || start < 0 ||
      start > stop || stop > (num_documents ? ends.data()[num_documents - 1] : 0) || filled < 0 ||
      stop - start > out_tokens.size() - filled) {
    throw py::value_error("read_stream: arrays or places do not fit each other");
  }
  const Stream<Token> stream{tokens.data(), starts.data(), order.data(), ends.data(),
                             num_documents};
  int32_t* const to = out_tokens.mutable_data() + filled;
  int32_t* const owners = out_documents.mutable_data() + filled;
  Filled result;
  {
    const py::gil_scoped_release others_run;  // a page of the file may have to be read from disk
    result = read_stream(stream, start, stop, document, to, owners);
  }
  return py::make_tuple(filled + result.size, result.document);
}

Row<int64_t> pack(const Row<int64_t>& ends, int64_t block_size) {
  const std::vector<int64_t> starts = pack_greedily(ends.data(), ends.size(), block_size);
  return Row<int64_t>(static_cast<py::ssize_t>(starts.size()), starts.data());
}

}  // namespace

void bind_packing(py::module_& module) {
  const auto define = [&module]<typename Token>(Token) {
    module.def("read_stream", &read<Token>, py::arg("tokens").noconvert(),
               py::arg("starts").noconvert(), py::arg("order").noconvert(),
               py::arg("ends").noconvert(), py::arg("start"), py::arg("stop"), py::arg("filled"),
               py::arg("document"), py::arg("out_tokens").noconvert(),
               py::arg("out_documents").noconvert());
  };
  module.def("pack_greedily", &pack, py::arg("ends").noconvert(), py::arg("block_size"));
  define(uint16_t{}), define(int32_t{}), define(uint8_t{}), define(int64_t{}), define(int16_t{}),
      define(int8_t{});
}

}  // namespace jam
