// Rows of numbers that come from numpy and go to it.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "jam/runs.h"

namespace jam {

template <typename Item>
using Row = pybind11::array_t<Item, pybind11::array::c_style>;

// The numbers of an array, without the copy that pybind11 makes ready for each it may convert.
template <typename Item>
const Item* numbers_of(const pybind11::array& array, const char* name) {
  if (!pybind11::isinstance<Row<Item>>(array)) {
    throw pybind11::type_error(std::string(name) + " has another type of numbers, or gaps");
  }
  return static_cast<const Item*>(array.data());
}

// int32 [runs, 2].
inline Row<int32_t> array_of(const Runs& runs) {
  static_assert(sizeof(Run) == 2 * sizeof(int32_t));
  const auto count = static_cast<pybind11::ssize_t>(runs.all().size());
  Row<int32_t> array({count, pybind11::ssize_t{2}});
  std::copy_n(reinterpret_cast<const int32_t*>(runs.all().data()), 2 * count, array.mutable_data());
  return array;
}

// Makes blocks: megatron_jam/data/sample.py's class, a named tuple (tokens, runs, dropped), without
// its constructor in Python.
class __attribute__((visibility("hidden"))) BlockMaker {
 public:
  explicit BlockMaker(pybind11::type type) : type_(std::move(type)) {
    if (!PyType_IsSubtype(raw(), &PyTuple_Type)) {
      throw pybind11::type_error("block must be the class of a named tuple");
    }
  }

  pybind11::object operator()(pybind11::object tokens, pybind11::object runs,
                              int64_t dropped) const {
    pybind11::object items[] = {std::move(tokens), std::move(runs), pybind11::int_(dropped)};
    const auto made = pybind11::reinterpret_steal<pybind11::object>(
        raw()->tp_alloc(raw(), static_cast<Py_ssize_t>(std::size(items))));
    if (!made) throw pybind11::error_already_set();
    for (size_t i = 0; i < std::size(items); ++i) {
      PyTuple_SET_ITEM(made.ptr(), static_cast<Py_ssize_t>(i), items[i].release().ptr());
    }
    return made;
  }

 private:
  PyTypeObject* raw() const { return reinterpret_cast<PyTypeObject*>(type_.ptr()); }

  pybind11::type type_;
};

}  // namespace jam
