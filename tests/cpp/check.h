// A test runner small enough to build anywhere: named cases, checks that print both sides, and
// main(). Include it in exactly one source of each test program.
//
//   TEST(ZeroTokens) { CHECK_EQ(Count(), 0); }
//
// A failed check is printed and counted, and the case goes on. The program's exit status is 1 if
// any check failed, or if no case ran. Its arguments, if any, name the cases to run.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace check {

constexpr int kMaxReportsPerCase = 20;  // a wrong row would otherwise print once per element
constexpr unsigned kHangSeconds = 300;  // a case that hangs must fail, not wait for ever

struct Case {
  const char* name;
  void (*body)();
};

inline std::vector<Case>& Cases() {
  static std::vector<Case> cases;
  return cases;
}

struct Register {
  Register(const char* name, void (*body)()) { Cases().push_back({name, body}); }
};

inline std::atomic<int>& Failures() {
  static std::atomic<int> failures{0};
  return failures;
}

/// What the current thread is testing; printed with its failures.
inline std::string& CurrentContext() {
  thread_local std::string context;
  return context;
}

/// Adds to the context for as long as it lives.
class Context {
 public:
  explicit Context(const std::string& text) : outer_(CurrentContext()) {
    CurrentContext() = outer_.empty() ? text : outer_ + "; " + text;
  }
  ~Context() { CurrentContext() = outer_; }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

 private:
  std::string outer_;
};

inline void Fail(const char* file, int line, const std::string& what) {
  if (Failures().fetch_add(1) >= kMaxReportsPerCase) return;
  const std::string& context = CurrentContext();
  std::fprintf(stderr, "%s:%d: %s%s%s\n", file, line, what.c_str(),
               context.empty() ? "" : "\n    with ", context.c_str());
}

template <typename T>
std::string Show(const T& value) {
  std::ostringstream text;
  text.precision(17);
  if constexpr (std::is_enum_v<T>) {
    text << static_cast<int>(value);
  } else if constexpr (sizeof(T) == 1 && std::is_integral_v<T>) {
    text << static_cast<int>(value);  // a byte, not a character
  } else {
    text << value;
  }
  return text.str();
}

template <typename A, typename B>
void CheckEq(const char* file, int line, const char* expression, const A& got, const B& expected) {
  if (got == expected) return;
  Fail(file, line, std::string(expression) + ": got " + Show(got) + ", expected " + Show(expected));
}

/// Written so that a NaN on either side fails.
inline void CheckNear(const char* file, int line, const char* expression, double got,
                      double expected, double tolerance) {
  const double error = got > expected ? got - expected : expected - got;
  if (got == expected || error <= tolerance) return;
  Fail(file, line,
       std::string(expression) + ": got " + Show(got) + ", expected " + Show(expected) +
           " within " + Show(tolerance));
}

inline void CheckContains(const char* file, int line, const char* expression,
                          const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return;
  Fail(file, line,
       std::string(expression) + ": \"" + text + "\" does not contain \"" + part + "\"");
}

/// Counts events, and waits for them with a deadline so that a lost one fails instead of hanging.
class Counter {
 public:
  void Add() {
    // Notified under the lock: the waiter may destroy this object as soon as it sees the count.
    std::lock_guard<std::mutex> lock(mutex_);
    ++count_;
    changed_.notify_all();
  }
  int count() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return count_;
  }
  bool WaitFor(int count, std::chrono::milliseconds deadline = std::chrono::seconds(60)) const {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, deadline, [&] { return count_ >= count; });
  }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  int count_ = 0;
};

inline const char*& RunningCase() {
  static const char* name = "";
  return name;
}

inline void OnAlarm(int) {
  // Only async-signal-safe calls here.
  const char* parts[] = {"FAILED ", RunningCase(), ": hung\n"};
  for (const char* part : parts) {
    if (write(STDERR_FILENO, part, std::strlen(part)) < 0) break;
  }
  _exit(1);
}

inline int RunAll(int argc, char** argv) {
  std::signal(SIGALRM, OnAlarm);
  int num_run = 0;
  int num_failed = 0;
  for (const Case& test : Cases()) {
    bool wanted = argc <= 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], test.name) == 0;
    if (!wanted) continue;
    ++num_run;
    Failures() = 0;
    RunningCase() = test.name;
    alarm(kHangSeconds);
    const auto begin = std::chrono::steady_clock::now();
    test.body();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    alarm(0);
    if (const int failures = Failures()) {
      ++num_failed;
      std::fprintf(stderr, "FAILED %s: %d checks\n", test.name, failures);
    } else {
      std::printf("ok     %s (%.2f s)\n", test.name, seconds.count());
    }
  }
  std::printf("%d of %d cases passed\n", num_run - num_failed, num_run);
  return num_run == 0 || num_failed > 0 ? 1 : 0;
}

}  // namespace check

#define TEST(name)                                                 \
  static void Test##name();                                        \
  static const check::Register register_##name(#name, Test##name); \
  static void Test##name()

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) check::Fail(__FILE__, __LINE__, "not true: " #condition); \
  } while (false)
#define CHECK_EQ(got, expected) check::CheckEq(__FILE__, __LINE__, #got, got, expected)
#define CHECK_NEAR(got, expected, tolerance) \
  check::CheckNear(__FILE__, __LINE__, #got, got, expected, tolerance)
#define CHECK_CONTAINS(text, part) check::CheckContains(__FILE__, __LINE__, #text, text, part)

int main(int argc, char** argv) { return check::RunAll(argc, argv); }
