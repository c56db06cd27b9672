// Rows of tokens out of memory-mapped sets, as numpy arrays.
#include "jam/packing.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/numpy_rows.h"
#include "jam/for_each_cpu.h"
#include "launchers.h"

namespace py = pybind11;

namespace jam {
namespace {

JAM_FOR_EACH_CPU void widen(const uint16_t* from, int64_t count, int32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <typename Token>
void widen(const Token* from, int64_t count, int32_t* to) {
  std::copy(from, from + count, to);
}

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
  Reader(py::type block, py::array tokens, Row<int64_t> starts, const RetrievalRows* retrieval,
         int64_t size, int32_t pad)
      : make_block_(std::move(block)),
        tokens_(std::move(tokens)),
        starts_(std::move(starts)),
        retrieval_(retrieval ? std::optional(*retrieval) : std::nullopt),
        size_(size),
        pad_(pad) {
    use_for<uint16_t>(), use_for<int32_t>(), use_for<uint8_t>(), use_for<int64_t>(),
        use_for<int16_t>(), use_for<int8_t>();
    if (!read_) throw py::type_error("Reader: tokens must be a row of integers");
  }

  // The block of `count` tokens of the orders' streams in a row, from token `start` of the first
  // on; then padding as one more document.
  py::object read(const py::list& orders, int64_t start, int64_t count) const {
    std::vector<const Order*> streams;
    for (const py::handle& each : orders) streams.push_back(&each.cast<const OrderRows&>().order);
    if (start < 0 || count < 0 || count > size_) {
      throw py::value_error("Reader: start or count is out of range");
    }
    Row<int32_t> out_tokens(size_);
    int32_t* const tokens = out_tokens.mutable_data();
    Runs runs;
    {
      const py::gil_scoped_release others_run;  // a page of the file may have to be read from disk
      const Retrieval* const retrieval = retrieval_ ? &retrieval_->retrieval : nullptr;
      for (const Order* const order : streams) {
        const int64_t stop = std::min(order->num_tokens(), start + count - runs.size());
        if (start < stop) {
          read_(tokens_.data(), starts_.data(), retrieval, *order, start, stop, tokens, runs);
        }
        start = 0;
      }
    }
    if (runs.size() < count) throw py::value_error("Reader: the orders have too few tokens");
    std::fill(tokens + count, tokens + size_, pad_);
    runs.append(runs.next_document(), size_ - count);
    return make_block_(std::move(out_tokens), array_of(runs), 0);
  }

 private:
  using Read = void (*)(const void*, const int64_t*, const Retrieval*, const Order&, int64_t,
                        int64_t, int32_t*, Runs&);

  template <typename Token>
  void use_for() {
    if (!py::isinstance<Row<Token>>(tokens_)) return;
    read_ = [](const void* tokens, const int64_t* starts, const Retrieval* retrieval,
               const Order& order, int64_t start, int64_t stop, int32_t* out_tokens, Runs& runs) {
      read_stream(static_cast<const Token*>(tokens), starts, retrieval, order, start, stop,
                  out_tokens, runs,
                  [](const Token* from, int64_t count, int32_t* to) { widen(from, count, to); });
    };
  }

  BlockMaker make_block_;
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
      .def(py::init<py::type, py::array, Row<int64_t>, const RetrievalRows*, int64_t, int32_t>(),
           py::arg("block"), py::arg("tokens"), py::arg("starts").noconvert(), py::arg("retrieval"),
           py::kw_only(), py::arg("size"), py::arg("pad"))
      .def("read", &Reader::read, py::arg("orders"), py::arg("start"), py::arg("count"));
  module.def("pack_greedily", &pack, py::arg("ends").noconvert(), py::arg("block_size"));
}

}  // namespace jam
