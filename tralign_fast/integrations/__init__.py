"""tralign-fast inside other people's trainers: one file for each. Nothing is patched until asked."""
