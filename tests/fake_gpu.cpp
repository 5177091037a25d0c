// Lets a CPU build of PyTorch take "cuda" for a device, as far as fake tensors and autograd ask. No kernel can run.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <utility>

namespace {
constexpr auto CUDA = c10::DeviceType::CUDA;

const c10::Stream stream(c10::Stream::DEFAULT, {CUDA, 0});

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return {CUDA, 0}; }
  c10::Device getDevice() const override { return {CUDA, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream; }
};

struct Hooks final : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool hasCuDNN() const override { return true; }  // convolutions choose layouts as cuDNN's do
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return 91900; }
  long versionRuntimeCuDNN() const override { return 91900; }
};
static_assert(sizeof(Hooks) == sizeof(void*), "hooks are told apart by their table of functions alone");
}  // namespace

// Installs guard and hooks; called again, it puts back those from before.
extern "C" void exchange() {
  static Guard guard;
  static Hooks hooks;
  static const c10::impl::DeviceGuardImplInterface* other = &guard;
  static void* table = *reinterpret_cast<void**>(&hooks);
  auto& slot = c10::impl::device_guard_impl_registry[static_cast<size_t>(CUDA)];
  other = slot.exchange(other);
  // PyTorch looks its hooks up once; so they are exchanged where they are.
  std::swap(table, *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())));
}
