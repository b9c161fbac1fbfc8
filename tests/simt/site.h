// A place in a kernel's source, for reports. As a default argument it is the caller's line.
#pragma once

namespace simt {

struct Site {
  const char* file;
  int line;
  static constexpr Site Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

}  // namespace simt
