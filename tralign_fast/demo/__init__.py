"""The demo: a small chat model, its rows, and a run of minutes on a CPU."""
