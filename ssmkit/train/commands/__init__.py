"""Subcommands of the `ssmkit` command: each module has `add_arguments` and `run`."""
