// An NVIDIA GPU whose memory is the host's, for a CPU build of torch: tensors on cuda:0 have real storages, and what is
// asked of them reaches a fallback in Python (device.py), which computes on the same memory as a CPU tensor.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <mutex>

namespace {

const c10::Device GPU{c10::DeviceType::CUDA, 0};
const auto KEYS = c10::DispatchKeySet(c10::DispatchKey::CUDA);

// ---- memory

struct DeviceAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto host = c10::GetDefaultCPUAllocator()->allocate(bytes);
    auto* data = host.get();
    auto release = host.get_deleter();
    host.release_context();
    return {data, data, release, GPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetDefaultCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;

// Page-locked memory: the host's too, but copies from and to it do not wait.
std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;

void unpin(void* data) {
  if (data == nullptr) return;
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(static_cast<char*>(data));
  }
  std::free(data);
}

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto next = pinned.upper_bound(static_cast<const char*>(data));
  if (next == pinned.begin()) return false;
  auto [begin, bytes] = *--next;
  return static_cast<const char*>(data) < begin + bytes;
}

struct PinnedAllocator : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* data = bytes == 0 ? nullptr : std::malloc(bytes);
    if (data != nullptr) {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned[static_cast<char*>(data)] = bytes;
    }
    return {data, data, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} pinned_memory;

// ---- what torch asks of the device itself

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

// A generator of the device: the host's, under another name. Who uses it takes its state to one of the host and back.
struct DeviceGenerator : at::CPUGeneratorImpl {
  explicit DeviceGenerator() : CPUGeneratorImpl(c10::detail::getNonDeterministicRandom()) {
    device_ = GPU;
    key_set_ = KEYS;
  }
};

// torch looks for a class of this name.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return GPU; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = at::make_generator<DeviceGenerator>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<DeviceGenerator>(); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

struct Registers {
  Registers() {
    static Guard guard;
    c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
    c10::SetAllocator(c10::DeviceType::CUDA, &memory);
  }
} registers;

// ---- the same memory as a tensor of the other device

at::Tensor seen_from(const at::Tensor& tensor, c10::Device device) {
  auto* data = tensor.storage().mutable_data();
  auto sizes = tensor.sizes();
  auto storage = c10::Storage(
      c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
      c10::DataPtr(data, new c10::Storage(tensor.storage()),
                   [](void* kept) { delete static_cast<c10::Storage*>(kept); }, device),
      nullptr, false);
  auto keys = device.is_cuda() ? KEYS : c10::DispatchKeySet(c10::DispatchKey::CPU);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, tensor.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, tensor.strides());
  return made;
}

at::Tensor on_host(const at::Tensor& tensor) { return seen_from(tensor, c10::Device(c10::DeviceType::CPU)); }
at::Tensor on_device(const at::Tensor& tensor) { return seen_from(tensor, GPU); }

// ---- the operations that make tensors, or views of their memory

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &memory, KEYS, c10::dtype_or_default(dtype));
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), sizes, std::nullopt);
  return self;
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(resize));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Storage", TORCH_FN(at::native::set_));
}

TORCH_LIBRARY(gpu_paper, m) {
  m.def("on_host(Tensor tensor) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("on_device(Tensor tensor) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(gpu_paper, CUDA, m) { m.impl("on_host", TORCH_FN(on_host)); }
TORCH_LIBRARY_IMPL(gpu_paper, CPU, m) { m.impl("on_device", TORCH_FN(on_device)); }

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}
