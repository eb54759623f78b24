"""Products of Jacobians, Hessians and the GGN with vectors, by torch's autograd alone, on lists of tensors."""
