// Guided sampling straight from Python: by torch's dispatcher and its boxed arguments a call costs
// more than the draw from a short row. This way serves plain CPU tensors; whatever else comes, None
// is its answer and the operator's way is taken, which also says what is wrong with arguments.
#include <ATen/core/dispatch/DispatchKeyExtractor.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <vector>

#include "guided_sampling_call.h"
#include "launchers.h"

namespace jam {
namespace {

// Whether an operator on this tensor would go to the CPU's kernel and nowhere else: it is no fake
// and no subclass with a say, and no mode watches (torch.compile's tracing, profilers by modes).
bool is_plain(const at::Tensor& tensor) {
  const c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::BackendSelect,
                                   c10::DispatchKey::AutogradCPU,
                                   c10::DispatchKey::ADInplaceOrView});
  const c10::DispatchKeySet keys =
      c10::impl::computeDispatchKeySet(tensor.key_set(), c10::DispatchKeySet::FULL);
  return tensor.is_cpu() && (keys - plain).highestFunctionalityKey() == c10::DispatchKey::Undefined;
}

std::optional<at::Tensor> plain_tensor(PyObject* object) {
  if (!THPVariable_Check(object)) return std::nullopt;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) ? std::optional(tensor) : std::nullopt;
}

bool read_number(PyObject* object, int64_t& number) {
  int overflow = 1;
  if (PyLong_CheckExact(object)) number = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

bool read_number(PyObject* object, double& number) {
  if (PyFloat_CheckExact(object)) {
    number = PyFloat_AS_DOUBLE(object);
    return true;
  }
  int64_t whole = 0;
  const bool read = read_number(object, whole);
  number = static_cast<double>(whole);
  return read;
}

// A number of every row, or one for each row.
template <typename Number>
class Column {
 public:
  bool read(PyObject* object, int64_t num_rows) {
    if (read_number(object, number_)) return true;
    const std::optional<at::Tensor> given = plain_tensor(object);
    if (!given || given->dim() > 1 || (given->numel() != 1 && given->numel() != num_rows)) {
      return false;
    }
    values_ = given->to(c10::CppTypeToScalarType<Number>::value).contiguous();
    stride_ = given->numel() == 1 ? 0 : 1;
    data_ = values_.const_data_ptr<Number>();
    return true;
  }

  bool is_number() const { return data_ == nullptr; }
  Number operator[](int64_t row) const { return data_ ? data_[row * stride_] : number_; }

 private:
  Number number_{};
  at::Tensor values_;
  const Number* data_ = nullptr;
  int64_t stride_ = 0;
};

constexpr int kNumSettings = 5;  // guidance_scale, temperature, top_p, top_k, min_p

// The arguments, in the order in which Python gives them.
struct PythonCall {
  at::Tensor cond;
  std::optional<at::Tensor> uncond, legal;
  Column<double> settings[kNumSettings];
  int64_t legal_begin = 0, legal_end = 0;
  Column<int64_t> seed, offset;
  bool truncated = false;

  // False where only the operator's way serves.
  bool read(PyObject* const* given) {
    const std::optional<at::Tensor> logits = plain_tensor(given[0]);
    if (!logits || logits->dim() != 2) return false;
    cond = *logits;
    const int64_t num_rows = cond.size(0);
    if (given[1] != Py_None && !(uncond = plain_tensor(given[1]))) return false;
    for (int i = 0; i < kNumSettings; ++i) {
      if (!settings[i].read(given[2 + i], num_rows)) return false;
    }
    if (!uncond && !(settings[0].is_number() && settings[0][0] == 1)) return false;
    if (!read_legal(given[7])) return false;
    if (!seed.read(given[8], num_rows) || !offset.read(given[9], num_rows)) return false;
    truncated = given[10] == Py_True;
    return num_rows == 1 || !seed.is_number();
  }

  GuidedDrawn draw() const {
    const GuidedSettings all = settings_of(0);
    GuidedCall call({cond, uncond, all, std::nullopt, legal_begin, legal_end, legal});
    GuidedDraws draws{};
    std::vector<GuidedSettings> row_settings;
    std::vector<int64_t> numbers;
    bool all_numbers = true;
    for (const Column<double>& each : settings) all_numbers &= each.is_number();
    if (!all_numbers) {
      for (int64_t row = 0; row < call.rows.num_rows; ++row) {
        row_settings.push_back(settings_of(row));
      }
      call.rows.row_settings = row_settings.data();
    }
    if (seed.is_number() && offset.is_number()) {
      draws.seed = seed[0];
      draws.offset = offset[0];
    } else {
      for (int64_t row = 0; row < call.rows.num_rows; ++row) {
        numbers.insert(numbers.end(), {seed[row], offset[row]});
      }
      draws.numbers = numbers.data();
    }
    return jam::draw(call, draws, truncated);
  }

 private:
  bool read_legal(PyObject* given) {
    legal_end = cond.size(1);
    if (given == Py_None) return true;
    if (PyTuple_CheckExact(given)) {
      return PyTuple_GET_SIZE(given) == 2 && read_number(PyTuple_GET_ITEM(given, 0), legal_begin) &&
             read_number(PyTuple_GET_ITEM(given, 1), legal_end);
    }
    legal = plain_tensor(given);
    if (legal && legal->dim() == 1 && legal->size(0) == cond.size(1)) {
      legal = legal->expand(cond.sizes());
    }
    return legal && legal->dim() == 2;
  }

  GuidedSettings settings_of(int64_t row) const {
    return {settings[0][row], settings[1][row], settings[2][row], settings[3][row],
            settings[4][row]};
  }
};

PyObject* wrapped(const at::Tensor& tensor) {
  return tensor.defined() ? THPVariable_Wrap(tensor) : Py_NewRef(Py_None);
}

// guided_sample(cond, uncond, guidance_scale, temperature, top_p, top_k, min_p, legal, seed,
// offset, truncated) -> a tuple of three, or None.
PyObject* guided_sample(PyObject*, PyObject* const* given, Py_ssize_t num_given) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(num_given == 11, "guided_sample takes 11 arguments, not ", num_given);
  PythonCall call;
  if (!call.read(given)) Py_RETURN_NONE;
  GuidedDrawn drawn;
  {
    const pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION("megatron_jam::guided_sample", c10::ArrayRef<const c10::IValue>());
    drawn = call.draw();
  }
  const pybind11::object parts[] = {
      pybind11::reinterpret_steal<pybind11::object>(wrapped(drawn.tokens)),
      pybind11::reinterpret_steal<pybind11::object>(wrapped(drawn.log_probability)),
      pybind11::reinterpret_steal<pybind11::object>(wrapped(drawn.truncated_log_probability))};
  return PyTuple_Pack(3, parts[0].ptr(), parts[1].ptr(), parts[2].ptr());
  END_HANDLE_TH_ERRORS
}

// Python knows by METH_FASTCALL which type of function it is.
const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guided_sample));
PyMethodDef methods[] = {{"guided_sample", function, METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_guided_sampling(pybind11::module_& module) {
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace jam
