#include "moesaic/serve/api_error.h"

#include <new>

#include "moesaic/base/check.h"

namespace moesaic::serve {
namespace {

const char* type_of(int status) {
  switch (status) {
    case 400: return "BadRequestError";
    case 401: return "AuthenticationError";
    case 403: return "PermissionDeniedError";
    case 404: return "NotFoundError";
    case 409: return "ConflictError";
    case 422: return "UnprocessableEntityError";
    case 429: return "RateLimitError";
    case 503: return "ServiceUnavailableError";
    case 504: return "TimeoutError";
    default: return status < 500 ? "BadRequestError" : "InternalServerError";
  }
}

}  // namespace

OrderedJson ApiError::json() const {
  return {{"error",
           {{"message", what()},
            {"type", type_of(status)},
            {"param", param.empty() ? OrderedJson(nullptr) : OrderedJson(param)},
            {"code", status}}}};
}

ApiError api_error_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const ApiError& ours) {
    return ours;
  } catch (const UsageError& usage) {
    return {400, usage.what()};
  } catch (const FormatError& format) {
    return {400, format.what()};
  } catch (const DataError& data) {
    return {500, data.what()};
  } catch (const std::bad_alloc&) {
    return {503, "the server is out of memory", "", 1};
  } catch (const std::exception& other) {
    return {500, fmt::format("a defect of the server: {}", std::string_view(other.what()).substr(0, 200))};
  }
}

}  // namespace moesaic::serve
