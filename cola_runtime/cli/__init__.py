"""The `cola` command, one file per noun."""
