"""The command line, `mobile_vla`: one module per subcommand."""
