"""From the scripts of TRL and the YAML of axolotl and LLaMA-Factory to this library."""
