#include "csrc/gemm/product_kernel.cuh"

namespace wideep {

Status LaunchWeightGrad(const ProductTypes& types, const ProductParams& params, int num_sms,
                        cudaStream_t stream) {
  return LaunchProductOf<Product::kWeightGrad>(types, params, num_sms, stream);
}

}  // namespace wideep
