"""Worker processes: one process seen from the daemon, the policy, the code inside the worker."""
