#include "device/driver_library.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <utility>

#include "slidecore/status.h"

namespace slidecore::device {
namespace {

struct MappedSearch {
  const char* prefix;
  std::string path;
};

int visit_mapped(dl_phdr_info* info, std::size_t, void* data) {
  auto& search = *static_cast<MappedSearch*>(data);
  if (info->dlpi_name == nullptr) return 0;
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* base = slash == nullptr ? info->dlpi_name : slash + 1;
  if (std::strncmp(base, search.prefix, std::strlen(search.prefix)) != 0) return 0;
  search.path = info->dlpi_name;
  return 1;  // ends the walk
}

// A framework may bring its own copy of the library, under a path that the loader's search would not find. Two
// copies in one process do not know each other's streams.
std::string mapped_path(const char* prefix) {
  MappedSearch search{prefix, {}};
  dl_iterate_phdr(visit_mapped, &search);
  return search.path;
}

void* try_open(const std::string& path, int flags, std::string& attempts) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | flags);
  if (handle == nullptr) {
    const char* why = dlerror();
    attempts += (attempts.empty() ? "" : "; ") + std::string(why == nullptr ? path.c_str() : why);
  }
  return handle;
}

}  // namespace

DriverLibrary::DriverLibrary(const DriverLibraryNames& names) : what_(names.what) {
  std::string attempts;
  const auto use = [&](std::string path, int flags) {
    handle_ = try_open(path, flags, attempts);
    if (handle_ != nullptr) path_ = std::move(path);
    return handle_ != nullptr;
  };
  if (const char* forced = std::getenv(names.environment); forced != nullptr && *forced != '\0') {
    if (use(forced, 0)) return;
    throw Error(Code::unsupported,
                what_ + " could not be loaded from " + names.environment + "=" + forced + ": " + attempts);
  }
  if (names.mapped_prefix != nullptr) {
    const std::string path = mapped_path(names.mapped_prefix);
    if (!path.empty() && use(path, RTLD_NOLOAD)) return;
  }
  for (const char* soname : names.sonames) {
    if (use(soname, 0)) return;
  }
  for (const std::string& path : names.paths) {
    if (use(path, 0)) return;
  }
  throw Error(Code::unsupported, what_ + " could not be loaded: " + attempts +
                                     ". Is it installed and on the loader's path? " + names.environment +
                                     " may name the library");
}

DriverLibrary::~DriverLibrary() {
  if (handle_ != nullptr) dlclose(handle_);
}

void* DriverLibrary::symbol(const char* name) {
  void* address = dlsym(handle_, name);
  if (address == nullptr) missing_.emplace_back(name);
  return address;
}

void* DriverLibrary::symbol_if_there(const char* name) const {
  return dlsym(handle_, name);
}

std::string DriverLibrary::path() const {
  link_map* map = nullptr;
  const bool known = dlinfo(handle_, RTLD_DI_LINKMAP, &map) == 0 && map->l_name != nullptr && *map->l_name != '\0';
  return known ? map->l_name : path_;
}

void DriverLibrary::keep() {
  if (!missing_.empty()) {
    std::string list;
    for (const auto& name : missing_) list += (list.empty() ? "" : ", ") + name;
    throw Error(Code::unsupported, what_ + " (" + path_ + ") lacks " + std::to_string(missing_.size()) +
                                       (missing_.size() == 1 ? " function: " : " functions: ") + list +
                                       ". A newer version has them");
  }
  handle_ = nullptr;
}

}  // namespace slidecore::device
