"""Ops that any trainer can call: log-probs, preference losses, the update of the reference."""
