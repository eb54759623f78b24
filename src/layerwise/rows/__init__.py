"""The map Z = W A: rows of inputs and of cotangents, every contraction of them, and a parameter as a matrix."""
