"""The poster's other statements, each a command: `python -m benchmarks.altmin <name>` writes a JSON file and a picture
and prints a sentence on what was seen. Minutes each; no study of tuned methods (that is benchmarks/training)."""
