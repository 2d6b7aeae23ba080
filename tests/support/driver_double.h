// Stands in for libcuda.so.1: loads nothing, launches nothing, and remembers the last launch.
#include <cstdint>
#include <cstring>

#define DOUBLE extern "C" __attribute__((visibility("default")))

namespace driver_double {

struct Attribute {
  int id, padding;
  unsigned value[16];
};
struct Config {
  unsigned shape[7];  // grid, block, bytes of shared memory
  void* stream;
  Attribute* attributes;
  unsigned count;
};

struct Launch {
  int64_t launches, loads, values_read, most_shared, non_portable;
  int64_t shape[7];
  int64_t cluster[3], cooperative, programmatic;
  uint64_t values[32];
};

inline Launch last{};
inline char symbol[256];

inline int launched(const unsigned* shape, const Attribute* attributes, unsigned count,
                    void** values) {
  ++last.launches;
  for (int i = 0; i < 7; ++i) last.shape[i] = shape[i];
  last.cluster[0] = last.cluster[1] = last.cluster[2] = 1;
  last.cooperative = last.programmatic = 0;
  for (unsigned i = 0; i < count; ++i) {
    const Attribute& each = attributes[i];
    if (each.id == 4) {
      for (int j = 0; j < 3; ++j) last.cluster[j] = each.value[j];
    }
    if (each.id == 2) last.cooperative = each.value[0];
    if (each.id == 6) last.programmatic = each.value[0];
  }
  for (int64_t i = 0; i < last.values_read; ++i) std::memcpy(&last.values[i], values[i], 8);
  return 0;
}

}  // namespace driver_double

DOUBLE driver_double::Launch* double_last() { return &driver_double::last; }
DOUBLE const char* double_symbol() { return driver_double::symbol; }

DOUBLE int cuInit(unsigned) { return 0; }
DOUBLE int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
DOUBLE int cuGetErrorName(int, const char** name) { return *name = "AN_ERROR", 0; }
DOUBLE int cuGetErrorString(int, const char** text) { return *text = "of the double", 0; }
DOUBLE int cuDeviceGet(int* device, int index) { return *device = index, 0; }
DOUBLE int cuDeviceGetAttribute(int* value, int, int) { return *value = 132, 0; }
DOUBLE int cuDevicePrimaryCtxRetain(void** context, int) {
  return *context = &driver_double::last, 0;
}
DOUBLE int cuCtxGetCurrent(void** context) { return *context = &driver_double::last, 0; }
DOUBLE int cuCtxPushCurrent_v2(void*) { return 0; }
DOUBLE int cuCtxPopCurrent_v2(void**) { return 0; }
DOUBLE int cuThreadExchangeStreamCaptureMode(int*) { return 0; }
DOUBLE int cuModuleLoadData(void** module, const void*) {
  return ++driver_double::last.loads, *module = &driver_double::last, 0;
}
DOUBLE int cuModuleGetFunction(void** function, void*, const char* name) {
  std::strncpy(driver_double::symbol, name, sizeof driver_double::symbol - 1);
  return *function = &driver_double::last, 0;
}
DOUBLE int cuFuncSetAttribute(void*, int attribute, int value) {
  (attribute == 8 ? driver_double::last.most_shared : driver_double::last.non_portable) = value;
  return 0;
}
DOUBLE int cuLaunchKernel(void*, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void*, void** values, void**) {
  const unsigned shape[] = {gx, gy, gz, bx, by, bz, shared};
  return driver_double::launched(shape, nullptr, 0, values);
}
DOUBLE int cuLaunchKernelEx(const driver_double::Config* config, void*, void** values, void**) {
  return driver_double::launched(config->shape, config->attributes, config->count, values);
}
