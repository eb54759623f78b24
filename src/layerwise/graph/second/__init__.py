"""Second derivatives by autograd: whether those of functions of one's own are right, and passes of zeros for free."""
