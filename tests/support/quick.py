"""The tests of `make test-quick`: of every folder some that compute or compile, within a minute together."""

from __future__ import annotations

# By file below tests/, the names of test functions; all their parameters run.
QUICK: dict[str, set[str]] = {
    "attention/test_cascade.py": {"test_empty_parts_give_zeros", "test_halves_must_make_up_q"},
    "attention/test_metadata.py": {"test_planning_works_on_the_cpu_too", "test_deterministic_never_splits"},
    "attention/test_ring.py": {"test_what_cannot_be_split_is_refused", "test_backends_by_name"},
    "attention/test_selection.py": {"test_diffusion_attention", "test_extend_and_decode_are_the_public_functions"},
    "checks/test_dispatch.py": {"test_the_best_one_that_accepts_serves"},
    "checks/test_errors.py": {
        "test_the_calls_are_valid_before_they_are_malformed",
        "test_attention_chunk_none_counts_as_zero",
    },
    "engine/test_loader.py": {"test_first_call_compiles_and_the_next_process_loads"},
    "fuzz/test_oracle.py": {"test_a_right_call_is_answered", "test_a_wrong_answer"},
    "gradients/test_autograd.py": {"test_second_derivatives_are_refused_by_name"},
    "gradients/test_random.py": {"test_the_rule_refuses_mistakes"},
    "toolkit/test_errors.py": {"test_what_no_launch_can_have", "test_python_packs_a_launch_as_the_launcher_unpacks_it"},
    "hopper/test_hopper.py": {"test_a_source_that_does_not_compile_raises_with_the_compilers_message"},
    "integrations/test_flash_attn_interface.py": {"test_answers_are_jit_kernels"},
    "integrations/test_sdpa.py": {"test_the_way_back", "test_gradients_by_a_mask_of_lengths_and_after_the_way_back"},
    "integrations/test_transformers.py": {"test_sinks", "test_llama_logits_of_a_padded_batch"},
    "integrations/test_vllm.py": {"test_neutral_values"},
    "musa/test_calls.py": {"test_mla_decode"},
    "numeric/test_combine.py": {"test_combine_is_the_formula", "test_two_halves_of_the_keys_merge_to_the_whole"},
    "numeric/test_numeric.py": {"test_any_lengths_and_mask"},
    "numeric/test_promises.py": {"test_run_to_run_the_same_bits", "test_heads_that_share_memory"},
    "numeric/test_reference.py": {"test_an_example_computed_by_hand", "test_masks_drawn_by_hand"},
    "ops/test_rms_norm.py": {"test_random_cases", "test_errors_name_the_argument"},
    "portable/test_portable.py": {
        "test_every_architecture_and_size_has_a_tile",
        "test_the_launcher_builds_without_a_driver_and_refuses_bad_launches",
    },
    "test_house.py": {"test_imports_go_downwards", "test_importing_the_package_does_nothing"},
}
