"""What things cost: time and memory of quantities (`overhead/`), of optimizers' steps, and of the library's parts."""
