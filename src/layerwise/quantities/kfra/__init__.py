"""KFRA: the recursion of a batch-averaged Hessian down a chain of layers."""
