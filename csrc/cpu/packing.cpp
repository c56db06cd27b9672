// Rows of tokens out of memory-mapped sets, as numpy arrays.
#include "jam/packing.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "launchers.h"

namespace py = pybind11;

namespace jam {
namespace {

// A loop that is compiled for wider instructions too, of which the loader takes the CPU's widest.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JAM_WIDE __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#else
#define JAM_WIDE
#endif

JAM_WIDE void widen(const uint16_t* from, int64_t count, int32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <typename Token>
void widen(const Token* from, int64_t count, int32_t* to) {
  std::copy(from, from + count, to);
}

JAM_WIDE void fill(int32_t* to, int64_t count, int32_t value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

JAM_WIDE void compare(const int32_t* values, int64_t count, int32_t value, bool* differs) {
  for (int64_t i = 0; i < count; ++i) differs[i] = values[i] != value;
}

template <typename Item>
using Row = py::array_t<Item, py::array::c_style>;

// Arrays of an order, kept alive.
struct OrderRows {
  OrderRows(Row<uint32_t> numbers_, Row<int64_t> ends_, int64_t seed)
      : numbers(std::move(numbers_)),
        ends(std::move(ends_)),
        order{numbers.data(), ends.data(), numbers.size(), seed} {
    if (ends.size() != numbers.size()) {
      throw py::value_error("Order: numbers and ends must be of one length");
    }
  }

  Row<uint32_t> numbers;
  Row<int64_t> ends;
  Order order;
};

struct RetrievalRows {
  RetrievalRows(Row<int64_t> borders_, Row<int64_t> edges_, int64_t most, bool drawn)
      : borders(std::move(borders_)),
        edges(std::move(edges_)),
        retrieval(borders.data(), edges.data(), most, drawn) {
    if (borders.size() < 1 || borders.data()[borders.size() - 1] + 1 != edges.size() || most < 0) {
      throw py::value_error("Retrieval: borders, edges or most do not fit each other");
    }
  }

  // Tokens of each document in the epoch of `seed`.
  Row<int64_t> lengths(int64_t seed) const {
    Row<int64_t> found(borders.size() - 1);
    int64_t* const out = found.mutable_data();
    const py::gil_scoped_release others_run;
    for (int64_t i = 0; i < borders.size() - 1; ++i) out[i] = retrieval.length(seed, i);
    return found;
  }

  Row<int64_t> borders, edges;
  Retrieval retrieval;
};

// Reads blocks of `size` tokens out of a set.
class Reader {
 public:
  Reader(py::array tokens, Row<int64_t> starts, const RetrievalRows* retrieval, int64_t size,
         int32_t pad)
      : tokens_(std::move(tokens)),
        starts_(std::move(starts)),
        retrieval_(retrieval ? std::optional(*retrieval) : std::nullopt),
        size_(size),
        pad_(pad) {
    use_for<uint16_t>(), use_for<int32_t>(), use_for<uint8_t>(), use_for<int64_t>(),
        use_for<int16_t>(), use_for<int8_t>();
    if (!read_) throw py::type_error("Reader: tokens must be a row of integers");
  }

  // Tokens and documents, counted from 0, of a block: `count` tokens of the orders' streams in a
  // row, from token `start` of the first on, then padding as one more document.
  py::tuple read(const py::list& orders, int64_t start, int64_t count) const {
    std::vector<const Order*> streams;
    for (const py::handle& each : orders) streams.push_back(&each.cast<const OrderRows&>().order);
    if (start < 0 || count < 0 || count > size_) {
      throw py::value_error("Reader: start or count is out of range");
    }
    Row<int32_t> out_tokens(size_), out_documents(size_);
    int32_t* const tokens = out_tokens.mutable_data();
    int32_t* const documents = out_documents.mutable_data();
    int64_t filled = 0;
    {
      const py::gil_scoped_release others_run;  // a page of the file may have to be read from disk
      const Retrieval* const retrieval = retrieval_ ? &retrieval_->retrieval : nullptr;
      int32_t document = 0;
      for (const Order* const order : streams) {
        const int64_t stop = std::min(order->num_tokens(), start + count - filled);
        if (start < stop) {
          document = read_(tokens_.data(), starts_.data(), retrieval, *order, start, stop, document,
                           tokens + filled, documents + filled);
          filled += stop - start;
        }
        start = 0;
      }
      std::fill(tokens + filled, tokens + size_, pad_);
      std::fill(documents + filled, documents + size_, document);
    }
    if (filled < count) throw py::value_error("Reader: the orders have too few tokens");
    return py::make_tuple(std::move(out_tokens), std::move(out_documents));
  }

 private:
  using Read = int32_t (*)(const void*, const int64_t*, const Retrieval*, const Order&, int64_t,
                           int64_t, int32_t, int32_t*, int32_t*);

  template <typename Token>
  void use_for() {
    if (!py::isinstance<Row<Token>>(tokens_)) return;
    read_ = [](const void* tokens, auto... rest) {
      return read_stream(
          static_cast<const Token*>(tokens), rest...,
          [](const Token* from, int64_t count, int32_t* to) { widen(from, count, to); }, fill);
    };
  }

  py::array tokens_;
  Row<int64_t> starts_;
  std::optional<RetrievalRows> retrieval_;
  int64_t size_;
  int32_t pad_;
  Read read_ = nullptr;
};

Row<int64_t> pack(const Row<int64_t>& ends, int64_t block_size) {
  const std::vector<int64_t> starts = pack_greedily(ends.data(), ends.size(), block_size);
  return Row<int64_t>(static_cast<py::ssize_t>(starts.size()), starts.data());
}

// Whether each of `values` is another than `value`.
Row<bool> differ(const Row<int32_t>& values, int32_t value) {
  Row<bool> found(values.size());
  compare(values.data(), values.size(), value, found.mutable_data());
  return found;
}

}  // namespace

void bind_packing(py::module_& module) {
  py::class_<OrderRows>(module, "Order")
      .def(py::init<Row<uint32_t>, Row<int64_t>, int64_t>(), py::arg("numbers").noconvert(),
           py::arg("ends").noconvert(), py::arg("seed"))
      .def_readonly("ends", &OrderRows::ends)
      .def_property_readonly("num_tokens",
                             [](const OrderRows& each) { return each.order.num_tokens(); })
      .def("__len__", [](const OrderRows& each) { return each.order.size; });
  py::class_<RetrievalRows>(module, "Retrieval")
      .def(py::init<Row<int64_t>, Row<int64_t>, int64_t, bool>(), py::arg("borders").noconvert(),
           py::arg("edges").noconvert(), py::kw_only(), py::arg("most"), py::arg("drawn"))
      .def("lengths", &RetrievalRows::lengths, py::arg("seed"));
  py::class_<Reader>(module, "Reader")
      .def(py::init<py::array, Row<int64_t>, const RetrievalRows*, int64_t, int32_t>(),
           py::arg("tokens"), py::arg("starts").noconvert(), py::arg("retrieval"), py::kw_only(),
           py::arg("size"), py::arg("pad"))
      .def("__call__", &Reader::read, py::arg("orders"), py::arg("start"), py::arg("count"));
  module.def("pack_greedily", &pack, py::arg("ends").noconvert(), py::arg("block_size"));
  module.def("differ", &differ, py::arg("values").noconvert(), py::arg("value"));
}

}  // namespace jam
