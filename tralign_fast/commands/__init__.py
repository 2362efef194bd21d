"""What `tralign-fast` does, one file a command."""
