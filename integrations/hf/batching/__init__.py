"""transformers' batch API (`generate_batch` and its managers) on hf_paged's engine."""
