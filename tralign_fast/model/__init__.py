"""A causal language model whose forward returns log-probs, on rows that share their prompts."""
