"""A small valid call of every function of torch, and of every module of `torch.nn`, that reads a parameter.

A call is an expression in `f`, the function, and these tensors in float64 (N = 5):

    w v u p   leaves `[4]`: any, any, in (0.2, 0.8), in (1.5, 2.5)      W     a leaf `[4,4]`, near the identity
    B         a leaf `[2,4,4]`                                          S     W Wᵀ + 1, of parameters
    K         a leaf `[2,2,2]`                                          q g   data `[5,2,6]` and `[5,2,6,6]`
    a j m     constants `[4,4]`: numbers, indices below 4, a mask       e     a constant `[4]`: 3, 0, 2, 1
    x i       data `[5,4]`: numbers, indices below 4
    z r       rows `[5,4]` made of data and parameters, r in (0,1)
    y t c s   targets of losses: `[5,4]` numbers, in (0,1), classes `[5]`, signs `[5,4]`

A call that names no rows (x, q, g, z) makes a tensor of parameters alone. A loss is a mean over its rows.
"""

from __future__ import annotations

__all__ = ["ASIDE", "CALLS", "LOSSES", "MODULES", "MODULES_ASIDE", "MODULE_LOSSES", "OPTIMIZERS", "listed"]


def listed(text: str) -> dict[str, str]:
    """By name, the expression or reason of the line that it stands in; an indented line goes on with the last."""
    found: dict[str, str] = {}
    what = ""
    for line in text.strip().splitlines():
        if not line.startswith(" "):
            what, _, line = line.partition(" | ")
        found |= dict.fromkeys(line.split(), what)
    return found


CALLS = listed("""
f(w) | abs absolute alias_copy amax amin aminmax angle arcsinh arctan as_tensor asarray asinh atan atleast_1d atleast_2d atleast_3d cartesian_prod
    ceil celu clone combinations conj conj_physical corrcoef cos cosh cov deg2rad detach_copy diag diag_embed diagflat diff erf
    erfc exp exp2 expm1 fix flatten flipud fft fftn fftshift floor frac frexp gelu gradient hardshrink hardsigmoid
    hardswish hardtanh hfft hfftn i0 i0e i1 i1e ifft ifftn ifftshift ihfft ihfftn irfft irfftn leaky_relu
    log_ndtr logsigmoid mean median meshgrid mish mode msort nan_to_num nanmean nanmedian nansum ndtr neg negative
    norm_except_dim positive prod rad2deg ravel real relu relu6 resolve_conj resolve_neg rfft rfftn round
    selu sgn sigmoid sign silu sin sinc sinh slice_copy softmin softplus softshrink softsign sort square squeeze
    squeeze_copy std std_mean sum t t_copy tan tanh tanhshrink trunc unbind unbind_copy unique unique_consecutive
    vander var var_mean vector_norm elu expit erfcx all any argmax argmin argsort argwhere count_nonzero detach
    empty_like hash_tensor histc isfinite isinf isnan isneginf isposinf isreal logical_not nonzero numel ones_like
    rand_like randn_like signbit typename zeros_like airy_ai bessel_j0 bessel_j1 modified_bessel_i0 modified_bessel_i1
    spherical_bessel_j0 is_complex is_conj is_distributed is_floating_point is_inference is_neg is_signed is_tensor
    is_storage get_device psi digamma
f(u) | acos arccos arcsin arctanh asin atanh bernoulli entr erfinv gammaln lgamma log log10 log1p log2 logit ndtri poisson
    reciprocal rsqrt sqrt bessel_y0 bessel_y1 modified_bessel_k0 modified_bessel_k1 scaled_modified_bessel_k0
    scaled_modified_bessel_k1
f(p) | acosh arccosh
f(a, w) | block_diag broadcast_tensors diagonal_scatter dist
f(x, w) | add arctan2 atan2 clamp clamp_max clamp_min clip copysign cosine_similarity
    cumulative_trapezoid div divide fmax fmin heaviside histogram hypot inner
    ldexp linear logaddexp logaddexp2 matmul max maximum min minimum mul multiply mv nextafter
    pairwise_distance prelu rsub sub subtract trapezoid trapz true_divide vecdot
    allclose equal eq ge greater greater_equal gt isclose isin le less less_equal logical_and
    logical_or logical_xor lt ne not_equal result_type
f(x, p) | floor_divide fmod remainder
f(x.abs() + 1, u) | float_power gammainc gammaincc igamma igammac pow xlogy xlog1py zeta
f(x, u[0], 1) | nanquantile quantile
f(x, u) | normal
f(u, x) | complex polar
f(x, w, v) | addcdiv addcmul lerp
f(a, w, v) | addr
f(x, x, W) | addmm
f(w, W, v) | addmv
f(a, B, B) | addbmm
f(a.expand(2, 4, 4), B, B) | baddbmm
f(a, W) | slice_scatter tensordot resize_as_ is_same_size kron
f(x, W) | cdist chain_matmul mm dsmm spmm
f([x, W]) | multi_dot
f(a.expand(2, 4, 4), B) | bmm
f(x[:, :3], w[:3].expand(5, 3)) | cross
f(x, x, B, w[:2]) | bilinear
f(x[:, None], W, W) | scaled_dot_product_attention
f(W) | adjoint cholesky_inverse det diagonal diagonal_copy eigvals fliplr geqrf inverse inv inv_ex
    matrix_exp nuclear_norm matrix_norm pdist pinv pinverse qr rot90 slogdet svd svdvals svd_lowrank trace
    tril triu lu_factor lu_factor_ex fft2 hfft2 ifft2 ihfft2 irfft2 rfft2 normalize eig lu cond matrix_rank norm
f(S) | cholesky cholesky_ex eigh eigvalsh ldl_factor ldl_factor_ex logdet lobpcg
f(W, 1) | adaptive_avg_pool1d adaptive_max_pool1d adaptive_max_pool1d_with_indices avg_pool1d cummax cummin cumprod
    cumsum frobenius_norm glu group_norm log_softmax logcumsumexp logsumexp max_pool1d max_pool1d_with_indices
    softmax vsplit
f(W, 2) | matrix_power
f(W, 4, False) | pca_lowrank
f(W[None], 1) | adaptive_avg_pool2d
f(w, (4,)) | broadcast_to expand_copy reshape rms_norm split_with_sizes split_with_sizes_copy tile
    unsafe_split_with_sizes view_copy
f(x, (4,), w) | layer_norm
f("ni,i->n", x, w) | einsum
f([w, v]) | cat column_stack concat concatenate dstack hstack row_stack stack vstack
f(g * u[0], 2) | channel_shuffle max_pool2d max_pool2d_with_indices native_channel_shuffle avg_pool2d
    adaptive_max_pool2d adaptive_max_pool2d_with_indices local_response_norm unfold interpolate upsample
    upsample_nearest upsample_bilinear dsplit
f((g * u[0])[:, None], 2) | adaptive_avg_pool3d adaptive_max_pool3d adaptive_max_pool3d_with_indices avg_pool3d max_pool3d
    max_pool3d_with_indices
f(g * u[0], 2, 2) | fractional_max_pool2d fractional_max_pool2d_with_indices
f((g * u[0]).repeat(1, 2, 1, 1)[:, None], 2, 2) | fractional_max_pool3d fractional_max_pool3d_with_indices
f(q * u[0], 2, 2) | lp_pool1d
f((g * u[0]), 2, 2) | lp_pool2d
f((g * u[0])[:, None], 2, 2) | lp_pool3d
f((q * u[0])[..., :3], torch.arange(3).expand(5, 2, 3) * 2, 2) | max_unpool1d
f((g * u[0])[..., :3, :3], torch.arange(9).view(3, 3).expand(5, 2, 3, 3), 2) | max_unpool2d
f((g * u[0])[..., :2, :2, None], torch.arange(4).view(2, 2, 1).expand(5, 2, 2, 2, 1), 2) | max_unpool3d
f((g * u[0]).repeat(1, 2, 1, 1), 2) | pixel_shuffle pixel_unshuffle
f((q * u[0])[:, :, :1].repeat(1, 2, 1), 2, 2) | fold
f(w, 2) | chunk hsplit repeat_interleave roll split split_copy tensor_split topk unsafe_chunk unsafe_split
    kthvalue
f(u + 2, 2) | mvlgamma multigammaln
f(w.clone(), 0.5) | fill
f(W, (1, 1)) | pad constant_pad_nd
f(w, v) | dot ger outer vdot
f(*look(i, W)) | embedding
f(*bag(i, W)) | embedding_bag
f(g * u[0], (2,)) | flip
f(W, 1, j) | gather
f(torch.complex(w, v)) | imag view_as_real view_as_real_copy
f(torch.stack([w, v], 1)) | view_as_complex view_as_complex_copy
f(W, 0, j[0]) | index_select
f(W, m, a) | masked_scatter
f(W, m) | masked_select
f(W, m, w[0]) | masked_fill
f(W, 0, 1) | moveaxis movedim select select_copy swapaxes swapdims transpose transpose_copy threshold
f(W, (1, 0)) | permute permute_copy
f(W, 1, 0, 2) | narrow narrow_copy
f(W, 1, 2, 1) | unfold_copy
f(W, 2, 0, 1.5) | renorm
f(2, u) | polygamma
f(W, 1, j, a) | scatter scatter_add
f(W, 1, j, a, "sum") | scatter_reduce
f(W, 1, e, a) | index_add index_copy
f(W, 1, e, w[0]) | index_fill
f(W, 1, e, a, "prod") | index_reduce
f(W, (e,), w) | index_put
f(W, e, w) | put
f(w, j[0]) | take take_along_dim
f(w, 1) | unsqueeze unsqueeze_copy
f(m, w, a) | where
f(w, 0, (2, 2)) | unflatten
f(W, (2, 2), (4, 1)) | as_strided as_strided_copy
f(W, w[:2], (2,), (1,)) | as_strided_scatter
f(W, w, 0, 1) | select_scatter
f(W.view(2, 2, 2, 2)) | tensorinv
f(W.view(2, 2, 2, 2), v.view(2, 2)) | tensorsolve
f(W[:, :2], w[:2]) | householder_product orgqr
f(W[:, :2], w[:2], a) | ormqr
f(S, a) | solve solve_ex
f(W, a) | lstsq
f(W.tril(), a, upper=False) | solve_triangular
f(a, W.tril(), False) | triangular_solve
f(a, torch.linalg.cholesky(S)) | cholesky_solve
f(*torch.linalg.ldl_factor(S), a) | ldl_solve
f(*factors(torch.linalg.lu_factor(W), a)) | lu_solve
f(*torch.linalg.lu_factor(W)) | lu_unpack
f(q, K) | conv1d conv_transpose1d
f(g, K[..., None]) | conv2d conv_transpose2d
f(g[:, :, None], K[:, :, None, None]) | conv3d conv_transpose3d
torch.stack(f(q.permute(2, 0, 1).contiguous(), K, v[:2]).unbind(1)) | conv_tbc
f(q, K, None, (1,), (0,), (1,), False, (0,), 1) | convolution
f(x, w, v, torch.zeros(4), torch.ones(4), False, 0.1, 1e-5) | native_batch_norm
f(x, running_mean=torch.zeros(4), running_var=torch.ones(4), weight=w, bias=v, **norm) | batch_norm
f(q, weight=w[:2], bias=v[:2], **stats) | instance_norm
f(q, w[:2], v[:2], 5, 2, 6, 1, 1e-5) | native_group_norm
f(x, (4,), w, v, 1e-5) | native_layer_norm
f(W, 2) | native_norm
f(w, 0.5, True) | alpha_dropout dropout native_dropout
f(W, 0.5, True) | dropout1d dropout2d feature_alpha_dropout feature_dropout
f(B, 0.5, True) | dropout3d
f(w * x) | rrelu gumbel_softmax
f(q.transpose(1, 2), torch.zeros(1, 5, 4), [W[:, :2], W, w, v], True, 1, 0.0, False, False, True) | rnn_tanh rnn_relu
f(q.transpose(1, 2), torch.zeros(1, 5, 4), [W.repeat(3, 1)[:, :2], W.repeat(3, 1), w.repeat(3), v.repeat(3)], True, 1, 0.0, False, False, True) | gru
f(q.transpose(1, 2), [torch.zeros(1, 5, 4)] * 2, [W.repeat(4, 1)[:, :2], W.repeat(4, 1), w.repeat(4), v.repeat(4)], True, 1, 0.0, False, False, True) | lstm
f(x, x, W, W, w, v) | rnn_tanh_cell rnn_relu_cell
f(x, x, W.repeat(3, 1), W.repeat(3, 1), w.repeat(3), v.repeat(3)) | gru_cell
f(x, [x, x], W.repeat(4, 1), W.repeat(4, 1), w.repeat(4), v.repeat(4)) | lstm_cell
f(g, (u - 0.5).view(1, 2, 1, 2).expand(5, 2, 2, 2), "bilinear", "zeros", False) | grid_sample
f(g, (u - 0.5).view(1, 2, 1, 2).expand(5, 2, 2, 2), 0, 0, False) | grid_sampler grid_sampler_2d
f(g[:, :, None], (u - 0.5)[:3].expand(5, 1, 2, 2, 3), 0, 0, False) | grid_sampler_3d
f(W[:2, :3].expand(5, 2, 3), (5, 1, 2, 2), False) | affine_grid affine_grid_generator
f(w.repeat(4), 8, window=torch.ones(8), return_complex=True) | stft
f(torch.stft(w.repeat(4), 8, window=torch.ones(8), return_complex=True), 8, window=torch.ones(8)) | istft
f(W, "sum", lengths=torch.tensor([2, 2])) | segment_reduce
f(w.clone()) | zero_
f(u, 2) | multinomial
f(w, 0, 4) | randint_like
f(w, 1.0) | full_like
f(W, 4) | histogramdd
f(a[0].sort()[0], w) | searchsorted
f(w, a[0].sort()[0]) | bucketize
f(j[:1], w, (4,)) | sparse_coo_tensor
f(torch.tensor([0, 2, 4]), e, w, (2, 4)) | sparse_csr_tensor
f(torch.tensor([0, 2, 4]), e, w, (4, 2)) | sparse_csc_tensor
f(torch.tensor([0, 1]), torch.tensor([0]), W[None], (4, 4)) | sparse_bsr_tensor sparse_bsc_tensor
f(j[0], w) | bincount
f(w) | tensor
f(w[0]) | is_nonzero
f(w, size=2) | nonzero_static
f(x.abs(), p) | chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w
    hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p
    shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v
    shifted_chebyshev_polynomial_w
f(a.abs().round() + 3, u) | binomial
f(x.expand(3, 5, 4), x.expand(3, 5, 4), x.expand(3, 5, 4), 4, 2, W.repeat(3, 1), w.repeat(3), None, None, False, 0.0, W, v)[0].transpose(0, 1) | multi_head_attention_forward
f(W.to_sparse(), a) | smm hspmm hsmm
f(a, W.to_sparse(), a) | saddmm sspaddmm
""")  # noqa: E501

LOSSES = listed("""
f(z, y) | mse_loss l1_loss smooth_l1_loss huber_loss
f(z, c) | cross_entropy multi_margin_loss
f(z.log_softmax(1), c) | nll_loss
f(r, t) | binary_cross_entropy
f(z, t) | multilabel_soft_margin_loss binary_cross_entropy_with_logits
f(z.log_softmax(1), t) | kl_div
f(z, y, t) | gaussian_nll_loss
f(z, t.round()) | poisson_nll_loss
f(z, s) | soft_margin_loss hinge_embedding_loss
f(z, i) | multilabel_margin_loss
f(z, y, s[:, 0]) | cosine_embedding_loss
f(z, y, y + t) | triplet_margin_loss triplet_margin_with_distance_loss
f(z[:, 0], y[:, 0], s[:, 0]) | margin_ranking_loss
f(z, torch.eye(4), c) | linear_cross_entropy
f(z.expand(3, *z.shape).log_softmax(2), c[:, None] % 3 + 1, c * 0 + 3, c * 0 + 1) | ctc_loss
""")

# what takes no parameter, by the reason; a name that ends in _ is written in place by the call of the name without it
ASIDE = listed("""
makes a tensor of no other | arange bartlett_window blackman_window empty empty_permuted empty_quantized empty_strided eye
    fftfreq frombuffer from_file from_numpy full hamming_window hann_window kaiser_window linspace logspace ones rand
    randint randn randperm range rfftfreq scalar_tensor tril_indices triu_indices zeros sparse_compressed_tensor
whole numbers or truth values alone | bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
    bitwise_xor gcd lcm one_hot unravel_index
a setting, a question or a file | are_deterministic_algorithms_enabled autocast_decrement_nesting
    autocast_increment_nesting broadcast_shapes can_cast clear_autocast_cache compile compiled_with_cxx11_abi
    cudnn_is_acceptable fork get_autocast_cpu_dtype get_autocast_dtype get_autocast_gpu_dtype get_autocast_ipu_dtype
    get_autocast_xla_dtype get_default_device get_default_dtype get_deterministic_debug_mode get_device_module
    get_file_path get_float32_matmul_precision get_num_interop_threads get_num_threads get_rng_state
    import_ir_module import_ir_module_from_buffer init_num_threads initial_seed is_anomaly_check_nan_enabled
    is_anomaly_enabled is_autocast_cache_enabled is_autocast_cpu_enabled is_autocast_enabled is_autocast_ipu_enabled
    is_autocast_xla_enabled is_deterministic_algorithms_warn_only_enabled is_grad_enabled is_inference_mode_enabled
    is_vulkan_available is_warn_always_enabled load manual_seed merge_type_from_type_comment parse_ir parse_schema
    parse_type_comment prepare_multiprocessing_environment profiler_allow_cudagraph_cupti_lazy_reinit_cuda12
    promote_types save seed set_anomaly_enabled set_autocast_cache_enabled set_autocast_cpu_dtype
    set_autocast_cpu_enabled set_autocast_dtype set_autocast_enabled set_autocast_gpu_dtype set_autocast_ipu_dtype
    set_autocast_ipu_enabled set_autocast_xla_dtype set_autocast_xla_enabled set_default_device set_default_dtype
    set_default_tensor_type set_deterministic_debug_mode set_float32_matmul_precision set_flush_denormal
    set_num_interop_threads set_num_threads set_printoptions set_rng_state set_warn_always thread_safe_generator
    unify_type_list use_deterministic_algorithms wait classproperty Optional assert_int_or_pair
    boolean_dispatch handle_torch_function has_torch_function has_torch_function_unary has_torch_function_variadic
    from_dlpack to_dlpack
symbolic sizes, for exported programs | sym_constrain_range sym_constrain_range_for_size sym_float sym_fresh_size sym_int
    sym_ite sym_max sym_min sym_not sym_sqrt sym_sum
quantized numbers, which have no gradient | choose_qparams_optimized dequantize fbgemm_linear_fp16_weight
    fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight fbgemm_linear_int8_weight_fp32_activation
    fbgemm_linear_quantize_weight fbgemm_pack_gemm_matrix_fp16 fbgemm_pack_quantized_matrix int_repr
    fake_quantize_per_channel_affine fake_quantize_per_tensor_affine fused_moving_avg_obs_fake_quant
    q_per_channel_axis q_per_channel_scales q_per_channel_zero_points q_scale q_zero_point quantize_per_channel
    quantize_per_tensor quantize_per_tensor_dynamic quantized_batch_norm quantized_gru quantized_gru_cell
    quantized_lstm quantized_lstm_cell quantized_max_pool1d quantized_max_pool2d quantized_max_pool3d
    quantized_rnn_relu_cell quantized_rnn_tanh_cell scaled_grouped_mm scaled_mm
a kernel of one backend, under the functions here | batch_norm_backward_elemt batch_norm_backward_reduce batch_norm_elemt
    batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_stats batch_norm_update_stats
    cudnn_affine_grid_generator cudnn_batch_norm cudnn_convolution cudnn_convolution_add_relu cudnn_convolution_relu
    cudnn_convolution_transpose cudnn_grid_sampler miopen_batch_norm miopen_convolution miopen_convolution_add_relu
    miopen_convolution_relu miopen_convolution_transpose miopen_ctc_loss miopen_depthwise_convolution miopen_rnn
    mkldnn_adaptive_avg_pool2d mkldnn_convolution mkldnn_linear_backward_weights mkldnn_max_pool2d mkldnn_max_pool3d
    mkldnn_rnn_layer slice_inverse
parts of a sparse tensor | ccol_indices_copy col_indices_copy crow_indices_copy indices_copy row_indices_copy
    values_copy
removed from torch, or raises | eig symeig embedding_renorm_ resize_as_ resize_as_sparse_
a function of functions | cond vmap while_loop
single precision alone in torch (exact: tests/test_every_call.py) | grouped_mm
""")  # noqa: E501

# an expression in `nn` for each module; it is called with rows `[4,4]`, or what stands after @
MODULES = listed("""
nn.F() | CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU
    ReLU ReLU6 RReLU SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Dropout AlphaDropout Flatten
nn.F(1) | LogSoftmax Softmax Softmin GLU
nn.F(0.5) @ q | Dropout1d
nn.F(0.5) @ g | Dropout2d FeatureAlphaDropout
nn.F(0.5) @ g[:, :, None] | Dropout3d
nn.F(0.1, 0.2) | Threshold
nn.F() @ g | Softmax2d
nn.F(2) @ q | AdaptiveAvgPool1d AdaptiveMaxPool1d AvgPool1d MaxPool1d
nn.F(2) @ g | AdaptiveAvgPool2d AdaptiveMaxPool2d AvgPool2d MaxPool2d LocalResponseNorm Unfold ChannelShuffle
    PixelUnshuffle ReflectionPad2d ReplicationPad2d ZeroPad2d CircularPad2d
nn.F(2, 1.0) @ q | ConstantPad1d
nn.F(2, 1.0) @ g | ConstantPad2d
nn.F(2, 1.0) @ g[:, :, None] | ConstantPad3d
nn.F(1) @ q | ReflectionPad1d ReplicationPad1d ZeroPad1d CircularPad1d
nn.F(1) @ g[:, None] | ReflectionPad3d ReplicationPad3d ZeroPad3d CircularPad3d
nn.F(2) @ g[:, None] | AdaptiveAvgPool3d AdaptiveMaxPool3d AvgPool3d MaxPool3d
nn.F(2) @ g.repeat(1, 2, 1, 1) | PixelShuffle
nn.F(2) @ g | CrossMapLRN2d
nn.F(2, output_size=3) @ g | FractionalMaxPool2d
nn.F(2, output_size=2) @ g.repeat(1, 2, 1, 1)[:, None] | FractionalMaxPool3d
nn.F(2, 2) @ q | LPPool1d
nn.F(2, 2) @ g | LPPool2d
nn.F(2, 2) @ g[:, None] | LPPool3d
nn.F(2, 2) @ q[:, :, :1].repeat(1, 2, 1) | Fold
nn.F(2) @ q[..., :3], torch.arange(3).expand(5, 2, 3) * 2 | MaxUnpool1d
nn.F(2) @ g[..., :3, :3], torch.arange(9).view(3, 3).expand(5, 2, 3, 3) | MaxUnpool2d
nn.F(2) @ g[..., :2, :2, None], torch.arange(4).view(2, 2, 1).expand(5, 2, 2, 2, 1) | MaxUnpool3d
nn.F(scale_factor=2) @ g | Upsample UpsamplingBilinear2d UpsamplingNearest2d
nn.F(1, (2, 2)) | Unflatten
nn.F() @ x, x.sin() | CosineSimilarity PairwiseDistance
nn.F(4, 3) | Linear
nn.F(3) | LazyLinear
nn.F(4, 4, 3) @ x, x.sin() | Bilinear
nn.F(2, 3, 2) @ q | Conv1d ConvTranspose1d
nn.F(2, 3, 2) @ g | Conv2d ConvTranspose2d
nn.F(2, 3, 2) @ g[:, :, None].expand(5, 2, 2, 6, 6) | Conv3d ConvTranspose3d
nn.F(3, 2) @ q | LazyConv1d LazyConvTranspose1d
nn.F(3, 2) @ g | LazyConv2d LazyConvTranspose2d
nn.F(3, 2) @ g[:, :, None].expand(5, 2, 2, 6, 6) | LazyConv3d LazyConvTranspose3d
nn.F(4).eval() | BatchNorm1d
nn.F(2).eval() @ g | BatchNorm2d
nn.F(2).eval() @ g[:, :, None] | BatchNorm3d SyncBatchNorm
nn.F().eval() | LazyBatchNorm1d
nn.F().eval() @ g | LazyBatchNorm2d
nn.F().eval() @ g[:, :, None] | LazyBatchNorm3d
nn.F(2, affine=True) @ q | InstanceNorm1d
nn.F(2, affine=True) @ g | InstanceNorm2d
nn.F(2, affine=True) @ g[:, :, None] | InstanceNorm3d
nn.F(affine=True) @ q | LazyInstanceNorm1d
nn.F(affine=True) @ g | LazyInstanceNorm2d
nn.F(affine=True) @ g[:, :, None] | LazyInstanceNorm3d
nn.F(2, 2) @ q | GroupNorm
nn.F(4) | LayerNorm RMSNorm
nn.F(4, 3) @ i | Embedding EmbeddingBag
nn.F(2, 3, batch_first=True) @ q.mT | RNN GRU LSTM
nn.F(4, 3) @ x | RNNCell GRUCell LSTMCell
nn.F(2, 1, batch_first=True) @ q.mT, q.mT, q.mT | MultiheadAttention
nn.F(2, 1, 3, 0.0, batch_first=True) @ q.mT | TransformerEncoderLayer
nn.F(2, 1, 3, 0.0, batch_first=True) @ q.mT, q.mT.sin() | TransformerDecoderLayer
nn.F(nn.TransformerEncoderLayer(2, 1, 3, 0.0, batch_first=True), 2, enable_nested_tensor=False) @ q.mT | TransformerEncoder
nn.F(nn.TransformerDecoderLayer(2, 1, 3, 0.0, batch_first=True), 2) @ q.mT, q.mT.sin() | TransformerDecoder
nn.F(2, 1, 1, 1, 3, 0.0, batch_first=True) @ q.mT, q.mT.sin() | Transformer
nn.F(nn.Linear(4, 3), nn.Tanh()) | Sequential
""")  # noqa: E501

MODULE_LOSSES = listed("""
nn.F()(z, y) | MSELoss L1Loss SmoothL1Loss HuberLoss
nn.F()(z, c) | CrossEntropyLoss MultiMarginLoss
nn.F()(z.log_softmax(1), c) | NLLLoss
nn.F()(z.log_softmax(1)[..., None, None], c[:, None, None]) | NLLLoss2d
nn.F()(r, t) | BCELoss
nn.F()(z, t) | BCEWithLogitsLoss MultiLabelSoftMarginLoss
nn.F(reduction="mean")(z.log_softmax(1), t) | KLDivLoss
nn.F()(z, t.round()) | PoissonNLLLoss
nn.F()(z, y, t) | GaussianNLLLoss
nn.F()(z, s) | SoftMarginLoss HingeEmbeddingLoss
nn.F()(z, i) | MultiLabelMarginLoss
nn.F()(z, y, s[:, 0]) | CosineEmbeddingLoss
nn.F()(z, y, y + t) | TripletMarginLoss TripletMarginWithDistanceLoss
nn.F()(z[:, 0], y[:, 0], s[:, 0]) | MarginRankingLoss
nn.F()(z.expand(3, *z.shape).log_softmax(2), c[:, None] % 3 + 1, c * 0 + 3, c * 0 + 1) | CTCLoss
""")

MODULES_ASIDE = listed("""
holds modules or parameters, and calls nothing | Module ModuleDict ModuleList ParameterDict ParameterList Parameter Buffer
    Container UninitializedParameter UninitializedBuffer LinearCrossEntropyOptions
the base of others | RNNBase RNNCellBase
several devices | DataParallel
a head with its loss (its own tests) | LinearCrossEntropyLoss AdaptiveLogSoftmaxWithLoss
""")  # noqa: E501

OPTIMIZERS = listed("""
o.F(params, lr=0.1) | ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS NAdam RAdam RMSprop Rprop SGD
o.F([p for p in params if p.dim() == 2], lr=0.1) | Muon
o.F(params, lr=0.1), sparse | SparseAdam
the base of others | Optimizer
""")
