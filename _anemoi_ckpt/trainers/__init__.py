"""What plugs into the programs that users run: a module for each."""
