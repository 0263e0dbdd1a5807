#pragma once
// Finding a vendor's driver library and its functions at run time. All use of dlopen is here.

#include <string>
#include <vector>

namespace slidecore::device {

// One function of a driver library: its exported name is kept for error messages.
template <typename Signature>
struct DriverFunction {
  const char* name;
  Signature* pointer = nullptr;
};

struct DriverLibraryNames {
  const char* what;                  // for messages, e.g. "the CUDA driver"
  const char* environment;           // variable that names the one library to load instead
  const char* mapped_prefix;         // a library so named that the process has mapped already goes first; may be null
  std::vector<const char*> sonames;  // tried in this order
  std::vector<std::string> paths{};  // tried after them
};

// Closes the library again unless keep() was called, so that a failed attempt leaves nothing behind.
class DriverLibrary {
 public:
  explicit DriverLibrary(const DriverLibraryNames& names);  // throws Error(unsupported) naming every attempt
  ~DriverLibrary();
  DriverLibrary(const DriverLibrary&) = delete;
  DriverLibrary& operator=(const DriverLibrary&) = delete;

  template <typename Signature>
  void find(DriverFunction<Signature>& function) {
    function.pointer = reinterpret_cast<Signature*>(symbol(function.name));
  }
  // For a function that not every release has: null where it is not there.
  template <typename Signature>
  void find_if_there(DriverFunction<Signature>& function) {
    function.pointer = reinterpret_cast<Signature*>(symbol_if_there(function.name));
  }
  std::string path() const;  // of the file, until keep()
  // Throws Error(unsupported) with the names of all functions that were not found. Otherwise the library stays for
  // the life of the process: drivers own threads and exit handlers and do not survive being unloaded.
  void keep();

 private:
  void* symbol(const char* name);
  void* symbol_if_there(const char* name) const;

  std::string what_;
  std::string path_;
  std::vector<std::string> missing_;
  void* handle_ = nullptr;
};

}  // namespace slidecore::device
