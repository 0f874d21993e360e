"""Commands: one file each, from configuration to run."""
