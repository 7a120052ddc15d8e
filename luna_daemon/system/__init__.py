"""The machine: the runtime folder, GPU memory, logs, running a module's file directly."""
