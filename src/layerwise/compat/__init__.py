"""Other libraries' names over ours, so that a script moves by changing an import."""
