"""Several processes: what shards can hold, and what all of them must do alike."""
