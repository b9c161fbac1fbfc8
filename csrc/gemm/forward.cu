#include "csrc/gemm/product_kernel.cuh"

namespace wideep {

Status LaunchForward(const ProductTypes& types, const ProductParams& params, int num_sms,
                     cudaStream_t stream) {
  return LaunchProductOf<Product::kForward>(types, params, num_sms, stream);
}

}  // namespace wideep
