"""What only a CPU wants: oneDNN's products, pages given back, blocks that stay in its cache."""
