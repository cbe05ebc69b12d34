// Errors. The user's mistakes throw one of these; only the command line (and a server) catches them.
// A message says where, what it got, what it expected, and a hint.
#pragma once
#include <fmt/format.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace moesaic {

/// Exit codes of the program.
enum class ExitCode : int { kOk = 0, kInternal = 1, kUsage = 2, kData = 3, kOutOfMemory = 4, kInterrupted = 130 };

/// Base of all errors that carry a message for a person.
class Error : public std::runtime_error {
 public:
  Error(ExitCode exit_code, const std::string& message) : std::runtime_error(message), exit_code_(exit_code) {}
  ExitCode exit_code() const { return exit_code_; }

 private:
  ExitCode exit_code_;
};

/// A wrong flag, key or value given by the user (exit 2).
class UsageError : public Error {
 public:
  explicit UsageError(const std::string& message) : Error(ExitCode::kUsage, message) {}
};

/// A file or data set that is damaged or does not fit (exit 3).
class DataError : public Error {
 public:
  explicit DataError(const std::string& message) : Error(ExitCode::kData, message) {}
};

/// A file that breaks its own format: truncated, lengths that lie, unknown types (exit 3).
class FormatError : public DataError {
 public:
  using DataError::DataError;
};

/// A configuration (config.json, adapter_config.json) with impossible values (exit 3).
class ConfigError : public DataError {
 public:
  using DataError::DataError;
};

/// A tensor of the wrong shape or dtype (exit 3).
class ShapeError : public DataError {
 public:
  using DataError::DataError;
};

}  // namespace moesaic

/// Throws `Type` with the formatted message unless `cond` holds.
#define MOESAIC_CHECK(cond, Type, ...)                   \
  do {                                                   \
    if (!(cond)) throw Type(::fmt::format(__VA_ARGS__)); \
  } while (0)

/// What only a mistake in this library can break: presets dev and asan abort and name the place, release doesn't look.
#ifdef MOESAIC_DEBUG
#define MOESAIC_ASSERT(cond)                                                         \
  do {                                                                               \
    if (!(cond)) {                                                                   \
      ::fmt::print(stderr, "{}:{}: does not hold: {}\n", __FILE__, __LINE__, #cond); \
      ::std::abort();                                                                \
    }                                                                                \
  } while (0)
#else
#define MOESAIC_ASSERT(cond) static_cast<void>(sizeof(!(cond)))
#endif
