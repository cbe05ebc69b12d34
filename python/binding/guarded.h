// Errors on their way to Python, where every C++ exception is a RuntimeError: its kind stands in front of the text.
#pragma once
#include <c10/util/Exception.h>

#include <new>
#include <stdexcept>

#include "moesaic/base/check.h"

namespace moesaic::python {

[[noreturn]] inline void raise(const char* kind, const std::exception& error) {
  throw std::runtime_error(fmt::format("[{}] {}", kind, error.what()));
}

/// What `call` returns; python/moesaic/errors.py makes the class of what it throws.
template <class Call>
auto guarded(Call&& call) {
  try {
    return call();
  } catch (const FormatError& error) {
    raise("FormatError", error);
  } catch (const ConfigError& error) {
    raise("ConfigError", error);
  } catch (const ShapeError& error) {
    raise("ShapeError", error);
  } catch (const DataError& error) {
    raise("DataError", error);
  } catch (const UsageError& error) {
    raise("UsageError", error);
  } catch (const c10::OutOfMemoryError& error) {
    raise("OutOfMemoryError", error);
  } catch (const std::bad_alloc& error) {
    raise("OutOfMemoryError", error);
  }
}

}  // namespace moesaic::python
