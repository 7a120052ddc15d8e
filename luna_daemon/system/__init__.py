"""The machine: runtime folder, ports, GPU memory, logs, units in words, and running a module's file directly."""
