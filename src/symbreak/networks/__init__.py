"""Networks: one adapter a family makes each a denoiser d(x, sigma) -> E[x_0 | x]."""
