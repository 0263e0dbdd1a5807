#include "device/cufile.h"

#include <cerrno>
#include <cstdio>
#include <system_error>
#include <utility>

#include "slidecore/status.h"

namespace slidecore::device {
namespace {

constexpr const char* kMappedPrefix = "libcufile.so";

struct Meaning {
  std::int32_t code;
  const char* name;
  const char* text;
};

// Those that opening, registering and moving bytes can end in.
constexpr Meaning kMeanings[] = {
    {5001, "CU_FILE_DRIVER_NOT_INITIALIZED", "nvidia-fs is not loaded, and cufile.json forbids the compatibility mode"},
    {5002, "CU_FILE_DRIVER_INVALID_PROPS", "a property in cufile.json is not valid"},
    {5003, "CU_FILE_DRIVER_UNSUPPORTED_LIMIT", "a property in cufile.json is out of its range"},
    {5004, "CU_FILE_DRIVER_VERSION_MISMATCH", "nvidia-fs and libcufile do not fit together"},
    {5005, "CU_FILE_DRIVER_VERSION_READ_ERROR", "the version of nvidia-fs cannot be read"},
    {5006, "CU_FILE_DRIVER_CLOSING", "the driver is being closed"},
    {5007, "CU_FILE_PLATFORM_NOT_SUPPORTED", "this platform has no GPUDirect Storage"},
    {5008, "CU_FILE_IO_NOT_SUPPORTED", "this file system has no GPUDirect Storage"},
    {5009, "CU_FILE_DEVICE_NOT_SUPPORTED", "this card has no GPUDirect Storage"},
    {5010, "CU_FILE_NVFS_DRIVER_ERROR", "nvidia-fs failed"},
    {5011, "CU_FILE_CUDA_DRIVER_ERROR", "the CUDA driver failed"},
    {5012, "CU_FILE_CUDA_POINTER_INVALID", "not an address of device memory"},
    {5013, "CU_FILE_CUDA_MEMORY_TYPE_INVALID", "memory of a kind that cuFile cannot use"},
    {5014, "CU_FILE_CUDA_POINTER_RANGE_ERROR", "the range exceeds its allocation"},
    {5015, "CU_FILE_CUDA_CONTEXT_MISMATCH", "memory of another CUDA context"},
    {5016, "CU_FILE_INVALID_MAPPING_SIZE", "more than can be pinned"},
    {5017, "CU_FILE_INVALID_MAPPING_RANGE", "beyond what is mapped"},
    {5018, "CU_FILE_INVALID_FILE_TYPE", "not a regular file"},
    {5019, "CU_FILE_INVALID_FILE_OPEN_FLAG", "the file is opened with flags that cuFile cannot use"},
    {5020, "CU_FILE_DIO_NOT_SET", "the file is not opened for direct transfers"},
    {5022, "CU_FILE_INVALID_VALUE", "an argument is not valid"},
    {5025, "CU_FILE_PERMISSION_DENIED", "no permission for the driver or the file"},
    {5027, "CU_FILE_HANDLE_NOT_REGISTERED", "the file is not registered"},
    {5028, "CU_FILE_HANDLE_ALREADY_REGISTERED", "the file is registered already"},
    {5029, "CU_FILE_DEVICE_NOT_FOUND", "the card was not found"},
    {5030, "CU_FILE_INTERNAL_ERROR", "an error inside cuFile; its log, cufile.log, may say more"},
    {5031, "CU_FILE_GETNEWFD_FAILED", "the file could not be opened again"},
    {5033, "CU_FILE_NVFS_SETUP_ERROR", "nvidia-fs could not be set up"},
    {5034, "CU_FILE_IO_DISABLED", "cufile.json disables GPUDirect Storage for this file"},
    {5036, "CU_FILE_GPU_MEMORY_PINNING_FAILED", "device memory could not be pinned"},
    {5043, "CU_FILE_NOMEM_ERROR", "out of memory"},
    {5044, "CU_FILE_IO_ERROR", "the transfer failed"},
};

std::string text_of(const cufile::Error& error) {
  std::string text = failure_text(-std::int64_t{error.code});
  if (error.code == cufile::kCudaDriverError) text += ", with code " + std::to_string(error.cuda);
  return text;
}

void check(const cufile::Error& error, const std::string& what) {
  if (error.code != 0) throw Error(Code::unsupported, what + " failed: " + text_of(error));
}

// -1 stands for errno, which nothing may have touched since the call.
std::int64_t result_of(ssize_t result) {
  return result == -1 ? -std::int64_t{errno} : std::int64_t{result};
}

bool has(std::uint32_t flags, unsigned bit) {
  return (flags >> bit & 1) != 0;
}

}  // namespace

std::string failure_text(std::int64_t code) {
  const std::int64_t number = code < 0 ? -code : code;
  if (number < cufile::kFirstError) {
    return std::generic_category().message(static_cast<int>(number)) + " (errno " + std::to_string(number) + ")";
  }
  for (const Meaning& meaning : kMeanings) {
    if (meaning.code == number) {
      return std::string(meaning.text) + " (" + meaning.name + ", " + std::to_string(number) + ")";
    }
  }
  return "cuFile's error " + std::to_string(number);
}

CuFileLibrary::CuFileLibrary(const std::vector<std::string>& paths) {
  DriverLibrary library({"cuFile", "SLIDECORE_CUFILE_LIBRARY", kMappedPrefix, {"libcufile.so.0"}, paths});
#define SLIDECORE_FIND(role, symbol, ...) library.find(symbols_.role);
  SLIDECORE_CUFILE_SYMBOLS(SLIDECORE_FIND)
#undef SLIDECORE_FIND
  library.find_if_there(symbols_.version);
  path_ = library.path();
  library.keep();
}

std::string CuFileLibrary::version() const {
  int number = 0;  // 1000 for each major and 10 for each minor version
  if (symbols_.version.pointer == nullptr || symbols_.version.pointer(&number).code != 0 || number <= 0) return "";
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

CuFileDriver::CuFileDriver(CuFileLibrary library) : library_(std::move(library)) {
  const cufile::Error opened = library_.symbols().driver_open.pointer();
  if (opened.code != cufile::kAlreadyOpen) {
    check(opened, "opening cuFile's driver (" + library_.path() + ")");
    opened_ = true;
  }
  // Only tells which way bytes go: one that does not answer may work all the same.
  if (library_.symbols().properties.pointer(&properties_).code != 0) properties_ = {};
}

CuFileDriver::~CuFileDriver() {
  if (opened_) static_cast<void>(library_.symbols().driver_close.pointer());
}

cufile::Handle CuFileDriver::add_file(int fd, const std::string& path) const {
  cufile::Description description{};
  description.type = cufile::kOpaqueFd;
  description.file.fd = fd;
  cufile::Handle handle = nullptr;
  check(library_.symbols().handle_register.pointer(&handle, &description), "registering " + path + " with cuFile");
  return handle;
}

void CuFileDriver::remove_file(cufile::Handle handle) const {
  library_.symbols().handle_deregister.pointer(handle);
}

std::int64_t CuFileDriver::read(cufile::Handle handle, void* memory, std::size_t bytes, std::uint64_t file_offset,
                                std::uint64_t memory_offset) const {
  return result_of(library_.symbols().read.pointer(handle, memory, bytes, static_cast<off_t>(file_offset),
                                                   static_cast<off_t>(memory_offset)));
}

std::int64_t CuFileDriver::write(cufile::Handle handle, const void* memory, std::size_t bytes,
                                 std::uint64_t file_offset, std::uint64_t memory_offset) const {
  return result_of(library_.symbols().write.pointer(handle, memory, bytes, static_cast<off_t>(file_offset),
                                                    static_cast<off_t>(memory_offset)));
}

bool CuFileDriver::direct() const {
  constexpr unsigned kNvmePeerToPeer = 11, kPeerToPeer = 4;  // bits of the status (to 1.13) and of the features
  return properties_.nvfs_major > 0 || has(properties_.status_flags, kNvmePeerToPeer) ||
         has(properties_.feature_flags, kPeerToPeer);
}

std::string CuFileDriver::describe() const {
  const std::string version = library_.version();
  char flags[80];
  std::snprintf(flags, sizeof flags, " (status 0x%x, control 0x%x, features 0x%x)", properties_.status_flags,
                properties_.control_flags, properties_.feature_flags);
  std::string text = "cuFile" + (version.empty() ? "" : " " + version) + " (" + library_.path() + "), ";
  if (properties_.nvfs_major > 0) {
    text += "nvidia-fs " + std::to_string(properties_.nvfs_major) + "." + std::to_string(properties_.nvfs_minor);
  } else {
    text += direct() ? "PCI peer-to-peer" : "compatibility mode";
  }
  return text + flags;
}

}  // namespace slidecore::device
