"""The poster's other statements, each a command: `python -m benchmarks.papers.altmin <name>` writes a JSON file and a
picture and prints a sentence on what was seen. Minutes each; a study of tuned methods is benchmarks/training."""
