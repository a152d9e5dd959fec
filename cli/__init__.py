"""The front door: one `switchkd` command whose subcommands live in their rooms."""
