"""Megatron's arguments of a model, told apart: what belongs to the model, and what to the job that runs it.

    ARCHITECTURE   a checkpoint's: they say which function its weights compute
    THE_JOBS       the running job's: layout, precision, training, kernels

`second_model.frozen_args` puts a checkpoint's ARCHITECTURE into the job's arguments. Together the two hold every
argument that is a field of Megatron's TransformerConfig: a test fails where a version has one that is not sorted yet.
Names only, no code.
"""

ARCHITECTURE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention",
    "kv_channels", "max_position_embeddings", "untie_embeddings_and_output_weights", "spec",
    # positions
    "position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved", "no_rope_freq", "mrope_section",
    "rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor", "rope_type",
    "rotary_scaling_factor", "mscale", "mscale_all_dim", "yarn_original_max_position_embeddings", "yarn_beta_fast",
    "yarn_beta_slow", "yarn_correction_range_round_to_int",
    # norms, activations, biases, scales
    "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "apply_residual_connection_post_layernorm",
    "add_bias_linear", "add_qkv_bias", "squared_relu", "swiglu", "quick_geglu", "bias_gelu_fusion", "glu_linear_offset",
    "activation_func_clamp_value", "use_mup", "mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult",
    "mup_output_mult", "mup_base_head_dim", "mup_attn_scale_power",
    # attention
    "qk_layernorm", "qk_l2_norm", "apply_query_key_layer_scaling", "softmax_type", "attention_output_gate",
    "window_size", "window_attn_skip_freq", "multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim",
    "qk_pos_emb_head_dim", "v_head_dim", "experimental_attention_variant", "dsa_indexer_n_heads",
    "dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset",
    "dsa_indexer_rope_interleaved", "dsa_indexer_rotate_activation", "dsa_indexer_scoring_relu",
    "dsa_indexer_k_norm_epsilon", "dsa_indexer_k_norm_fp32", "linear_attention_freq", "linear_conv_kernel_dim",
    "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads",
    # state space layers
    "hybrid_layer_pattern", "is_hybrid_model", "mamba_state_dim", "mamba_head_dim", "mamba_num_groups",
    "mamba_num_heads",
    # experts
    "num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_latent_size", "moe_apply_probs_on_input",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_router_topk", "moe_router_num_groups",
    "moe_router_group_topk", "moe_router_pre_softmax", "moe_router_score_function", "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor", "moe_router_dtype", "moe_router_load_balancing_type", "moe_aux_loss_coeff",
    "moe_expert_capacity_factor", "moe_token_drop_policy", "moe_pad_expert_input_to_capacity",
    "moe_mlp_glu_interleave_size", "moe_shared_expert_glu_interleave_size",
)  # fmt: skip
"""What a checkpoint says of its function.

One kernel is here: Megatron's fused GELU is the tanh approximation, the plain one is exact. One loss: its coefficients
must be as many as the ways of balancing, and these decide how experts are chosen.
"""

THE_JOBS = (
    # layout and communication
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "context_parallel_size",
    "cp_comm_type", "expert_model_parallel_size", "expert_tensor_parallel_num_weight_shards",
    "expert_tensor_parallel_size", "hierarchical_context_parallel_sizes", "hybrid_context_parallel",
    "max_seqlen_per_dp_cp_rank", "microbatch_group_size_per_vp_stage", "mtp_standalone", "overlap_p2p_comm",
    "overlap_p2p_comm_warmup_flush", "pipeline_model_parallel_comm_backend", "pipeline_model_parallel_layout",
    "pipeline_model_parallel_size", "sequence_parallel", "tensor_model_parallel_size",
    "tensor_parallel_num_weight_shards", "use_ring_exchange_p2p",
    # precision
    "attention_softmax_in_fp32", "batch_invariant_mode", "bf16", "deterministic_mode",
    "disable_bf16_reduced_precision_matmul", "first_last_layers_bf16", "fp16", "fp32_residual_connection", "fp4",
    "fp4_quantizer_factory", "fp4_recipe", "fp8", "fp8_amax_compute_algo", "fp8_amax_history_len", "fp8_interval",
    "fp8_margin", "fp8_output_proj", "fp8_quantizer_factory", "fp8_recipe", "fp8_wgrad",
    "mamba_training_ssm_states_dtype", "moe_router_padding_for_fp8", "moe_router_padding_for_quantization",
    "num_layers_at_end_in_bf16", "num_layers_at_start_in_bf16",
    # training: losses, noise, initial weights, what is kept for backward; Megatron's own benchmarks
    "activation_offload_fraction", "attention_dropout", "calculate_per_token_loss", "cpu_offloading_num_layers",
    "cpu_offloading_retain_pinned_cpu_buffers", "cross_entropy_fusion_impl", "cross_entropy_loss_fusion",
    "delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks", "distribute_saved_activations",
    "dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss", "embedding_init_method_std",
    "fine_grained_activation_offloading", "fine_grained_offloading_max_inflight_offloads", "hidden_dropout",
    "init_method_std", "init_model_with_meta_device", "min_offloaded_tensor_size", "moe_enable_routing_replay",
    "moe_input_jitter_eps", "moe_layer_recompute", "moe_router_bias_update_rate", "moe_router_force_biased",
    "moe_router_force_load_balancing", "moe_router_quantile_balancing_ema", "moe_z_loss_coeff", "mtp_detach_heads",
    "mtp_hybrid_override_pattern", "mtp_loss_scaling_factor", "mtp_num_layers", "mtp_use_repeated_layer",
    "offload_modules", "perform_initialization", "qk_clip", "qk_clip_alpha", "qk_clip_threshold",
    "recompute_granularity", "recompute_method", "recompute_modules", "recompute_num_layers",
    "use_cpu_initialization",
    # kernels, how they are launched, logs
    "apply_rope_fusion", "attention_backend", "barrier_with_L1_time", "bias_dropout_fusion", "cache_mla_latents",
    "clone_scatter_output_in_embedding", "config_logger_dir", "cuda_graph_impl", "cuda_graph_modules",
    "cuda_graph_warmup_steps", "defer_embedding_wgrad_compute", "delay_wgrad_compute", "dsa_kernel_backend",
    "enable_cuda_graph", "ep_overlap_early_attn_memory_release", "external_cuda_graph", "flash_attention_version",
    "flash_decode", "fused_residual_rmsnorm", "gradient_accumulation_fusion", "high_priority_a2a_comm_stream",
    "inference_cuda_graph_scope", "inference_disable_triton_nvls_kernels", "inference_fuse_tp_communication",
    "inference_grouped_gemm_backend", "inference_moe_disable_fused_quant_kernels",
    "inference_moe_token_dispatcher_type", "inference_rng_tracker", "kitchen_attention_backend",
    "log_max_attention_logit", "masked_softmax_fusion", "mla_down_proj_fusion", "mlp_chunks_for_prefill",
    "mlp_chunks_for_training", "moe_deepep_num_sms", "moe_enable_deepep", "moe_expert_rank_capacity_factor",
    "moe_flex_dispatcher_backend", "moe_flex_dispatcher_num_sms", "moe_grouped_gemm",
    "moe_hybridep_num_blocks_permute", "moe_hybridep_num_blocks_unpermute", "moe_hybridep_num_sms",
    "moe_hybridep_num_sms_preprocessing", "moe_hybridep_pad_uneven_dispatch_inputs", "moe_ncclep_static_shape",
    "moe_ncclep_zero_copy", "moe_pad_experts_for_cuda_graph_inference", "moe_paged_stash",
    "moe_paged_stash_buffer_size_factor_cpu", "moe_paged_stash_buffer_size_factor_cuda",
    "moe_paged_stash_page_size", "moe_per_layer_logging", "moe_permute_fusion", "moe_permute_fusion_into_hybridep",
    "moe_router_fusion", "moe_shared_expert_overlap", "moe_single_grouped_bias", "moe_single_grouped_weight",
    "moe_token_dispatcher_type", "nccl_all_reduce_for_prefill", "overlap_dispatch_backward_with_experts_wgrad",
    "overlap_moe_expert_parallel_comm", "symmetric_ar_type", "test_mode", "tp_comm_bootstrap_backend",
    "tp_comm_bulk_dgrad", "tp_comm_bulk_wgrad", "tp_comm_overlap", "tp_comm_overlap_ag", "tp_comm_overlap_rs",
    "tp_comm_overlap_rs_dgrad", "tp_comm_split_ag", "tp_comm_split_rs", "transformer_impl",
    "use_fused_weighted_squared_relu", "use_grouped_gemm_for_dense_mlp", "use_grouped_gemm_for_shared_expert",
    "use_kitchen_attention", "use_mamba_mem_eff_path", "use_te_activation_func", "use_transformer_engine_op_fuser",
    "wgrad_deferral_limit",
)  # fmt: skip
"""What the job decides for every model it holds."""

OLDER_NAMES = {"layernorm_epsilon": "norm_epsilon", "layernorm_zero_centered_gamma": "apply_layernorm_1p"}
"""Names of older versions, under which a checkpoint may hold the same thing."""
