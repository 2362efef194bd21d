"""tralign-fast inside other trainers, one file for each. Nothing is patched until asked."""
